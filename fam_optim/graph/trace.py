"""The tail: the part of the autograd graph between the loss and a layer's outputs.

One walk from the loss serves all layers and reads no tensor. It finds the calls that the loss depends on, the
operations on the way to them, and whether one call feeds another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.graph import nodes
from fam_optim.graph.reach import LayerNotUsedError, above, check_scalar, parents_below
from fam_optim.graph.unseen import check_all_seen
from fam_optim.layer.kinds import parameter_use
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import Use, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import nn


@dataclass(frozen=True)
class Tail:
    """What lies between a loss and the outputs z of one layer."""

    layer: nn.Module | Tensor
    loss: Tensor
    uses: tuple[Use, ...]  # the layer's uses that the loss depends on
    edges: tuple[GradientEdge, ...]  # where to differentiate with respect to the outputs of the uses
    parents: Mapping[Node, Sequence[Node]] = field(repr=False)  # for each node of the graph, the nodes above

    @property
    def ends(self) -> frozenset[Node]:
        """The nodes that compute the layer's outputs."""
        return frozenset(edge.node for edge in self.edges)

    @cached_property
    def path(self) -> frozenset[Node]:
        """The nodes from which an output of the layer can be reached."""
        return above(self.ends, self.parents)

    @cached_property
    def nested(self) -> bool:
        """Whether an output of the layer feeds another call of it."""
        return len(self.edges) > 1 and not self.ends.isdisjoint(self.path)


def path_of(tails: Sequence[Tail]) -> frozenset[Node]:
    """Returns the nodes of all tails of one loss."""
    return above({edge.node for tail in tails for edge in tail.edges}, tails[0].parents)


def find_tails(loss: Tensor, layers: Sequence[Observation | Tensor]) -> list[Tail | None]:
    """Returns the tail from `loss` to each layer's outputs; None for a layer that it does not depend on.

    A single walk finds all tails. The tail of a parameter ends at the parameter itself.

    Raises:
        LayerNotUsedError: if the loss depends on none of the layers.
        RuntimeError: if a record is out of date, if the loss depends on calls that were not recorded, or if
            it is made of a derivative that was taken through a layer, or through nn.LayerNorm behind one.
    """
    check_scalar(loss)
    parents = parents_below(loss)
    parts = [layer.module if isinstance(layer, Observation) else layer for layer in layers]
    found = _uses(parents, parts)
    ends = [edge.node for of_layer in found for _, edge in of_layer]
    if not ends:
        raise LayerNotUsedError(not_used(parts[0], parents))
    derivatives = [node for node in parents if nodes.kind(node) == "NativeLayerNormBackward"]
    if derivatives and not above(ends, parents).isdisjoint(derivatives):
        raise RuntimeError(
            "`loss` contains a derivative through nn.LayerNorm, whose higher derivatives are wrong in torch "
            "(pytorch/pytorch#175754). Write that LayerNorm out in elementary operations."
        )
    uses = [tuple(use for use, _ in of_layer) for of_layer in found]
    for use in (use for of_layer in uses for use in of_layer):
        use.check()
    check_all_seen(parents, layers, uses)
    edges = [tuple(edge for _, edge in of_layer) for of_layer in found]
    of_layers = zip(parts, uses, edges, strict=True)
    return [Tail(part, loss, use, edge, parents) if use else None for part, use, edge in of_layers]


def _uses(
    parents: Collection[Node], layers: Sequence[nn.Module | Tensor]
) -> list[list[tuple[Use, GradientEdge]]]:
    """Returns each layer's uses in a graph, with the edges of their outputs, in the graph's order."""
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    uses: list[list[tuple[Use, GradientEdge]]] = [[] for _ in layers]
    for node in parents:
        record, leaf = recorded_use(node), nodes.leaf(node)
        if record is not None and not record[0].is_released and id(record[0].module()) in numbers:
            uses[numbers[id(record[0].module())]].append(record)
        elif leaf is not None and id(leaf) in numbers:
            uses[numbers[id(leaf)]].append((parameter_use(leaf), GradientEdge(node, 0)))
    return uses


def not_used(layer: nn.Module | Tensor, graph: Collection[Node]) -> str:
    """Returns the message that says why the loss with this graph does not depend on a layer."""
    if any(map(nodes.is_reentrant_checkpoint, graph)):
        return (
            f"`loss` does not depend on `layer` {describe(layer)} outside reentrant activation checkpoints, "
            "and what happens in one is not in the graph. Checkpoint with use_reentrant=False, or leave the "
            "layer out of the checkpoint."
        )
    if isinstance(layer, Tensor):
        frozen = "" if layer.requires_grad else " It does not require gradients: call requires_grad_() first."
        return f"`loss` does not depend on `layer`, a {describe(layer)}.{frozen}"
    weight = layer._parameters.get("weight")
    used = weight is not None and any(nodes.leaf(node) is weight for node in graph)
    text = (
        f"`loss` does not depend on an observed call of `layer` {describe(layer)}"
        f"{', although on its weight' if used else ''}. Call the layer, as a module, in the forward that "
        "made the loss, after FAM was built or inside `with observe(layer)`, and before the loss's backward."
    )
    if used:
        text += (
            " If its owner uses the weight itself (nn.MultiheadAttention its out_proj.weight, SwinV2 its "
            "qkv.weight), pass that weight, an nn.Parameter, as `layer` with mode='hutchinson'."
        )
    if any(map(nodes.is_compiled, graph)):
        text += (
            " A model that ran compiled before does not call the hook that observes the layer: call "
            "torch.compiler.reset() after building FAM; with observe(), run compiled._orig_mod."
        )
    return text
