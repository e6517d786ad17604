"""The tail: the part of the autograd graph between the loss and a layer's outputs.

One walk from the loss finds, for all layers together and without touching a number, which of their calls the
loss depends on, which operations lie on the way, and whether one call feeds another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.graph import nodes
from fam_optim.graph.reach import above, parents_below
from fam_optim.graph.unseen import check_all_seen
from fam_optim.layer.kinds import parameter_use
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import Use, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import nn

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
        parents: of every node that was visited, those that are computed from it.
    """

    layer: nn.Module | Tensor
    loss: Tensor
    uses: tuple[Use, ...]
    edges: tuple[GradientEdge, ...]
    parents: Mapping[Node, Sequence[Node]] = field(repr=False)

    @property
    def ends(self) -> frozenset[Node]:
        """The nodes that compute the layer's outputs."""
        return frozenset(edge.node for edge in self.edges)

    @cached_property
    def path(self) -> frozenset[Node]:
        """Every node from which an output can be reached."""
        return above(self.ends, self.parents)

    @cached_property
    def nested(self) -> bool:
        """Whether an output of the layer feeds another call of it."""
        return len(self.edges) > 1 and not self.ends.isdisjoint(self.path)


def path_of(tails: Sequence[Tail]) -> frozenset[Node]:
    """The nodes of all tails of one loss."""
    return above({edge.node for tail in tails for edge in tail.edges}, tails[0].parents)


def find_tail(loss: Tensor, layer: Observation | Tensor) -> Tail:
    """The tail from `loss` to the outputs of `layer` (for a parameter: to the parameter itself).

    Raises:
        As `find_tails`.
    """
    (tail,) = find_tails(loss, [layer])
    assert tail is not None
    return tail


def find_tails(loss: Tensor, layers: Sequence[Observation | Tensor]) -> list[Tail | None]:
    """The tails from `loss` to the outputs of each layer; None where the loss does not depend on it.

    Cost: one walk over the graph, whatever the number of layers.

    Raises:
        ValueError: if the loss is not a scalar.
        LayerNotUsedError: if it depends on none of the layers.
        RuntimeError: if it is made of a derivative that was taken through one of them.
    """
    check_scalar(loss)
    parents, found = _walk(loss, layers)
    if not found:
        raise LayerNotUsedError(not_used(layers[0], parents))
    _check(parents, found)
    of_layers: list[list[_Found]] = [[] for _ in layers]
    for one in found:
        of_layers[one.number].append(one)
    check_all_seen(
        parents, [(layer, [f.use for f in of]) for layer, of in zip(layers, of_layers, strict=True)]
    )
    return [_tail(loss, *pair, parents) if pair[1] else None for pair in zip(layers, of_layers, strict=True)]


def _tail(
    loss: Tensor,
    layer: Observation | Tensor,
    found: Sequence[_Found],
    parents: Mapping[Node, Sequence[Node]],
) -> Tail:
    of = layer.module if isinstance(layer, Observation) else layer
    return Tail(of, loss, tuple(f.use for f in found), tuple(f.edge for f in found), parents)


class _Found(NamedTuple):
    """A use of a layer, by the layer's number, and where its output is made."""

    number: int
    use: Use
    edge: GradientEdge


def _walk(
    loss: Tensor, layers: Sequence[Observation | Tensor]
) -> tuple[dict[Node, list[Node]], list[_Found]]:
    """Walks the graph below `loss`: each node's parents, and what was found, in graph order."""
    observed = {id(layer.module): n for n, layer in enumerate(layers) if isinstance(layer, Observation)}
    parameters = {id(layer): n for n, layer in enumerate(layers) if isinstance(layer, Tensor)}
    parents = parents_below(loss)
    found = []
    for node in parents:
        record, leaf = recorded_use(node), nodes.leaf(node)
        if record is not None and id(record[0].module()) in observed and not record[0].is_released:
            found.append(_Found(observed[id(record[0].module())], *record))
        elif leaf is not None and id(leaf) in parameters:
            found.append(_Found(parameters[id(leaf)], parameter_use(leaf), GradientEdge(node, 0)))
    return parents, found


def check_scalar(loss: Tensor) -> None:
    """Raises TypeError, ValueError or LayerNotUsedError unless `loss` is a single number with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"expected `loss` to be a scalar tensor, got {type(loss).__name__}.")
    if loss.is_complex():
        raise TypeError(f"expected `loss` to be real, got {loss.dtype}. Take its .abs() or .real.")
    if loss.numel() != 1:
        raise ValueError(
            f"expected `loss` to be a scalar, got shape {tuple(loss.shape)}. Reduce it first, "
            "for example with .mean()."
        )
    if loss.grad_fn is None:
        raise LayerNotUsedError(
            "expected `loss` to depend on the layer, got one without a graph: it was computed under "
            "torch.no_grad() or inference_mode(), detached, or from nothing that requires gradients."
        )


def _check(parents: Mapping[Node, Sequence[Node]], found: Sequence[_Found]) -> None:
    """Raises RuntimeError if a record is out of date, or torch has the derivatives behind it wrong."""
    derivatives = [node for node in parents if nodes.is_derivative_of_layer_norm(node)]
    if derivatives and not above([one.edge.node for one in found], parents).isdisjoint(derivatives):
        raise RuntimeError(
            "`loss` contains a derivative through nn.LayerNorm, whose higher derivatives are wrong in torch "
            "(pytorch/pytorch#175754). Write that LayerNorm out in elementary operations."
        )
    for _, use, _ in found:
        use.check()


def not_used(layer: Observation | Tensor, graph: Collection[Node]) -> str:
    """Why the loss with this graph does not depend on a layer, for messages."""
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
