"""What may be asked of a node of the autograd graph: all names of nodes and of their attributes, most of
them private to torch, stand here (test_torch_names.py says what each is needed for).

A node stands for one operation of the forward. Its *outputs* are the operation's results, its *inputs*
the nodes (with the number of their output) that made the operands.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.autograd.graph import Node

DDP_SINK = "_DDPSink"
"""An autograd.Function that passes on what a model wrapped in DDP returns."""

FSDP_POST_BACKWARD = "RegisterPostBackwardFunction"
"""An autograd.Function on the inputs of a module sharded by FSDP2."""


def kind(node: Node) -> str:
    """The operation, "Addmm" for AddmmBackward0. Of a user's autograd.Function "function NAME": it may
    be named as an operation of torch's is, and need not compute the same."""
    name = node.name()
    if is_function(node):
        name = name.removesuffix("Backward")
        return name if name == DDP_SINK else f"function {name}"
    return name.rstrip("0123456789").removesuffix("Backward")


def is_function(node: Node) -> bool:
    """Whether the node is of an autograd.Function written in Python."""
    return hasattr(type(node), "_forward_cls")


def shape(node: Node, output: int) -> torch.Size:
    """Of the operation's result."""
    return torch.Size(node._input_metadata[output].shape)


def results(node: Node) -> Sequence[Any]:
    """Shape, dtype and device of the operation's results."""
    described: Sequence[Any] = node._input_metadata
    return described


def inputs_of(node: Node, output: int) -> Sequence[tuple[Node | None, int]]:
    """What the node computes its `output` from: for DDP's sink, which has many, one of its inputs."""
    if node.name() != f"{DDP_SINK}Backward":
        return node.next_functions
    # The model may return other things than tensors: they count among outputs, not among next_functions.
    attached: Any = node
    rank = sum(attached.needs_input_grad[1 : 1 + output])
    return [edge for edge in node.next_functions if edge[0] is not None][rank : rank + 1]


def weight_of_convolution(node: Node) -> tuple[Node, int] | None:
    """What made the weight, if the node is a convolution whose weight has a derivative."""
    if kind(node) != "Convolution":
        return None
    below, output = node.next_functions[1]
    return None if below is None else (below, output)


def is_unscaled(node: Node) -> bool:
    """Whether a matrix product, with a bias or without, comes without a factor of its own."""
    return bool(getattr(node, "_saved_alpha", 1) == 1)


def first_factor(node: Node) -> torch.Tensor:
    """What an Addmm or Mm multiplies with its second factor, whose derivative needs it."""
    name = "_saved_mat1" if kind(node) == "Addmm" else "_saved_self"
    factor: torch.Tensor = getattr(node, name)
    return factor


def metadata(node: Node) -> dict[str, Any]:
    """What Python may attach to a graph node: it lives as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property that torch declares as a method


def leaf(node: Node) -> torch.Tensor | None:
    """The leaf whose gradient the node accumulates, if it does that."""
    return getattr(node, "variable", None)


def settings(node: Node) -> tuple[tuple[str, Any], ...]:
    """What the node keeps of its operation beside tensors: axes, sizes, modes."""
    return tuple((name, getattr(node, name)) for name in _settings_of(type(node)))


@cache
def _settings_of(kind_of_node: type) -> tuple[str, ...]:
    # Tensors are left alone, since unpacking one may recompute a checkpoint: they have a raw form too.
    names = dir(kind_of_node)
    return tuple(n for n in names if n.startswith("_saved_") and f"_raw{n}" not in names)


def axis(node: Node, name: str, dimensions: int) -> int:
    """The axis that the node keeps as `name`, counted from the front of so many dimensions."""
    return _from_front(getattr(node, f"_saved_{name}"), dimensions)


def axes(node: Node, name: str, dimensions: int) -> set[int]:
    """The axes that the node keeps as `name`, one or several; all if it keeps none."""
    kept = getattr(node, f"_saved_{name}")
    if isinstance(kept, int):
        kept = (kept,)
    return {_from_front(a, dimensions) for a in kept or ()} or set(range(dimensions))


def order(node: Node, dimensions: int) -> list[int]:
    """Which axis of its operand each axis of a permutation's result is."""
    return [_from_front(a, dimensions) for a in node._saved_dims]  # type: ignore[attr-defined]


def _from_front(axis: int, dimensions: int) -> int:
    if axis >= 2**63:  # a negative one comes back as unsigned
        axis -= 2**64
    return axis % dimensions


def softmax_axis(node: Node) -> int:
    """The axis that a softmax or log_softmax was taken over."""
    return axis(node, "dim", len(shape(node, 0)))


def normalises_over_batch(node: Node) -> bool:
    """Whether the node is BatchNorm (InstanceNorm, ...) with the statistics of its own input."""
    return "BatchNorm" in node.name() and bool(node._saved_training)  # type: ignore[attr-defined]


def is_compiled(node: Node) -> bool:
    """Whether `node` is a region that AOTAutograd compiled: every back end of torch.compile but "eager"."""
    return node.name().startswith("CompiledFunction")


def is_reentrant_checkpoint(node: Node) -> bool:
    """Whether `node` hides a checkpointed part of the forward."""
    return node.name() == "CheckpointFunctionBackward"


def is_error(node: Node) -> bool:
    """Whether `node` stands for a derivative that once_differentiable forbids."""
    return node.name() == "torch::autograd::Error"


def is_derivative(node: Node) -> bool:
    """Whether `node` is of a derivative that the forward took: it shows as a backward of a backward."""
    return node.name().count("Backward") > 1


def is_scalar(node: Node) -> bool:
    """Whether all results of the operation are single numbers."""
    return all(math.prod(made.shape) == 1 for made in results(node))


def communicates(node: Node) -> bool:
    """Whether a derivative through `node` talks to other processes, beyond averaging gradients: tensor
    parallelism, collectives in the model or the loss, SyncBatchNorm."""
    if "c10d" in node.name():
        return True
    function = getattr(type(node), "_forward_cls", None)  # the autograd.Function that made it
    if function is None:
        return False
    home = function.__module__
    averages = home.startswith("torch.distributed.fsdp.")
    return (home.startswith("torch.distributed.") and not averages) or function.__name__ == "SyncBatchNorm"


def in_derivative() -> bool:
    """Whether this thread is inside a derivative that autograd takes, as what a checkpoint runs again is."""
    return bool(torch._C._current_graph_task_id() != -1)
