"""Measures relative flatness over a data set, for chosen layers or for all layers of a model by name."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fam_optim.flatness import Settings, check_mode, each_flatness
from fam_optim.graph.trace import find_tails
from fam_optim.layer.record import Observation
from fam_optim.layers import Layer, as_layers, device_of, named, named_weight_layers


def dataset_relative_flatness(
    model: nn.Module,
    layer: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[tuple[Any, Any]],
    *,
    measure: str = "neuronwise",
    mode: str = "exact",
    curvature: str = "hessian",
    normalize: bool = False,
    n_samples: int = 1,
    generator: torch.Generator | None = None,
    weight: Callable[[Any, Any], float] | None = None,
) -> Tensor:
    """Returns kappa of the mean loss over a data set, as a tensor without a graph.

    kappa is linear in the loss, so the result is the mean over the batches, weighted by their sizes. The
    model is in eval mode meanwhile (dropout off, BatchNorm uses its running statistics).

    Args:
        model: called on each batch's inputs.
        layer: a module, a parameter (not in mode exact with the Hessian), a name in the model, or a sequence.
        loss_fn: ``loss_fn(model(inputs), targets)`` must return the *mean* over the batch.
        loader: yields ``(inputs, targets)``: tensors, or dicts, lists or tuples of them; on any device.
        measure, mode, curvature, normalize, n_samples, generator: as in `relative_flatness`.
        weight: ``weight(inputs, targets)`` returns how many terms the batch's mean is over. The default is
            the number of samples, the length of the tensors in inputs. Give it if their lengths differ, or
            if the loss weighs samples (by class, say) or ignores some:
            ``lambda inputs, targets: (targets != -100).sum()`` counts the tokens of a cross-entropy that
            ignores -100. Batches of weight 0 are left out.

    Returns:
        ``()`` for one layer; ``(layers,)`` for a sequence. A batch that does not use a layer counts as 0.

    Raises:
        ValueError: if the loader yields no samples.
        RuntimeError: for the reasons that `relative_flatness` names.

    Cost: one forward per batch, and the cost of `relative_flatness` without a gradient.
    """
    # Only the value is needed: `detach_hessian`, here True, saves the graph of its derivative.
    settings = Settings(measure, mode, normalize, n_samples, generator, True, curvature)
    layers = as_layers(named(model, layer))
    values, _ = _over_batches(model, layers, loss_fn, loader, settings, weight or _samples)
    return values if isinstance(layer, (list, tuple)) else values[0]


class LayerFlatness(dict[str, float]):
    """A dict of kappa by the layer's name, as `layer_flatness` returns it. It prints as a table."""

    def __repr__(self) -> str:
        width = max((len(name) for name in self), default=0)
        return "\n".join(f"{name:<{width}}  {kappa:10.4g}" for name, kappa in self.items())


def layer_flatness(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    loader: Iterable[tuple[Any, Any]],
    *,
    measure: str = "neuronwise",
    normalize: bool = False,
    n_samples: int = 1,
    seed: int = 0,
    weight: Callable[[Any, Any], float] | None = None,
) -> LayerFlatness:
    """Returns kappa of every weight layer of a model over a data set, by name, to show which are flat.

    >>> print(layer_flatness(model, torch.nn.functional.cross_entropy, loader))

    It is an unbiased estimate of kappa with Gauss-Newton curvature, which is never negative. On last layers
    and in networks of piecewise linear functions (ReLU) this equals the Hessian's kappa.

    Args:
        model, loss_fn, loader: as in `dataset_relative_flatness`.
        measure, normalize: as in `relative_flatness`.
        n_samples: number of probes per batch.
        seed: seed of the probes; it is fixed by default, so that results of several calls can be compared.
        weight: as in `dataset_relative_flatness`.

    Returns:
        A dict of numbers by name, for the layers of `weight_layers` that the data set's loss depends on.

    Cost: for all layers together one forward per batch and about one backward per probe.
    """
    found = named_weight_layers(model)
    layers = as_layers(list(found.values()))
    generator = torch.Generator(device_of(layers)).manual_seed(seed)
    settings = Settings(measure, "hutchinson", normalize, n_samples, generator, True, "gauss_newton")
    values, used = _over_batches(model, layers, loss_fn, loader, settings, weight or _samples)
    kappas = zip(found, values.tolist(), strict=True)
    return LayerFlatness(pair for number, pair in enumerate(kappas) if number in used)


def _over_batches(
    model: nn.Module, layers: Sequence[Layer], loss_fn: Any, loader: Any, settings: Settings, weight: Any
) -> tuple[Tensor, set[int]]:
    """Returns the layers' kappas ``(layers,)``, and the numbers of the layers that some batch uses."""
    for layer in layers:
        check_mode(layer, settings)
    device = device_of(layers)
    total, count, used = torch.zeros(len(layers), device=device), 0.0, set[int]()
    with _observed_in_eval_mode(model, layers):
        for batch in loader:
            inputs, targets = _mapped(lambda t: t.to(device, non_blocking=True), _pair(batch))
            size = float(weight(inputs, targets))
            if not size >= 0:
                raise ValueError(f"expected `weight` to give a number that is at least 0, got {size}.")
            if size == 0:
                continue
            with torch.enable_grad():
                loss = loss_fn(model(inputs), targets)
            if isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
                raise ValueError(
                    f"expected `loss_fn` to be finite, got {loss.detach()}. Where all targets of a batch are "
                    "left out, a mean is nan: pass `weight`, which is 0 then, and the batch is left out."
                )
            tails = find_tails(loss, layers)
            for number, kappa in zip(tails, each_flatness(list(tails.values()), settings), strict=True):
                total = total.to(torch.promote_types(total.dtype, kappa.dtype))
                total[number] += kappa.detach() * size
            used.update(tails)
            count += size
    if count == 0:
        raise ValueError("expected `loader` to yield at least one batch of samples, got none.")
    return total / count, used


@contextmanager
def _observed_in_eval_mode(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Puts the model in eval mode and records its layers' calls; restores its state afterwards."""
    with ExitStack() as undoing:
        for module in model.modules():
            undoing.callback(setattr, module, "training", module.training)
        model.eval()
        for layer in layers:
            if isinstance(layer, Observation):
                undoing.enter_context(layer)
            elif not layer.requires_grad:  # else the graph would not show the parameter
                undoing.callback(layer.requires_grad_, False)
                layer.requires_grad_()
        yield


def _pair(batch: Any) -> tuple[Any, Any]:
    """Returns the inputs and targets of a batch; TypeError if it is no pair."""
    length = f" of length {len(batch)}" if isinstance(batch, (list, tuple)) else ""
    if length != " of length 2":
        raise TypeError(
            f"expected `loader` to yield pairs (inputs, targets), got a {type(batch).__name__}{length}. Pass "
            "a generator that makes them: ((batch['x'], batch['y']) for batch in loader)."
        )
    return batch[0], batch[1]


def _samples(inputs: Any, targets: Any) -> int:
    """Returns the common length of all tensors in a batch's inputs."""
    lengths = set[int]()
    _mapped(lambda t: lengths.update(t.shape[:1]), inputs)
    if len(lengths) != 1:
        raise TypeError(
            "expected the tensors in the batch's inputs to have one sample axis, by whose length the batch "
            f"is weighed, got {type(inputs).__name__} with the lengths {sorted(lengths)}. Pass weight=lambda "
            "inputs, targets: ..."
        )
    return lengths.pop()


def _mapped(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Returns a batch with a function applied to its tensors, also those in dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {name: _mapped(function, item) for name, item in batch.items()}
        # A tokenizer's BatchEncoding, say, is more than a dict, and stays what it is.
        mapped = copy.copy(batch) if isinstance(batch, MutableMapping) else {}
        mapped.update(items)
        return mapped
    if isinstance(batch, (list, tuple)):
        parts = [_mapped(function, item) for item in batch]
        if hasattr(batch, "_fields") and not hasattr(batch, "to"):  # a named tuple, but no PackedSequence
            return type(batch)(*parts)
        return type(batch)(parts) if type(batch) in (list, tuple) else batch
    return batch
