"""The tail: the part of the autograd graph between the loss and a layer's outputs.

One walk from the loss serves all layers and reads no tensor. It finds the calls that the loss depends on, the
operations on the way to them, and whether one call feeds another.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from fam_optim.graph import nodes
from fam_optim.graph.reach import LayerNotUsedError, above, check_scalar, parents_below
from fam_optim.graph.unseen import check_all_seen
from fam_optim.layer.kinds import parameter_use
from fam_optim.layer.record import Observation, recorded_use
from fam_optim.layer.use import Use, describe


@dataclass(frozen=True)
class Tail:
    """What lies between a loss and the outputs z of one layer."""

    layer: nn.Module | Tensor
    loss: Tensor
    parents: Mapping[Node, Sequence[Node]] = field(repr=False)  # for each node of the graph, the nodes above
    uses: tuple[Use, ...]  # the layer's uses that the loss depends on
    edges: tuple[GradientEdge, ...]  # where to differentiate with respect to the outputs of the uses

    def detached(self) -> "Tail":
        """Returns this tail with constant inputs of the layer's calls."""
        return replace(self, uses=tuple(use.detached() for use in self.uses))

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


def find_tails(loss: Tensor, layers: Sequence[Observation | Tensor]) -> dict[int, Tail]:
    """Returns the tails to the outputs of those layers that `loss` depends on, by the layers' numbers. A
    single walk finds all tails. The tail of a parameter ends at the parameter itself. Raises
    LayerNotUsedError if the loss depends on none of the layers, and RuntimeError if a record is out of date,
    if the loss depends on calls that were not recorded, or if it is made of a derivative that was taken
    through a layer, or through nn.LayerNorm behind one."""
    check_scalar(loss)
    parents = parents_below(loss)
    parts = [layer.module if isinstance(layer, Observation) else layer for layer in layers]
    tails = {
        number: Tail(parts[number], loss, parents, *zip(*uses, strict=True))
        for number, uses in enumerate(uses_in(parents, layers))
        if uses
    }
    if not tails:
        raise LayerNotUsedError(not_used(parts[0], parents))
    derivatives = [node for node in parents if nodes.kind(node) == "NativeLayerNormBackward"]
    if derivatives and not path_of(list(tails.values())).isdisjoint(derivatives):
        raise RuntimeError(
            "`loss` contains a derivative through nn.LayerNorm, whose higher derivatives are wrong in torch "
            "(pytorch/pytorch#175754). Write that LayerNorm out in elementary operations."
        )
    uses = [tails[number].uses if number in tails else () for number in range(len(layers))]
    for use in chain(*uses):
        use.check()
    check_all_seen(parents, layers, uses)
    return tails


def uses_in(graph: Collection[Node], layers: Sequence[Observation | Tensor]) -> list[Any]:
    """Returns each layer's uses in a graph, in its order, as pairs of a `Use` and the edge of its output."""
    uses: dict[int, list[tuple[Use, GradientEdge]]] = {id(getattr(one, "module", one)): [] for one in layers}
    for node in graph:
        record, leaf = recorded_use(node), nodes.leaf(node)
        if record is not None and id(record[0].module()) in uses:
            uses[id(record[0].module())].append(record)
        elif leaf is not None and id(leaf) in uses:
            uses[id(leaf)].append((parameter_use(leaf), GradientEdge(node, 0)))
    return list(uses.values())


def not_used(layer: nn.Module | Tensor, graph: Collection[Node]) -> str:
    """Returns the message that says why the loss with this graph does not depend on a layer."""
    if any(map(nodes.is_reentrant_checkpoint, graph)):
        return (
            f"`loss` does not depend on `layer` {describe(layer)} outside reentrant checkpoints, and what is "
            "in one is not in the graph. Checkpoint with use_reentrant=False, or leave the layer out of it."
        )
    if isinstance(layer, Tensor):
        frozen = "" if layer.requires_grad else " It does not require gradients: call requires_grad_() first."
        return f"`loss` does not depend on `layer`, a {describe(layer)}.{frozen}"
    text = f"`loss` does not depend on an observed call of `layer` {describe(layer)}"
    weight = layer._parameters.get("weight")
    if weight is not None and any(nodes.leaf(node) is weight for node in graph):
        text += (
            ", although on its weight (if its owner uses that itself, as nn.MultiheadAttention its "
            "out_proj.weight or SwinV2 its qkv.weight, pass it, an nn.Parameter, with mode='hutchinson')"
        )
    text += (
        ". Call the layer, as a module, in the forward that made the loss, after FAM was built or inside "
        "`with observe(layer)`, and before the loss's backward."
    )
    if any(map(nodes.is_compiled, graph)):
        text += (
            " A model that ran compiled before does not call the hook that observes the layer: call "
            "torch.compiler.reset() after building FAM; with observe(), run compiled._orig_mod."
        )
    return text
