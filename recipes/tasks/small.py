"""Makes tasks that two cores can finish: small networks on samples that are shipped or easy to get."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import interpolate, mse_loss

from recipes.engine.task import Data, Source, Task, package, regression
from recipes.tasks import models
from recipes.tasks.images import MEAN, STD, fashion_mnist, whole_fashion_mnist
from recipes.tasks.models import SmallConvNet, perceptron
from recipes.tasks.splitting import Pair, split

BASE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}  # of SGD, also inside SAM and FAM
WIDTH, DEPTH = 128, 2  # of the hidden layers of a network that has a choice
SMOKE = 384  # samples for training and validation in a smoke test, at most


def small(
    load: Callable[[Source], tuple[Pair, Pair]],
    sizes: tuple[int, int],
    network: Callable[[Source], nn.Module],
    noise: float = 0.0,
    **own: Any,
) -> Task:
    """Returns the task of a network on training and validation samples, with a part of their labels wrong."""

    def data(source: Source, seed: int) -> Data:
        train, (x, y) = load(source)
        if not source.smoke:
            return split(train, (x, y), sizes, seed, noise)
        count = min(len(train[1]), SMOKE)
        few = count * 2 // 3, count // 3 if sizes[1] else 0  # validation only if the task has any
        return split(train, (x[:count], y[:count]), few, seed, noise)

    usual = {"layers": ("last",), "epochs": 60, "batch_size": 64, "options": BASE}
    return Task(data, network, **{**usual, **own})


@cache
def shipped(source: Source) -> tuple[Pair, Pair]:
    """Returns the 4,000 training and the 4,000 test images that are shipped with the recipes."""
    return fashion_mnist("train"), fashion_mnist("test")


VALIDATION = 1000  # of the 4,000 shipped training images


def quickstart(noise: float = 0.0, train_size: int = 2000) -> Task:
    """Returns the quick start's task, on shipped images with a fraction ``noise`` of wrong labels."""
    name = f"quickstart-noise{100 * noise:g}" if noise else "quickstart"
    about = f"small convolutional network, {train_size} images of Fashion-MNIST, {noise:.0%} wrong labels"
    own: dict[str, Any] = {"name": name, "about": about, "layers": ("head",), "kappa_samples": train_size}
    sizes = train_size, VALIDATION
    return small(shipped, sizes, lambda source: SmallConvNet(), noise, epochs=20, **own)


def fashion_mnist_small(tuning: bool = False) -> Task:
    """Returns the task on 60,000 images; for tuning on 10,000 of them, with 5,000 for validation."""
    sizes = (10_000, 5_000) if tuning else (60_000, 0)
    return small(whole_fashion_mnist, sizes, lambda source: SmallConvNet(), layers=("head",), epochs=10)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "batchnorm": lambda width: SmallConvNet(channels=(8, 16), hidden=width),
    "no batchnorm": models.without_batchnorm,
    "transformer": lambda width: models.vision_transformer(),
    "resnet": lambda width: models.small_resnet(),
}


def fashion(network: str, noise: float = 0.0, width: int = WIDTH, depth: int = DEPTH) -> Task:
    """Returns the task of one of the study's networks on the shipped images."""
    return small(shipped, (2000, VALIDATION), lambda source: NETWORKS[network](width), noise, epochs=20)


@cache
def mnist1d_samples(source: Source) -> tuple[Pair, Pair]:
    """Returns MNIST-1D (n, 40) (Greydanus and Kobak, 2024), 4,000 and 1,000 samples by its authors' seed."""
    made = package("mnist1d.data", "study")
    arrays = made.make_dataset(made.get_dataset_args())
    train, test = (
        (torch.from_numpy(arrays[x]).float(), torch.from_numpy(arrays[y]).long())
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )
    return train, test


@cache
def digits_samples(source: Source) -> tuple[Pair, Pair]:
    """Returns scikit-learn's 8 x 8 digits (n, 64); the test set is the last 597 of 1,797 (other writers)."""
    images, labels = package("sklearn.datasets", "study").load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


@cache
def diabetes_samples(source: Source) -> tuple[Pair, Pair]:
    """Returns scikit-learn's diabetes (n, 10), progression after a year; the last 142 of 442 are the test."""
    inputs, targets = package("sklearn.datasets", "study").load_diabetes(return_X_y=True)
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(targets).float().unsqueeze(1)
    x, y = (x / x[:300].std(0), (y - y[:300].mean()) / y[:300].std())
    return (x[:300], y[:300]), (x[300:], y[300:])


def mnist1d(noise: float = 0.0, width: int = WIDTH, depth: int = DEPTH, normalised: bool = False) -> Task:
    """Returns the task of a perceptron on MNIST-1D, with LayerNorm and GELU if it is normalised."""
    make = partial(perceptron, 40, 10, width, depth, normalised)
    return small(mnist1d_samples, (2000, 1000), lambda source: make(), noise)


def digits(noise: float = 0.0, width: int = WIDTH, depth: int = DEPTH) -> Task:
    """Returns the task of a perceptron on the digits as vectors."""
    return small(digits_samples, (800, 400), lambda source: perceptron(64, 10, width, depth), noise)


def diabetes(noise: float = 0.0, width: int = WIDTH, depth: int = DEPTH) -> Task:
    """Returns the task of a perceptron on diabetes, a regression."""
    measured: dict[str, Any] = {"loss": mse_loss, "evaluate": regression, "metric": "explained"}
    return small(diabetes_samples, (200, 100), lambda source: perceptron(10, 1, width, depth), **measured)


def finetuning(samples: int, noise: float = 0.0, width: int = WIDTH, depth: int = DEPTH) -> Task:
    """Returns the task of a pretrained network on digits, enlarged and scaled as Fashion-MNIST's images."""

    def enlarged(source: Source) -> tuple[Pair, Pair]:
        train, test = (
            ((interpolate(x.view(-1, 1, 8, 8), (28, 28), mode="bilinear") - MEAN) / STD, y)
            for x, y in digits_samples(source)
        )
        return train, test

    def network(source: Source) -> nn.Module:
        return models.pretrained(0) if source.smoke else models.pretrained()

    epochs = 30 if samples <= 200 else 10
    return small(enlarged, (samples, 200), network, noise, epochs=epochs, batch_size=32)
