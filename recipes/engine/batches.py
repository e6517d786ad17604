"""Makes batches of samples, in a new order for every epoch or in the order of the samples."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from recipes.engine.task import Batch, Samples


def of_epoch(samples: Samples, batch_size: int, seed: int, epoch: int, workers: int = 0) -> DataLoader[Batch]:
    """Returns the batches of an epoch, in an order that is the same for every optimizer with the run's seed.

    The last, incomplete batch is left out, unless it is the only one.
    """
    order = int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(order)
    sampler = RandomSampler(samples, generator=generator)  # type: ignore[arg-type]
    drop_last = len(sampler) > batch_size
    return _loader(samples, BatchSampler(sampler, batch_size, drop_last), generator, workers)


def ordered(samples: Samples, batch_size: int, workers: int = 0) -> DataLoader[Batch]:
    """Returns batches of every sample once, in order, for evaluation."""
    sampler = SequentialSampler(samples)  # type: ignore[arg-type]
    return _loader(samples, BatchSampler(sampler, batch_size, False), torch.Generator(), workers)


def _loader(
    samples: Samples, batches: BatchSampler, generator: torch.Generator, workers: int
) -> DataLoader[Batch]:
    """Returns a loader with a generator of its own; without one, it would draw from the global generator."""
    if isinstance(samples, TensorDataset):  # one indexing per batch instead of one per sample
        return DataLoader[Any](samples, sampler=batches, batch_size=None, generator=generator)
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, generator=generator)


def first(samples: Samples, count: int) -> Samples:
    """Returns the first ``count`` samples, or all if there are fewer."""
    if isinstance(samples, TensorDataset):
        return TensorDataset(*(tensor[:count] for tensor in samples.tensors))
    return Subset(samples, range(min(count, len(samples))))  # type: ignore[arg-type]


def each_tensor(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Applies a function to every tensor of a batch, which may be a tuple of tuples."""
    return function(batch) if isinstance(batch, Tensor) else tuple(each_tensor(function, b) for b in batch)
