"""Finds the network's outputs o in which a loss is convex, and a root S of the loss's Hessian in them.

    L = sum_i a_i l(o_i, y_i),    a_i Hess_o l(o_i, y_i) = S_i S_i^T

    softmax cross-entropy, logsumexp      S r = sqrt(a) (sqrt(p) r - p <sqrt(p), r>)
    binary cross-entropy, softplus        S   = diag sqrt(a p (1 - p))
    squared error, Huber up to its delta  S   = sqrt(2 a)

The graph must show that a loss is a sum of these, or of the largest of them: between it and them there are
only operations that are linear, or pick. Any other loss ends in an error.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim import unnoticed
from fam_optim.graph import errors, nodes, operations
from fam_optim.graph.corrections import is_largest
from fam_optim.graph.reach import is_of_weights, spread
from fam_optim.layer.use import at_least_float32


def linear_in(
    loss: Tensor, path: Set[Node], ends: Set[Node], kinds: Set[str], *, of_weights: bool = True
) -> tuple[list[Node], Node | None]:
    """Returns the nodes of some kinds in whose results the loss is linear piece by piece, and one in which it
    is not, or None. Only what depends on `ends` counts; `path` leads from the loss to `ends`, included.
    Functions of weights alone, such as weight decay, count if `of_weights`."""
    found, unknown = _walked(loss, path, ends, kinds, of_weights, set())
    if unknown is None or not found:
        return found, unknown
    # What is linear in an operand of a known node, too, has no curvature: ``log(1 + exp(o)) - y o``.
    operands = {edge for node in found for edge in node.next_functions}
    return _walked(loss, path, ends, kinds, of_weights, operands)


def _walked(
    loss: Tensor, path: Set[Node], ends: Set[Node], kinds: Set[str], of_weights: bool, stops: Set[Any]
) -> tuple[list[Node], Node | None]:
    """Returns what `linear_in` does, from a walk down from the loss that enters none of the edges `stops`."""
    found: list[Node] = []
    unknown = None
    stack: list[Any] = [(loss.grad_fn, loss.output_nr)]
    seen = {*stack, *stops}
    while stack:
        node, output = stack.pop()
        kind = _kind(node)
        inputs: Any = nodes.inputs_of(node, output)
        on_path = [i for i, (below, _) in enumerate(inputs) if below in path]
        # Of what is not known, a function of one operand alone is sure to depend on no data.
        alone = kind in kinds or (len(inputs) == 1 and not nodes.hides(node))
        if kind not in kinds and node in ends:  # linear in z itself: no curvature
            continue
        if kind not in kinds and (operations.is_linear(kind, on_path) or kind in operations.PICKS):
            new = [edge for edge in dict.fromkeys(inputs) if edge[0] in path and edge not in seen]
            seen.update(new)
            stack += new
        elif not of_weights and alone and all(is_of_weights(inputs[i][0]) for i in on_path):
            continue
        elif kind in kinds:
            found.append(node)
        else:
            unknown = node
    return found, unknown


def _kind(node: Node) -> str:
    """Returns the kind of a node, "Pow" for a product of numbers with themselves."""
    kind = nodes.kind(node)
    return "Pow" if kind in ("Mul", "Dot") and _is_with_itself(node, operations.VIEWS) else kind


def _is_with_itself(node: Node, moved_by: Set[str]) -> bool:
    """Returns whether both factors of a product are the same numbers, perhaps moved by some kinds of node."""
    factors: list[Any] = list(node.next_functions)
    for i, (factor, _) in enumerate(factors):
        while factor is not None and nodes.kind(factor) in moved_by:
            factors[i] = factor.next_functions[0]
            factor = factors[i][0]
    return len(factors) == 2 and factors[0] == factors[1]


class Output(NamedTuple):
    """One output o in which the loss is convex."""

    edges: list[GradientEdge]  # where o is made; for the square of a difference, where its sides are made
    shape: torch.Size  # of o
    a: Tensor  # the weights of rows or of entries, none of which may be negative
    root: Callable[[Tensor], list[Tensor]]  # returns ``S r`` at each edge, for r in the shape of o


def find_outputs(
    loss: Tensor, path: Set[Node], ends: Set[Node], *, differentiable: bool, of_weights: bool = True
) -> list[Output]:
    """Returns the outputs in which the loss is convex, as far as it depends on some layers, with gradients if
    `differentiable`. Raises RuntimeError if it is not known to be convex in outputs. The other arguments are
    those of `linear_in`."""
    known, unknown = linear_in(loss, path, ends, _KINDS.keys(), of_weights=of_weights)
    with errors.explained("derivatives"):
        of_known = zip(known, coefficients(loss, known, differentiable), strict=True)
        found = [_KINDS[_kind(node)](node, c, path, differentiable) for node, c in of_known]
    outputs = [output for output in found if output is not None]
    unknown = known[found.index(None)] if None in found else unknown
    if unknown is not None:
        remedy = (
            "Compute the loss outside of what is compiled (in transformers' Trainer by compute_loss_func)."
            if nodes.is_compiled(unknown)
            else "Give regularize() the terms that are and add the others to what it returns, or use "
            "mode='hutchinson', curvature='hessian'."
        )
        raise RuntimeError(
            "Gauss-Newton curvature needs a loss that is known to be convex in the network's outputs: a sum "
            "of softmax cross-entropy, binary cross-entropy with logits, logsumexp, softplus, squared error "
            f"and Huber loss, none of them compiled. {unknown.name()} is none of these. {remedy}"
        )
    for a in (output.a.detach() for output in outputs):
        # Reading from an accelerator would wait for it: there the roots, and so kappa, become nan instead.
        if not unnoticed.reading_waits(a) and bool((a < -_rounding(a)).any()):
            raise RuntimeError(
                "Gauss-Newton curvature needs a loss convex in the network's outputs, and some sample or "
                "class counts with a negative weight. Use mode='hutchinson' with curvature='hessian'."
            )
    return outputs


def _rounding(weights: Tensor) -> Tensor:
    """Returns the rounding error that a sum of weights may have where they cancel."""
    return 16 * torch.finfo(weights.dtype).eps * weights.detach().abs().amax() if weights.numel() else weights


def pulled(
    outputs: Sequence[Output], r: Sequence[Tensor], to: Sequence[GradientEdge], *, differentiable: bool
) -> list[Tensor | None]:
    """Returns ``d<S r, o>/dt``, in at least float32, for what is made at each edge of `to`; None where no o
    depends on it. In float16 derivatives of ``S r`` get as much room below its largest entry as above it."""
    edges: Any = [edge for output in outputs for edge in output.edges]
    vectors = [v for output, signs in zip(outputs, r, strict=True) for v in output.root(signs)]
    dtypes = [nodes.results(edge.node)[edge.output_nr].dtype for edge in edges]
    scale = None
    if torch.float16 in dtypes:
        largest = torch.stack([v.detach().abs().max() for v in vectors]).max()
        scale = (-largest.clamp_min(2.0**-24).log2().ceil()).exp2()
        vectors = [scale * v for v in vectors]
    vectors = [v.to(dtype) for v, dtype in zip(vectors, dtypes, strict=True)]
    with errors.explained("derivatives"):
        found: Sequence[Tensor | None] = torch.autograd.grad(
            edges, to, vectors, create_graph=differentiable, retain_graph=True, allow_unused=True
        )
    precise = [None if g is None else at_least_float32(g) for g in found]
    return precise if scale is None else [None if g is None else g / scale for g in precise]


def coefficients(loss: Tensor, known: Sequence[Node], differentiable: bool) -> list[Tensor]:
    """Returns dL/d(result) of each of some nodes, in at least float32, without what passes others of them."""
    if not known:
        return []
    at = [GradientEdge(node, 0) for node in known]
    with nodes.not_passed(known):
        found = torch.autograd.grad(loss, at, create_graph=differentiable, retain_graph=True)
    return [at_least_float32(c) for c in found]


def _root_of(weights: Tensor) -> Tensor:
    """Returns the square root of weights, with derivative 0 at 0, so that a weight of 0 moves nothing. (A
    learned weight of exactly 0 learns nothing from kappa.) The root of a negative weight is nan."""
    counts = (weights > 0) | (weights < -_rounding(weights))
    return torch.where(counts, torch.where(counts, weights, 1).sqrt(), 0)


def softmax_of(node: Any, c: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Returns log p, in at least float32, and a of a cross-entropy ``sum_k c_k log p_k``: -a sums up c."""
    log_p = at_least_float32(nodes.kept(node, "result"))
    a = -c.sum(nodes.softmax_axis(node), keepdim=True)
    return log_p if differentiable else log_p.detach(), a


def _softmax(node: Any, c: Tensor, path: Set[Node], differentiable: bool) -> Output | None:
    """Returns o of a log_softmax, or of a logsumexp along one axis; None if it is of a distance."""
    if nodes.kind(node) == "LogSoftmax":
        (log_p, a), dim = softmax_of(node, c, differentiable), nodes.softmax_axis(node)
    else:
        o = at_least_float32(nodes.kept(node, "self"))
        dim, *others = nodes.axes(node, o.dim())
        if others or _measures_distance(node.next_functions[0][0], path):
            return None
        log_p = (o if differentiable else o.detach()).log_softmax(dim)
        a = c.reshape(log_p.select(dim, 0).unsqueeze(dim).shape)

    def root(r: Tensor) -> list[Tensor]:
        root_p, top = (log_p / 2).exp(), is_largest(log_p, dim)
        others = root_p.masked_fill(top, 0)  # squares sum to 1 - p of the largest p, also if it rounds to 1
        at_top = others.square().sum(dim, keepdim=True) * r - root_p * (others * r).sum(dim, keepdim=True)
        return [_root_of(a) * root_p * torch.where(top, at_top, r - root_p * (root_p * r).sum(dim, True))]

    return Output([GradientEdge(*node.next_functions[0])], log_p.shape, a, root)


def _diagonal(node: Any, a: Tensor, sides: Mapping[int, float]) -> Output:
    """Returns the output of a loss that is a sum over the entries of o, with second derivative `a` in each.
    `sides` maps the positions of the operands whose difference is o to their signs."""
    edges = [GradientEdge(*node.next_functions[i]) for i in sides]
    return Output(edges, a.shape, a, lambda r: [sign * _root_of(a) * r for sign in sides.values()])


def _binary(node: Any, c: Tensor, path: Set[Node], differentiable: bool) -> Output | None:
    """Returns o of ``w ((1 - y) o + (1 + (v - 1) y) log(1 + exp(-o)))``, with weights v of the positives;
    None if more than o depends on the layers."""
    if [i for i, (below, _) in enumerate(node.next_functions) if below in path] != [0]:
        return None
    names = ("self", "target", "weight", "pos_weight")
    logits, target, weight, of_positives = (nodes.kept(node, name) for name in names)
    b = _logistic_curvature(logits, differentiable)
    if of_positives is not None:
        b = b * (1 + (of_positives - 1) * target)
    b = b if weight is None else b * weight
    return _diagonal(node, b * c / (b.numel() if nodes.averages(node) else 1), {0: 1.0})


def _logistic_curvature(o: Tensor, differentiable: bool) -> Tensor:
    """Returns ``p (1 - p)``, p = sigmoid(o), which does not round to 0 where p rounds to 1."""
    o = at_least_float32(o if differentiable else o.detach())
    return o.sigmoid() * (-o).sigmoid()


def _softplus(node: Any, c: Tensor, path: Set[Node], differentiable: bool) -> Output | None:
    """Returns o of ``log(1 + exp(o))``, or of logsigmoid, minus that of -o; None if o measures a distance."""
    if _measures_distance(node.next_functions[0][0], path):
        return None
    o = nodes.kept(node, "self")
    if nodes.kind(node) == "LogSigmoid":
        return _diagonal(node, -c * _logistic_curvature(o, differentiable), {0: 1.0})
    beta, threshold = nodes.kept(node, "beta"), nodes.kept(node, "threshold")
    b = beta * _logistic_curvature(beta * o, differentiable)
    return _diagonal(node, c * b.masked_fill(beta * o > threshold, 0), {0: 1.0})


def _squared_error(node: Any, c: Tensor, path: Set[Node], differentiable: bool) -> Output | None:
    """Returns o of the square of an error or of an output, or of a Huber or smooth L1 loss, which is linear
    in large errors; None if o is a loss, a norm or a distance."""
    operands = node.next_functions[:1] if _kind(node) == "Pow" else node.next_functions
    sides = {i: (-1.0) ** i for i, (below, _) in enumerate(operands) if below in path}
    curvature = nodes.curvature_of_error(node)
    if curvature is None or any(_measures_distance(node.next_functions[i][0], path) for i in sides):
        return None
    shape = nodes.shape(*node.next_functions[min(sides)])
    b = curvature * c / (shape.numel() if nodes.averages(node) else 1)
    return _diagonal(node, b.expand(shape), sides)


def _measures_distance(node: Node, path: Set[Node]) -> bool:
    """Returns whether a node's result is a loss, a norm, a distance or a product of numbers with themselves,
    perhaps added to, scaled, moved, clipped, picked or put into a function. Its square is then no squared
    error of the network's outputs. (A product of such with a trained weight is an output.)"""

    def passed_on(node: Node) -> Set[Any]:
        kind, operands = nodes.kind(node), {below for below, _ in node.next_functions} - {None}
        on_path = [i for i, (below, _) in enumerate(node.next_functions) if below in path]
        by_weight = kind in operations.MATRIX_PRODUCTS and not operands <= path
        # Exp makes a probability of its logarithm.
        function = len(operands) == 1 and kind in operations.ELEMENTWISE and kind != "Exp"
        linear = operations.is_linear(kind, on_path) and not by_weight
        return operands & path if function or linear or kind in operations.PICKS else set()

    below = {node, *spread([node], passed_on)}
    kinds = set(map(nodes.kind, below))
    of_probability = "Log" in kinds and not kinds.isdisjoint(operations.PROBABILITIES)
    products = [n for n in below if nodes.kind(n) in operations.PRODUCTS]
    with_itself = any(_is_with_itself(n, operations.SAME_NUMBERS) for n in products)
    return with_itself or of_probability or not kinds.isdisjoint(operations.DISTANCES)


_KINDS = {
    "LogSoftmax": _softmax,
    "Logsumexp": _softmax,
    "BinaryCrossEntropyWithLogits": _binary,
    "LogSigmoid": _softplus,
    "Softplus": _softplus,
    "MseLoss": _squared_error,
    "SmoothL1Loss": _squared_error,
    "HuberLoss": _squared_error,
    "Pow": _squared_error,
}
