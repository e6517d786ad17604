"""The shipped Fashion-MNIST subset, the whole of it, and label noise.

Every random choice (split, noise) draws from a generator of its own, so that two methods given the same seed
see the same images with the same labels.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from recipes.engine.task import Data, Missing, Source, missing

SHIPPED = Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz"
MEAN, STD = 0.2860, 0.3530  # of the 60,000 training images, scaled to [0, 1]

Images = tuple[Tensor, Tensor]  # bytes (n, 28, 28), labels (n,)


def shipped_fashion_mnist(split: str) -> Images:
    """4,000 images of "train" or "test", which lie beside the recipes."""
    with np.load(SHIPPED) as arrays:
        return torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]).long()


def fashion_mnist(split: str) -> Images:
    """The shipped images as a network takes them: normalised (4000, 1, 28, 28), and labels (4000,)."""
    images, labels = shipped_fashion_mnist(split)
    return normalised(images), labels


def whole_fashion_mnist(split: str, source: Source) -> Images:
    """The 60,000 images of "train" or the 10,000 of "test", by torchvision; shipped ones for a smoke test."""
    if source.smoke:
        images, labels = shipped_fashion_mnist(split)
        return images[:600], labels[:600]
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise Missing('torchvision is not installed: pip install -e ".[paper]"') from error
    try:
        samples = FashionMNIST(str(source.folder), train=split == "train", download=source.download)
    except (RuntimeError, OSError) as error:
        otherwise = ", or gunzip the four files of Debian's package dataset-fashion-mnist there"
        raise missing("Fashion-MNIST", source.folder / "FashionMNIST" / "raw", source, otherwise) from error
    return samples.data, samples.targets


def normalised(images: Tensor) -> Tensor:
    """Bytes (n, 28, 28) to floats (n, 1, 28, 28) of mean 0 and standard deviation 1."""
    return (images.unsqueeze(1).float() / 255 - MEAN) / STD


def with_symmetric_noise(labels: Tensor, fraction: float, classes: int, generator: torch.Generator) -> Tensor:
    """Give a random ``fraction`` of the labels another class, each other class equally often."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"label noise is a fraction between 0 and 1, got {fraction}")
    noisy = labels.clone()
    flipped = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, classes, (len(flipped),), generator=generator)
    noisy[flipped] = (labels[flipped] + shift) % classes
    return noisy


def split(
    train: Images, test: Images, train_size: int, validation_size: int, noise: float, seed: int
) -> Data:
    """Training and validation images from ``train``; noise hits the labels of both, never the test labels."""
    images, labels = train
    used = train_size + validation_size
    if used > len(labels):
        raise ValueError(
            f"expected train_size + validation_size to be at most the {len(labels)} training images, "
            f"got {train_size} + {validation_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[:used]
    inputs, targets = normalised(images[order]), with_symmetric_noise(labels[order], noise, 10, generator)
    evaluation = {"test": TensorDataset(normalised(test[0]), test[1])}
    if validation_size:
        validation = TensorDataset(inputs[train_size:], targets[train_size:])
        evaluation = {"validation": validation, **evaluation}
    return Data(TensorDataset(inputs[:train_size], targets[:train_size]), evaluation)
