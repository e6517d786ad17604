"""Batches for the recipes: shuffled from a seed of their own, or in order, and where the model is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset

from recipes.engine.task import Batch, Samples


def shuffled(samples: Samples, batch_size: int, seed: int, workers: int = 0) -> DataLoader[Batch]:
    """In an order drawn from the seed; the last, incomplete batch is left out (unless it is the only one)."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(samples, generator=generator)  # type: ignore[arg-type]
    drop_last = len(sampler) > batch_size
    return _loader(samples, BatchSampler(sampler, batch_size, drop_last), generator, workers)


def of_epoch(samples: Samples, batch_size: int, seed: int, epoch: int, workers: int = 0) -> DataLoader[Batch]:
    """In the order of a run's epoch, the same for every optimizer with the run's seed."""
    order = int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1)[0])
    return shuffled(samples, batch_size, order, workers)


def ordered(samples: Samples, batch_size: int, workers: int = 0) -> DataLoader[Batch]:
    """Every sample once, in order: for evaluation."""
    sampler = SequentialSampler(samples)  # type: ignore[arg-type]
    return _loader(samples, BatchSampler(sampler, batch_size, False), torch.Generator(), workers)


def _loader(
    samples: Samples, batches: BatchSampler, generator: torch.Generator, workers: int
) -> DataLoader[Batch]:
    """A generator, also where nothing is drawn: otherwise the loader draws from the global one."""
    if isinstance(samples, TensorDataset):  # one indexing per batch instead of one per sample
        return DataLoader[Any](samples, sampler=batches, batch_size=None, generator=generator)
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, generator=generator)


def first(samples: Samples, count: int) -> Samples:
    """The first ``count`` samples, or all."""
    if isinstance(samples, TensorDataset):
        return TensorDataset(*(tensor[:count] for tensor in samples.tensors))
    return Subset(samples, range(min(count, len(samples))))  # type: ignore[arg-type]


def move(batch: Any, device: torch.device) -> Any:
    """A batch on the device."""
    return each_tensor(lambda tensor: tensor.to(device, non_blocking=True), batch)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with its floating point tensors in another precision."""
    return each_tensor(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, batch)


def each_tensor(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The same tuples and dicts with the function of every tensor in them."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {name: each_tensor(function, item) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(each_tensor(function, item) for item in batch)
    return batch
