"""The tail: the part of the autograd graph between the loss and a layer's outputs.

Walking it from the loss answers three questions without touching a number: which calls of the layer
this loss depends on, which operations lie on the way, and whether one call feeds another.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.layer import Use, describe, parameter_use
from fam_optim.observation import Observation, recorded_use

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fam_optim.layer import LayerUse


class LayerNotUsedError(RuntimeError):
    """The loss does not depend on the layer."""


@dataclass(frozen=True)
class Tail:
    """What lies between a loss and the outputs z of one layer.

    Attributes:
        loss: the scalar.
        uses: the layer's uses that the loss depends on.
        edges: where to differentiate with respect to their outputs, in the same order.
        path: every node from which an output can be reached, the loss's first.
        nested: whether an output of the layer feeds another call of it.
    """

    loss: Tensor
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    path: tuple[Node, ...]
    nested: bool

    @property
    def ends(self) -> frozenset[Node]:
        """The nodes that compute the layer's outputs."""
        return frozenset(edge.node for edge in self.edges)


def find_tail(loss: Tensor, layer: Observation | Tensor) -> Tail:
    """The tail from `loss` to the outputs of `layer` (for a parameter: to the parameter itself).

    Raises:
        ValueError: if the loss is not a scalar.
        LayerNotUsedError: if it does not depend on the layer.
    """
    _check_scalar(loss)
    if isinstance(layer, Observation):
        live = layer.live_uses()
        parents, found = _walk(loss, lambda node: _observed(node, live), stop=len(live) <= 1)
    else:
        use = parameter_use(layer)
        parents, found = _walk(loss, lambda node: _accumulator(node, layer, use), stop=True)
    if not found:
        raise LayerNotUsedError(_not_used(layer))
    for use, _ in found:
        use.check()
    ends = [edge.node for _, edge in found]
    return Tail(
        loss=loss,
        uses=tuple(use for use, _ in found),
        edges=tuple(edge for _, edge in found),
        path=tuple(_above(ends, parents)),
        nested=len(ends) > 1 and any(set(_above([end], parents)) & (set(ends) - {end}) for end in ends),
    )


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


def _observed(node: Node, live: set[LayerUse]) -> tuple[Use, GradientEdge] | None:
    match = recorded_use(node)
    return match if match is not None and match[0] in live else None


def _accumulator(node: Node, parameter: Tensor, use: Use) -> tuple[Use, GradientEdge] | None:
    if getattr(node, "variable", None) is parameter:
        return use, GradientEdge(node, 0)
    return None


def _check_scalar(loss: Tensor) -> None:
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


def _not_used(layer: Observation | Tensor) -> str:
    if isinstance(layer, Observation):
        return (
            f"`loss` does not depend on an observed call of `layer` {describe(layer.module)}. Expected the "
            "layer to be called, as a module, in the forward that made the loss, after FAM was built or "
            "inside `with observe(layer)`, and the loss not to have been backpropagated and stepped "
            "already. (nn.MultiheadAttention never calls its out_proj: pass out_proj.weight, an "
            "nn.Parameter, with mode='hutchinson'.)"
        )
    frozen = "" if layer.requires_grad else " It does not require gradients: call requires_grad_() first."
    return f"`loss` does not depend on `layer`, a {describe(layer)}.{frozen}"
