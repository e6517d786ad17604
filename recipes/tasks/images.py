"""Images of Fashion-MNIST: those that lie beside the recipes, and all of them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.engine.task import Source, missing, package

SHIPPED = Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz"
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, scaled to [0, 1]

Images = tuple[Tensor, Tensor]  # normalised (n, 1, 28, 28), labels (n,)


def shipped_fashion_mnist(split: str) -> Images:
    """4,000 images of "train" or "test", which lie beside the recipes, as bytes (n, 28, 28)."""
    with np.load(SHIPPED) as arrays:
        return torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]).long()


def fashion_mnist(split: str) -> Images:
    """The same as a network takes them."""
    images, labels = shipped_fashion_mnist(split)
    return normalised(images), labels


def whole_fashion_mnist(source: Source) -> tuple[Images, Images]:
    """The 60,000 and the 10,000 images, by torchvision; the shipped ones for a smoke test."""
    if source.smoke:
        return fashion_mnist("train"), fashion_mnist("test")
    read = package("torchvision.datasets").FashionMNIST
    try:
        both = [read(str(source.folder), train=part, download=source.download) for part in (True, False)]
    except (RuntimeError, OSError) as error:
        otherwise = ", or gunzip the four files of Debian's package dataset-fashion-mnist there"
        raise missing("Fashion-MNIST", source.folder / "FashionMNIST" / "raw", source, otherwise) from error
    train, test = ((normalised(samples.data), samples.targets) for samples in both)
    return train, test


def normalised(images: Tensor) -> Tensor:
    """Bytes (n, 28, 28) to floats (n, 1, 28, 28) of mean 0 and standard deviation 1."""
    return (images.unsqueeze(1).float() / 255 - MEAN) / STD
