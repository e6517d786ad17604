"""Loads images of Fashion-MNIST: the 8,000 that are shipped with the recipes, or all 70,000."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.engine.task import Source, missing, package

SHIPPED = Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz"
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, scaled to [0, 1]

Images = tuple[Tensor, Tensor]  # normalised (n, 1, 28, 28), labels (n,)


def fashion_mnist(split: str) -> Images:
    """Returns the 4,000 shipped images of "train" or "test", with their labels."""
    with np.load(SHIPPED) as arrays:
        images, labels = (torch.from_numpy(arrays[f"{split}_{what}"]) for what in ("images", "labels"))
    return normalised(images), labels.long()


def whole_fashion_mnist(source: Source) -> tuple[Images, Images]:
    """Returns the 60,000 and the 10,000 images, by torchvision; for a smoke test the shipped ones."""
    if source.smoke:
        return fashion_mnist("train"), fashion_mnist("test")
    otherwise = ", or gunzip the files of Debian's package dataset-fashion-mnist into FashionMNIST/raw there"
    both = by_torchvision(package("torchvision.datasets").FashionMNIST, source.folder, source, otherwise)
    train, test = ((normalised(samples.data), samples.targets) for samples in both)
    return train, test


def by_torchvision(
    make: Callable[..., Any], path: Path, source: Source, otherwise: str = "", transforms: Any = (None, None)
) -> list[Any]:
    """Returns the training and the test set that ``make`` reads from a folder."""
    try:
        return [
            make(str(path), train=train, transform=chosen, download=source.download)
            for train, chosen in zip((True, False), transforms, strict=True)
        ]
    except (RuntimeError, OSError) as error:
        raise missing(make.__name__, path, source, otherwise) from error


def normalised(images: Tensor) -> Tensor:
    """Turns bytes (n, 28, 28) into floats (n, 1, 28, 28) of mean 0 and standard deviation 1."""
    return (images.unsqueeze(1).float() / 255 - MEAN) / STD
