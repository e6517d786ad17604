"""The study's data: training, validation and test samples as tensors, split and disturbed by a seed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from recipes.engine.task import Data, Missing, Source
from recipes.tasks.images import fashion_mnist, normalised, whole_fashion_mnist, with_symmetric_noise

Pair = tuple[Tensor, Tensor]  # inputs as the network takes them, labels


def digits(folder: Path) -> tuple[Pair, Pair]:
    """scikit-learn's 8 x 8 digits (n, 64); the last 597 of 1,797 are the test set (other writers)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Missing('scikit-learn is not installed: pip install -e ".[study]"') from error
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def mnist1d(folder: Path) -> tuple[Pair, Pair]:
    """MNIST-1D (n, 40) (Greydanus and Kobak, 2024), generated with its authors' seed: 4,000 and 1,000."""
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise Missing('mnist1d is not installed: pip install -e ".[study]"') from error
    arrays = make_dataset(get_dataset_args())
    train, test = (
        (torch.from_numpy(arrays[x]).float(), torch.from_numpy(arrays[y]).long())
        for x, y in (("x", "y"), ("x_test", "y_test"))
    )
    return train, test


def shipped(folder: Path) -> tuple[Pair, Pair]:
    """4,000 and 4,000 images of Fashion-MNIST that lie beside the recipes."""
    return fashion_mnist("train"), fashion_mnist("test")


def whole(folder: Path) -> tuple[Pair, Pair]:
    """All of Fashion-MNIST."""
    (x, y), (x_test, y_test) = (whole_fashion_mnist(part, Source(folder)) for part in ("train", "test"))
    return (normalised(x), y), (normalised(x_test), y_test)


LOADERS: dict[str, Callable[[Path], tuple[Pair, Pair]]] = {
    "digits": digits,
    "mnist1d": mnist1d,
    "fashion-2000": shipped,
    "fashion-10000": whole,
    "fashion-60000": whole,
}
SIZES = {  # of the training and validation sets
    "digits": (800, 400),
    "mnist1d": (2000, 1000),
    "fashion-2000": (2000, 1000),
    "fashion-10000": (10000, 2000),
    "fashion-60000": (55000, 5000),
}


@cache
def _loaded(task: str, folder: Path) -> tuple[Pair, Pair]:
    return LOADERS[task](folder)


def samples(task: str, noise: float, seed: int, folder: Path) -> Data:
    """The seed's split of the training data; noise hits training and validation labels, never the test's.

    Raises:
        Missing: if the data are not there.
    """
    (inputs, labels), (test_inputs, test_labels) = _loaded(task, folder)
    train_size, validation_size = SIZES[task]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[: train_size + validation_size]
    x, y = inputs[order], with_symmetric_noise(labels[order], noise, 10, generator)
    return Data(
        TensorDataset(x[:train_size], y[:train_size]),
        {
            "validation": TensorDataset(x[train_size:], y[train_size:]),
            "test": TensorDataset(test_inputs, test_labels),
        },
    )
