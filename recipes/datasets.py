"""Data for the recipes: the shipped Fashion-MNIST subset, label noise, splits and batches.

Every random choice (split, noise, order of the batches) draws from a generator of its own, so that two
methods given the same seed see the same images with the same labels in the same order.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

FASHION_MNIST = Path(__file__).parent / "data" / "fashion_mnist_subset.npz"
FASHION_MNIST_MEAN, FASHION_MNIST_STD = 0.2860, 0.3530  # of the 60,000 training images, scaled to [0, 1]

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Splits:
    """Training, validation and test data; only the first two may carry label noise."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset


def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Return a shipped split ("train" or "test"): normalised images (4000, 1, 28, 28), labels (4000,)."""
    with np.load(FASHION_MNIST) as arrays:
        images = torch.from_numpy(arrays[f"{split}_images"]).unsqueeze(1).float() / 255
        labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
    return (images - FASHION_MNIST_MEAN) / FASHION_MNIST_STD, labels


def with_symmetric_noise(labels: Tensor, fraction: float, classes: int, generator: torch.Generator) -> Tensor:
    """Give a random ``fraction`` of the labels another class, each other class equally often."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"label noise is a fraction between 0 and 1, got {fraction}")
    noisy = labels.clone()
    flipped = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, classes, (len(flipped),), generator=generator)
    noisy[flipped] = (labels[flipped] + shift) % classes
    return noisy


def fashion_mnist_splits(
    train_size: int, validation_size: int, test_size: int, noise: float, seed: int
) -> Splits:
    """Split the shipped training images; noise hits training and validation labels, never test labels."""
    images, labels = fashion_mnist("train")
    used = train_size + validation_size
    if used > len(labels):
        raise ValueError(
            f"expected train_size + validation_size to be at most the {len(labels)} shipped training images, "
            f"got {train_size} + {validation_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)[:used]
    images, labels = images[order], with_symmetric_noise(labels[order], noise, 10, generator)
    test_images, test_labels = fashion_mnist("test")
    return Splits(
        train=TensorDataset(images[:train_size], labels[:train_size]),
        validation=TensorDataset(images[train_size:], labels[train_size:]),
        test=TensorDataset(test_images[:test_size], test_labels[:test_size]),
    )


def shuffled_batches(dataset: TensorDataset, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Reshuffled at each pass, from its own generator; the last, incomplete batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    sampler = BatchSampler(RandomSampler(dataset, generator=generator), batch_size, drop_last=True)
    return DataLoader(
        dataset, sampler=sampler, batch_size=None, generator=generator
    )  # one indexing per batch


def ordered_batches(dataset: TensorDataset, device: torch.device, batch_size: int = 250) -> Batches:
    """Every sample once, in order, already on the device: for evaluation."""
    inputs, targets = (tensor.to(device) for tensor in dataset.tensors)
    return list(zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True))
