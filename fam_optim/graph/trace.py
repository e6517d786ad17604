"""The tail: the part of the autograd graph between the loss and a layer's outputs.

Walking it from the loss answers three questions without touching a number: which calls of the layer
this loss depends on, which operations lie on the way, and whether one call feeds another.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fam_optim.graph import nodes
from fam_optim.layer.kinds import parameter_use
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import Use, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import nn

    from fam_optim.layer.use import LayerUse


_COMPILED = (
    " A model that ran compiled before does not call the hook that observes the layer: call "
    "torch.compiler.reset() after building FAM; with observe(), run the uncompiled model "
    "(compiled._orig_mod), which shares its weights."
)


class LayerNotUsedError(RuntimeError):
    """The loss does not depend on the layer."""


@dataclass(frozen=True)
class Tail:
    """What lies between a loss and the outputs z of one layer.

    Attributes:
        layer: the module, or the parameter.
        loss: the scalar.
        uses: the layer's uses that the loss depends on.
        edges: where to differentiate with respect to their outputs, in the same order.
        path: every node from which an output can be reached, the loss's first.
        nested: whether an output of the layer feeds another call of it.
    """

    layer: nn.Module | Tensor
    loss: Tensor
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    path: tuple[Node, ...]
    nested: bool

    @property
    def ends(self) -> frozenset[Node]:
        """The nodes that compute the layer's outputs."""
        return frozenset(edge.node for edge in self.edges)

    @property
    def inputs(self) -> list[GradientEdge]:
        """Where anything enters the path: the layer's outputs, parameters, branches from elsewhere."""
        path = set(self.path)
        below = dict.fromkeys(edge for node in self.path for edge in node.next_functions)
        return [GradientEdge(node, output) for node, output in below if node is not None and node not in path]


def find_tail(loss: Tensor, layer: Observation | Tensor) -> Tail:
    """The tail from `loss` to the outputs of `layer` (for a parameter: to the parameter itself).

    Raises:
        ValueError: if the loss is not a scalar.
        LayerNotUsedError: if it does not depend on the layer.
        RuntimeError: if it contains a derivative (a gradient penalty) of something that torch or we cannot
            differentiate further.
    """
    check_scalar(loss)
    if isinstance(layer, Observation):
        live = layer.live_uses()
        parents, found = _walk(loss, lambda node: _observed(node, live), stop=len(live) <= 1)
    else:
        use = parameter_use(layer)
        parents, found = _walk(loss, lambda node: _accumulator(node, layer, use), stop=True)
    if not found:
        raise LayerNotUsedError(_not_used(layer, parents))
    for use, _ in found:
        use.check()
    ends = [edge.node for _, edge in found]
    tail = Tail(
        layer=layer.module if isinstance(layer, Observation) else layer,
        loss=loss,
        uses=tuple(use for use, _ in found),
        edges=tuple(edge for _, edge in found),
        path=tuple(_above(ends, parents)),
        nested=len(ends) > 1 and any(set(_above([end], parents)) & (set(ends) - {end}) for end in ends),
    )
    if _contains_derivatives(tail) and isinstance(layer, Observation):
        return _weight_tail(tail, layer) or tail
    return tail


def _walk(
    loss: Tensor, look: Callable[[Node], tuple[Use, GradientEdge] | None], *, stop: bool
) -> tuple[dict[Node, list[Node]], list[tuple[Use, GradientEdge]]]:
    """Walks the graph below `loss`: each node's parents, and what `look` found, in graph order.

    With `stop`, nothing below a found node is visited: the common case of a layer called once, where
    the walk sees a handful of nodes however deep the network.
    """
    root = loss.grad_fn
    assert root is not None
    parents: dict[Node, list[Node]] = {root: []}
    found = []
    queue = deque([root])
    while queue:
        node = queue.popleft()
        match = look(node)
        if match is not None:
            found.append(match)
            if stop:
                continue
        for below, _ in node.next_functions:
            if below is not None:
                if below not in parents:
                    parents[below] = []
                    queue.append(below)
                parents[below].append(node)
    return parents, found


def _above(ends: Iterable[Node], parents: dict[Node, list[Node]]) -> list[Node]:
    """The nodes from which one of `ends` can be reached, without `ends` unless reached from there."""
    seen: dict[Node, None] = {}
    stack = list(ends)
    while stack:
        for above in parents[stack.pop()]:
            if above not in seen:
                seen[above] = None
                stack.append(above)
    return list(seen)


def _observed(node: Node, live: Collection[LayerUse]) -> tuple[Use, GradientEdge] | None:
    match = recorded_use(node)
    return match if match is not None and match[0] in live else None


def _accumulator(node: Node, parameter: Tensor, use: Use) -> tuple[Use, GradientEdge] | None:
    if nodes.leaf(node) is parameter:
        return use, GradientEdge(node, 0)
    return None


def check_scalar(loss: Tensor) -> None:
    """Raises TypeError, ValueError or LayerNotUsedError unless `loss` is a single number with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected `loss` to be a scalar tensor, got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(
            f"expected `loss` to be a scalar, got shape {tuple(loss.shape)}. Reduce it first, "
            "for example with .mean()."
        )
    if loss.grad_fn is None:
        raise LayerNotUsedError(
            "expected `loss` to depend on the layer, got one without a graph: it was computed under "
            "torch.no_grad(), detached, or from nothing that requires gradients."
        )


def _contains_derivatives(tail: Tail) -> bool:
    """Whether the loss is made of derivatives too (a gradient penalty): they show as backwards of backwards.

    Raises:
        RuntimeError: if these are derivatives of LayerNorm.
    """
    backwards = [node.name() for node in tail.path if nodes.is_derivative(node)]
    if any(name.startswith("NativeLayerNormBackwardBackward") for name in backwards):
        raise RuntimeError(
            "`loss` contains a derivative through nn.LayerNorm, whose higher derivatives are wrong in torch "
            "(pytorch/pytorch#175754). Write that LayerNorm out in elementary operations."
        )
    return bool(backwards)


def _weight_tail(tail: Tail, layer: Observation) -> Tail | None:
    """The tail down to the weight itself, if the loss depends on it beside the layer's outputs; or None.

    A derivative taken behind the layer is a function of z like any other. One taken through the layer
    multiplies with W, beside ``z = lin(phi; W)``, and only the weight sees both. (It also sees its uses
    elsewhere, if it is tied.)
    """
    weight = tail.uses[0].weight
    if not weight.requires_grad or any(use.weight is not weight for use in tail.uses):
        raise RuntimeError(
            f"`loss` contains a derivative (a gradient penalty), through which the weight of `layer` "
            f"{describe(layer.module)} cannot be followed: it is frozen, or computed at every call. Call "
            "requires_grad_() on a frozen weight and leave it out of the optimizer's parameters; make calls "
            "with a computed one within torch.nn.utils.parametrize.cached()."
        )
    live, edge, use = layer.live_uses(), get_gradient_edge(weight), Use(weight)
    beside, _ = _walk(tail.loss, lambda node: _observed(node, live), stop=True)
    if edge.node not in beside:
        return None
    if tail.uses[0].matrix().shape != use.matrix().shape:
        raise RuntimeError(
            f"`loss` contains a derivative (a gradient penalty) through `layer` {describe(layer.module)}, "
            "which kappa does not support for transposed convolutions."
        )
    parents, _ = _walk(tail.loss, lambda node: (use, edge) if node is edge.node else None, stop=True)
    return Tail(layer.module, tail.loss, (use,), (edge,), tuple(_above([edge.node], parents)), nested=False)


def _not_used(layer: Observation | Tensor, graph: Collection[Node]) -> str:
    if any(map(nodes.is_reentrant_checkpoint, graph)):
        of = layer.module if isinstance(layer, Observation) else layer
        return (
            f"`loss` does not depend on `layer` {describe(of)} outside reentrant activation checkpoints, and "
            "what happens in one is not in the graph. Checkpoint with use_reentrant=False, or leave the "
            "layer out of the checkpoint."
        )
    if isinstance(layer, Observation):
        weight = layer.module._parameters.get("weight")
        used = weight is not None and any(nodes.leaf(node) is weight for node in graph)
        otherwise = (
            ", although on its weight. If its owner uses the weight itself (nn.MultiheadAttention its "
            "out_proj.weight, SwinV2 its qkv.weight), pass that weight, an nn.Parameter, as `layer` with "
            "mode='hutchinson'. Otherwise expected"
        )
        return (
            f"`loss` does not depend on an observed call of `layer` {describe(layer.module)}"
            f"{otherwise if used else '. Expected'} the layer to be called, as a module, in the forward that "
            "made the loss, after FAM was built or inside `with observe(layer)`, and the loss not to have "
            "been backpropagated and stepped already."
            + (_COMPILED if any(map(nodes.is_compiled, graph)) else "")
        )
    frozen = "" if layer.requires_grad else " It does not require gradients: call requires_grad_() first."
    return f"`loss` does not depend on `layer`, a {describe(layer)}.{frozen}"
