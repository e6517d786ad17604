"""Relative flatness over a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fam_optim.flatness import Settings, check_mode, layers_flatness
from fam_optim.layer.record import observe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def dataset_relative_flatness(
    model: nn.Module,
    layer: nn.Module | nn.Parameter,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[tuple[Any, Any]],
    *,
    measure: str = "neuronwise",
    mode: str = "exact",
    curvature: str = "hessian",
    normalize: bool = False,
    n_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """kappa of the empirical risk ``1/n sum_i loss_i`` over a data set, ``()``, without a graph.

    kappa is linear in the loss, so it is the mean over the batches, weighted by their sizes. The model
    is evaluated in eval mode (dropout off, BatchNorm on its running statistics, as the function that the
    data set's risk is a function of); afterwards every module is in the mode it was found in.

    Args:
        model: called on each batch's inputs.
        layer: a module of the model, or a parameter (modes full and hutchinson).
        loss_fn: ``loss_fn(model(inputs), targets)``, the *mean* over the batch.
        loader: yields ``(inputs, targets)``; tensors, also in dicts, are moved to the layer's device.
        measure, mode, curvature, normalize, n_samples, generator: as in `relative_flatness`.

    Raises:
        ValueError: if the loader is empty.
        RuntimeError: as `relative_flatness`.

    Cost: one forward per batch and the value's part of `relative_flatness`.
    """
    # The value alone: a constant Hessian spares the graph of its derivative.
    settings = Settings(
        measure, mode, normalize, n_samples, generator, detach_hessian=True, curvature=curvature
    )
    check_mode(layer, settings)
    observed = layer if isinstance(layer, nn.Parameter) else observe(layer)
    weight = layer if isinstance(layer, nn.Parameter) else next(layer.parameters())
    device = weight.device
    modes = {module: module.training for module in model.modules()}
    total, count = torch.zeros((), device=device), 0
    try:
        model.eval()
        for inputs, targets in loader:
            inputs, targets = _to(inputs, device), _to(targets, device)
            with torch.enable_grad():
                if isinstance(observed, nn.Parameter):
                    loss = loss_fn(model(inputs), targets)
                else:
                    with observed:
                        loss = loss_fn(model(inputs), targets)
                kappa = layers_flatness(loss, [observed], settings).detach()
            total = total + kappa * len(targets)
            count += len(targets)
    finally:
        for module, training in modes.items():
            module.training = training
    if count == 0:
        raise ValueError("expected `loader` to yield at least one batch, got none.")
    return total / count


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):  # such as a tokenizer's input_ids and attention_mask
        return {name: _to(item, device) for name, item in batch.items()}
    return batch
