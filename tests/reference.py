"""kappa by nested loops over its definition: the slow twin that is kept forever.

    kappa      = sum_{s,u} <w_s, w_u> Tr(H_{s,u})      "neuronwise"
    kappa_hat  = ||W||_F^2 Tr(H)                       "layerwise"

H is the Hessian of the loss in the weight that the layer's own calls use: the forward runs with a
fresh copy of it in those calls, and in no other place that may hold the same tensor (tied weights).
A bare parameter is its own copy, so every use of it counts. Imports torch only.

Gradients have two oracles. `gradient` differentiates the brute-force value once more and is exact
where torch's own derivatives are. `directional_derivative` needs none: finite differences of the
value. The first is checked against the second for every case.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Loss = Callable[[], Tensor]
    Layer = nn.Module | nn.Parameter

MEASURES = ("neuronwise", "layerwise")


class Curvature(NamedTuple):
    """One layer's weight and Hessian as the definition has them."""

    weight: Tensor  # (d, m)
    hessian: Tensor  # (d, m, d, m)


def brute_force_hessian(loss: Tensor, weight: Tensor, create_graph: bool = False) -> Tensor:
    """Hessian of `loss` in `weight`, row by row: (numel, numel)."""
    (gradient,) = torch.autograd.grad(
        loss, weight, create_graph=True, allow_unused=True, materialize_grads=True
    )
    rows = []
    for entry in gradient.flatten():
        if not entry.requires_grad:  # a loss linear in the weight
            rows.append(torch.zeros_like(weight).flatten())
            continue
        (row,) = torch.autograd.grad(
            entry,
            weight,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        rows.append(row.flatten())
    return torch.stack(rows)


def brute_force_gauss_newton(loss: Tensor, outputs: Tensor, weight: Tensor) -> Tensor:
    """``J^T B J``, differentiable: (numel, numel).

    J is the derivative of every output in every weight, row by row, B the Hessian of `loss` in the outputs.
    """
    jacobian = [
        torch.autograd.grad(o, weight, create_graph=True, allow_unused=True, materialize_grads=True)[0]
        for o in outputs.flatten()
    ]
    j = torch.stack([row.flatten() for row in jacobian])
    return j.T @ brute_force_hessian(loss, outputs, create_graph=True) @ j


def curvatures(
    loss: Loss,
    layers: Sequence[Layer],
    create_graph: bool = False,
    outputs: Callable[[], Tensor] | None = None,
) -> list[Curvature]:
    """Runs the forward and returns every layer's weight matrix (attached) and Hessian.

    Args:
        loss: runs the forward and returns the loss. It must find the same randomness and buffers
            whenever it is called.
        layers: modules, whose own calls count, or parameters, whose every use counts.
        create_graph: keep the Hessian differentiable.
        outputs: what the network put out in this forward: the Gauss-Newton part of the Hessian instead.
    """
    with primitive_layer_norm(), own_calls_only([la for la in layers if isinstance(la, nn.Module)]) as used:
        value = loss()
    result = []
    for layer in layers:
        weight = layer if isinstance(layer, nn.Parameter) else used[layer]
        if outputs is None:
            flat = brute_force_hessian(value, weight, create_graph)
        else:
            flat = brute_force_gauss_newton(value, outputs(), weight)
        neurons = torch.tensor(entries_by_neuron(layer, weight.shape), device=weight.device)
        result.append(Curvature(weight.flatten()[neurons], flat[neurons][:, :, neurons]))
    return result


def kappa(weight: Tensor, hessian: Tensor, measure: str) -> Tensor:
    """The definition, term by term."""
    d, m = weight.shape
    total = weight.new_zeros(())
    if measure == "neuronwise":
        for s in range(d):
            for u in range(d):
                trace = sum(hessian[s, t, u, t] for t in range(m))
                total = total + (weight[s] * weight[u]).sum() * trace
    elif measure == "layerwise":
        trace = sum(hessian[s, t, s, t] for s in range(d) for t in range(m))
        total = sum(weight[s, t] * weight[s, t] for s in range(d) for t in range(m)) * trace
    else:
        raise ValueError(f"unknown measure {measure!r}")
    return total


def sum_of_kappas(layers: Sequence[Curvature], measure: str, normalize: bool = False) -> Tensor:
    """Several layers' kappas add up; `normalize` divides each by its layer's m."""
    values = []
    for weight, hessian in layers:
        value = kappa(weight, hessian, measure)
        values.append(value / weight.shape[1] if normalize else value)
    return torch.stack(values).sum()


def part_one(layers: Sequence[Curvature], measure: str) -> list[Tensor]:
    """Part (I) of Lemma 1, written out, per layer: ``2 T W``, or ``2 W Tr(H)``, in W (d, m)."""
    parts = []
    for weight, hessian in layers:
        d, m = weight.shape
        traces = weight.new_zeros(d, d)
        for s in range(d):
            for u in range(d):
                traces[s, u] = sum(hessian[s, t, u, t] for t in range(m)).detach()
        factor = traces if measure == "neuronwise" else traces.trace() * torch.eye(d).to(traces)
        parts.append(2 * factor @ weight.detach())
    return parts


def gradient(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """d value / d parameters; zeros where there is no dependence at all."""
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(
        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    )


def directional_derivative(
    value: Callable[[], float], parameters: Sequence[Tensor], direction: Sequence[Tensor], step: float
) -> tuple[float, float]:
    """Derivative of `value` along `direction` at `parameters`, and the error to be expected of it.

    Central differences at four distances, extrapolated twice (Richardson): order six.
    """

    def at(t: float) -> float:
        with moved(parameters, direction, t):
            return value()

    def slope(h: float) -> float:
        return (at(h) - at(-h)) / (2 * h)

    coarse, middle, fine = slope(step), slope(step / 2), slope(step / 4)
    fourth = (4 * middle - coarse) / 3, (4 * fine - middle) / 3
    sixth = (16 * fourth[1] - fourth[0]) / 15
    return sixth, abs(sixth - fourth[1])


@contextmanager
def moved(parameters: Sequence[Tensor], direction: Sequence[Tensor], t: float) -> Iterator[None]:
    """`parameters` at a distance `t` along `direction`, restored bit for bit afterwards."""
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=t)
        yield
    finally:
        with torch.no_grad():
            for p, b in zip(parameters, before, strict=True):
                p.copy_(b)


def entries_by_neuron(layer: Layer, shape: torch.Size) -> list[list[int]]:
    """For every output neuron s, where w_s stands in the flat weight: row s of W.

    Transposed convolutions store (in, out / groups, *kernel): an output channel collects one filter
    from every input channel of its group.
    """
    per_row = shape[1:].numel()
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return [[s * per_row + t for t in range(per_row)] for s in range(shape[0])]
    kernel = shape[2:].numel()
    outs, ins = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    neurons = []
    for s in range(layer.out_channels):
        group, j = divmod(s, outs)
        channels = range(group * ins, (group + 1) * ins)
        neurons.append([(i * outs + j) * kernel + k for i in channels for k in range(kernel)])
    return neurons


def apply(module: nn.Module, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
    """`module`'s operation with another weight."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, module.bias)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module._conv_forward(x, weight, module.bias)
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
    space = weight.dim() - 2
    geometry = module.stride, module.padding, module.kernel_size
    extra = module._output_padding(x, output_size, *geometry, space, module.dilation)
    rest = module.stride, module.padding, extra, module.groups, module.dilation
    return transposed[space](x, weight, module.bias, *rest)


@contextmanager
def own_calls_only(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The modules' calls use a fresh copy of their weight, one for all calls of a forward.

    The copy stays attached to the parameter, or to what it is computed from (weight_norm, LoRA). It is
    taken at the first call: reading a weight under spectral_norm advances its power iteration.
    """
    used: dict[nn.Module, Tensor] = {}

    def forward_of(module: nn.Module) -> Callable[..., Tensor]:
        def forward(input: Tensor, **kwargs: list[int]) -> Tensor:
            if module not in used:
                with torch.enable_grad():  # the first call may be made without gradient
                    copy = module.weight.clone()
                used[module] = copy if copy.requires_grad else copy.requires_grad_()
            return apply(module, input, used[module], **kwargs)

        return forward

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "forward", forward_of(module)))
        yield used


@contextmanager
def primitive_layer_norm() -> Iterator[None]:
    """LayerNorm from primitive operations: the fused one's third derivative is silently wrong, its double
    backward takes mean and rstd for constants (pytorch/pytorch#175754)."""

    def layer_norm(
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        dims = tuple(range(-len(normalized_shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    with patch.object(F, "layer_norm", layer_norm):
        yield


def gauss_newton_traces(outputs: Tensor, loss: Tensor, weight: Tensor, measure: str) -> Tensor:
    """``<F F^T, T>``, T[s,u] = Tr(G_{s,u}), of ``G = J^T B J`` in one weight, differentiable."""
    w = weight.flatten(1)
    return kappa(w, brute_force_gauss_newton(loss, outputs, weight).reshape(*w.shape, *w.shape), measure)


# ------------------------------------------------------------------------------- the proximal step


def trace_matrix(hessian: Tensor) -> Tensor:
    """T ``(d, d)``, ``T[s,u] = Tr(H_{s,u})``, of H ``(d, m, d, m)``."""
    d, m = hessian.shape[:2]
    return torch.stack(
        [torch.stack([sum(hessian[s, t, u, t] for t in range(m)) for u in range(d)]) for s in range(d)]
    )


def root_of_cross_entropy(logits: Tensor, signs: Tensor) -> Tensor:
    """``S r`` of the mean cross-entropy of rows, entry by entry: ``sqrt(a) (sqrt(p) r - p <sqrt(p), r>)``."""
    n, classes = logits.shape
    result = torch.zeros_like(logits)
    for i in range(n):
        p = logits[i].exp() / logits[i].exp().sum()
        along = sum(p[k].sqrt() * signs[i, k] for k in range(classes))
        for k in range(classes):
            result[i, k] = (p[k].sqrt() * signs[i, k] - p[k] * along) / n**0.5
    return result


def minimiser(weight: Tensor, trace: Tensor, c: Tensor) -> Tensor:
    """The V with the least ``<V V^T, T> + ||V - W||^2 / (2 c)``: where its derivative is zero."""
    d, m = weight.shape
    system, right = weight.new_zeros(d * m, d * m), weight.new_zeros(d * m)
    for s in range(d):
        for t in range(m):
            for u in range(d):
                system[s * m + t, u * m + t] += 2 * trace[s, u]
            system[s * m + t, s * m + t] += 1 / c
            right[s * m + t] = weight[s, t] / c
    return torch.linalg.solve(system, right).reshape(d, m)


def proximal(weight: Tensor, before: Tensor, trace: Tensor, lam: float, every: int) -> Tensor:
    """The proximal step from W, to which the base came from W', with its c written out."""
    pull = 2 * trace @ weight
    if not pull.any() or not (weight - before).any():
        return weight
    moved = (weight - before).square().sum().sqrt()
    return minimiser(weight, trace, lam * every * moved / pull.square().sum().sqrt())
