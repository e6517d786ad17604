"""kappa has a closed form where the layer feeds a softmax cross-entropy.

Let L be linear in the log-probabilities of the layer's rows, ``L = sum_i sum_k c_ik log p_ik``. With
``a_i = -sum_k c_ik`` (1/N, a class weight, 0 where a target is ignored; smoothing changes nothing)

    Hess_{z_i}(L) = a_i (diag p_i - p_i p_i^T)
    <F F^T, T>    = sum_i a_i ||phi_i||^2 <F F^T, diag p_i - p_i p_i^T>

For F = W this is the squared feature norm times the variance of the class vectors under p. If the softmax is
taken of ``y_j = c_j z_i(j) + const`` (shifted tokens, a temperature, a prior on the classes), row j counts
with ``c_j^2 ||phi_i(j)||^2``.

The graph shows whether the closed form applies. Between the loss and log_softmax there must be only
operations that are linear in log_softmax. Between log_softmax and the layer's output there must be only
operations that move, scale or shift rows. Everything else is left to the general way.
"""

import math
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.estimators.measure import Factor
from fam_optim.graph import errors, nodes, operations
from fam_optim.graph.losses import coefficients, linear_in, softmax_of
from fam_optim.graph.trace import Tail
from fam_optim.layer.use import LayerUse, Use, at_least_float32

_KINDS = operations.MOVES | operations.ADDITIONS | {"Mul", "Div", "Gather"}


def closed_form(tail: Tail, factor: Factor, *, differentiable: bool) -> Tensor | None:
    """Returns ``<F F^T, T>``, twice differentiable, or None if the layer feeds no softmax cross-entropy.
    Cost: for the neuronwise measure one product ``(rows, d) x (d, m)``, and two in the backward. The largest
    tensors have the size of the logits; there is no (rows, d, d) and no (d, d) tensor."""
    ends = {edge.node: (use, edge) for use, edge in zip(tail.uses, tail.edges, strict=True)}
    path = tail.path | tail.ends
    softmaxes, unknown = linear_in(tail.loss, path, set(ends), {"LogSoftmax"})
    if tail.nested or unknown is not None:
        return None
    with errors.explained("derivatives"):
        of_softmaxes = coefficients(tail.loss, softmaxes, differentiable)
    values = []
    for node, c in zip(softmaxes, of_softmaxes, strict=True):
        found = _followed(*node.next_functions[0], path, ends)
        if found is None:
            return None
        use, edge, stride, in_order = found
        shape, dim = nodes.shape(node, 0), nodes.softmax_axis(node)
        if shape[dim] != use.d or operations.axis_of_digit(shape, stride, use.d) != (dim, 1):
            return None
        log_p, a = softmax_of(node, c, differentiable)
        norms = use.squared_norms() if in_order else _norms_at_softmax(use, edge, node)
        a = a.flatten() * norms.flatten()
        log_p = log_p.movedim(dim, -1).reshape(-1, use.d)
        values.append(factor.variance(log_p, a if differentiable else a.detach()))
    return sum(values[1:], values[0]) if values else None


def _norms_at_softmax(use: LayerUse, at: GradientEdge, softmax: Any) -> Tensor:
    """Takes the squared norm of each row of z (of edge `at`) to the row's place at the softmax, times
    the square of its factor. The Jacobian in between moves numbers and multiplies by the factor once."""
    at_z = use.squared_norms().unsqueeze(use.channel).expand(use.shape)
    edge = GradientEdge(*softmax.next_functions[0])
    made = nodes.results(edge.node)[edge.output_nr]
    with torch.enable_grad():
        zeros = at_z.new_zeros(tuple(made.shape), requires_grad=True)
        (back,) = torch.autograd.grad(edge, at, zeros.to(made.dtype), create_graph=True, retain_graph=True)
        back = at_least_float32(back).reshape(use.shape)
        moved, factor = (
            torch.autograd.grad(back, zeros, by_row.to(back.dtype), create_graph=True)[0]
            for by_row in (at_z, torch.ones_like(at_z))
        )
    return at_least_float32(moved * factor).select(nodes.softmax_axis(softmax), 0)


def _followed(
    node: Any, output: int, path: Set[Node], ends: Mapping[Node, tuple[Use, GradientEdge]]
) -> tuple[LayerUse, GradientEdge, int, bool] | None:
    """Finds the use whose z a result is made of, row by row: all d outputs of a row times one number. Returns
    the use and its edge, the stride of the outputs in the result (`operations.moved`), and whether rows and
    outputs are where z has them; None if the result is made in any other way."""
    if node in ends:
        use, edge = ends[node]
        if not (isinstance(use, LayerUse) and use.has_rows):
            return None
        behind = use.shape[use.channel % len(use.shape) + 1 :]
        return use, edge, math.prod(behind), not behind
    kind = nodes.kind(node)
    inputs: Any = nodes.inputs_of(node, output)
    on_path = [i for i, (operand, _) in enumerate(inputs) if operand in path]
    if len(on_path) != 1 or kind not in _KINDS:
        return None
    (position,) = on_path
    below, its_output = inputs[position]
    found = _followed(below, its_output, path, ends)
    if found is None or (kind in ("Mul", "Div") and not nodes.by_one_number(node, position)):
        return None
    use, edge, stride, in_order = found
    shapes = nodes.shape(below, its_output), nodes.shape(node, output)
    to = operations.moved(node, kind, position, *shapes, stride, use.d)
    along = None if to is None else operations.axis_of_digit(shapes[1], to, use.d)
    if to is None or (kind == "Gather" and (along is None or not nodes.by_one_index(node, along[0]))):
        return None
    return use, edge, to, in_order and kind in operations.VIEWS
