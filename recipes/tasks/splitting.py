"""Splits samples and makes labels wrong, in a way that depends on the seed but not on the method."""

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from recipes.engine.task import Data

Pair = tuple[Tensor, Tensor]  # inputs as the network takes them, targets


def split(train: Pair, test: Pair, sizes: tuple[int, int], seed: int, noise: float = 0.0) -> Data:
    """Splits ``train`` into training and validation samples; noise hits labels of both, not of ``test``."""
    (inputs, targets), used = train, sum(sizes)
    if used > len(targets):
        raise ValueError(
            f"expected the training and validation samples to be at most {len(targets)}, got {sizes}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets), generator=generator)[:used]
    x, y = inputs[order], targets[order]
    if noise:
        y = with_symmetric_noise(y, noise, int(targets.max()) + 1, generator)
    evaluation = {"validation": TensorDataset(x[sizes[0] :], y[sizes[0] :])} if sizes[1] else {}
    train_set = TensorDataset(x[: sizes[0]], y[: sizes[0]])
    return Data(train_set, {**evaluation, "test": TensorDataset(*test)})


def with_symmetric_noise(labels: Tensor, fraction: float, classes: int, generator: torch.Generator) -> Tensor:
    """Gives a random ``fraction`` of the labels another class; all other classes are equally likely."""
    noisy = labels.clone()
    flipped = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, classes, (len(flipped),), generator=generator)
    noisy[flipped] = (labels[flipped] + shift) % classes
    return noisy
