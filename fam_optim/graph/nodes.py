"""What may be asked of a node of the autograd graph: all names of nodes and of their attributes, most of
them private to torch, stand here (test_torch_names.py says what each is needed for).

A node stands for one operation of the forward. Its *outputs* are the operation's results, its *inputs*
the nodes (with the number of their output) that made the operands.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import NoneType
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType

import torch
import torch._functorch.config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch.autograd.graph import Node

DDP_SINK = "_DDPSink"
"""An autograd.Function that passes on what a model wrapped in DDP returns."""


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


def has_sparse_gradient(node: Node) -> bool:
    """Whether the node is an embedding whose weight gets a sparse gradient."""
    return kind(node).startswith("Embedding") and bool(getattr(node, "_saved_sparse", False))


def metadata(node: Node) -> dict[str, Any]:
    """What Python may attach to a graph node: it lives as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property that torch declares as a method


def leaf(node: Node) -> torch.Tensor | None:
    """The leaf whose gradient the node accumulates, if it does that."""
    return getattr(node, "variable", None)


def kept(node: Node, name: str) -> Any:
    """What the node keeps of its operation, by the operation's own name for it: a tensor or a number."""
    return getattr(node, f"_saved_{name}")


def at_hand(node: Node, name: str) -> torch.Tensor | None:
    """A tensor that the node keeps as it is; None where getting it may run a checkpoint again, if torch tells
    (before 2.7 it does not)."""
    raw = getattr(node, f"_raw_saved_{name}")
    found = raw.data if hasattr(raw, "data") else kept(node, name)
    return found if isinstance(found, torch.Tensor) else None


def settings(node: Node) -> tuple[tuple[str, Any], ...]:
    """What the node keeps of its operation beside tensors: axes, sizes, modes."""
    # Tensors are left alone, since unpacking one may recompute a checkpoint: they have a raw form too.
    names = dir(type(node))
    return tuple((n, getattr(node, n)) for n in names if n.startswith("_saved_") and f"_raw{n}" not in names)


def axes(node: Any, dimensions: int) -> set[int]:
    """The axes that an operation is along, counted from the front of so many; all if it keeps none."""
    along: Any = getattr(node, "_saved_dim", getattr(node, "_saved_dims", None))
    if isinstance(along, int):
        along = (along,)
    return {from_front(axis, dimensions) for axis in along or ()} or set(range(dimensions))


def order(node: Any, dimensions: int) -> list[int]:
    """Which axis of its operand each axis of the result of a permutation is."""
    if hasattr(node, "_saved_dims"):
        return [from_front(axis, dimensions) for axis in node._saved_dims]
    swapped = list(range(dimensions))
    if hasattr(node, "_saved_dim0"):
        pair = [from_front(axis, dimensions) for axis in (node._saved_dim0, node._saved_dim1)]
        swapped[pair[0]], swapped[pair[1]] = pair[1], pair[0]
        return swapped
    return swapped[::-1]  # t(), of a matrix


def from_front(axis: int, dimensions: int) -> int:
    """An axis, or a place along one, counted from the front of so many."""
    if axis >= 2**63:  # a negative one comes back as unsigned
        axis -= 2**64
    return axis % dimensions


def picked_axes(node: Any) -> range:
    """The axes that ``x[:, index]`` picks from; all in front of the last if they are not side by side."""
    axis = 0
    picked: list[int] = []
    for index in node._saved_indices:
        is_mask = index is not None and index.dtype in (torch.bool, torch.uint8)
        width = index.dim() if is_mask else 1  # a mask picks from as many axes as it has
        picked += range(axis, axis + width) if index is not None else ()
        axis += width
    side_by_side = len(picked) == picked[-1] - picked[0] + 1
    return range(picked[0] if side_by_side else 0, picked[-1] + 1)


def by_one_number(node: Any, position: int) -> bool:
    """Whether a product or quotient multiplies its operand at `position` with one number of the graph, or
    divides it by one."""
    if kind(node) == "Div" and position != 0:
        return False
    other: Any = node._saved_other if position == 0 else node._saved_self
    return other is not None and (not isinstance(other, torch.Tensor) or other.numel() == 1)


def by_one_index(node: Any, axis: int) -> bool:
    """Whether all entries along an axis of a gather's result are picked by one index of the graph."""
    index: torch.Tensor = node._saved_index
    return index.shape[axis] == 1 or index.stride(axis) == 0


def exponent(node: Any) -> float | None:
    """The exponent of a power; None if it is a tensor, which may be learned."""
    return float(node._saved_exponent) if node.name() == "PowBackward0" else None


def averages(node: Any) -> bool:
    """Whether a loss is the mean of its entries, not their sum, or one for each."""
    return int(node._saved_reduction) == 1


def binary_targets(node: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Of a binary cross-entropy with logits: these, the targets, the weights of its entries and of the
    positives among them."""
    return node._saved_self, node._saved_target, node._saved_weight, node._saved_pos_weight


def curvature_of_error(node: Any) -> Any:
    """The second derivative of a squared error, a Huber or a smooth L1 loss in each of its errors."""
    if kind(node) == "MseLoss":
        return 2
    error = (node._saved_self - node._saved_target).detach().abs()
    if kind(node) == "HuberLoss":
        return error < node._saved_delta
    return (error < node._saved_beta) / node._saved_beta


def softmax_axis(node: Node) -> int:
    """The axis that a softmax or log_softmax was taken over."""
    (axis,) = axes(node, len(shape(node, 0)))
    return axis


def normalises_over_batch(node: Node) -> bool:
    """Whether the node is BatchNorm (InstanceNorm, ...) with the statistics of its own input."""
    return "BatchNorm" in node.name() and bool(node._saved_training)  # type: ignore[attr-defined]


def is_compiled(node: Node) -> bool:
    """Whether `node` is a region that AOTAutograd compiled: every back end of torch.compile but "eager"."""
    return node.name().startswith("CompiledFunction")


def gives_buffers_away(node: Node) -> bool:
    """Whether a compiled region has a backward that can run only once on a graph."""
    region: Any = getattr(type(node), "_forward_cls", None)
    return is_compiled(node) and region.compiled_bw is not None and bool(region.metadata.bw_donated_idxs)


def keep_buffers() -> None:
    """What is compiled from now on does not give its buffers away."""
    torch._functorch.config.donated_buffer = False


def is_scripted(node: Node) -> bool:
    """Whether `node` is a region that torch.jit.script or trace made."""
    return "DifferentiableGraph" in node.name()


def is_reentrant_checkpoint(node: Node) -> bool:
    """Whether `node` hides a checkpointed part of the forward."""
    return node.name() == "CheckpointFunctionBackward"


def is_error(node: Node) -> bool:
    """Whether `node` stands for a derivative that once_differentiable forbids."""
    return node.name() == "torch::autograd::Error"


def is_derivative(node: Node) -> bool:
    """Whether `node` is of a derivative that the forward took: it shows as a backward of a backward."""
    return node.name().count("Backward") > 1


def keeps_numbers(node: Any) -> bool:
    """Whether an autograd.Function keeps what may be floating point numbers for its backward: tensors, also
    in lists and dicts, and any object but plain numbers, names and those of torch (a process group, say)."""
    return any(map(_may_hold_numbers, (*node.saved_tensors, *vars(node).values())))


def _may_hold_numbers(kept: Any) -> bool:
    if isinstance(kept, torch.Tensor):
        return kept.is_floating_point() or kept.is_complex()
    if isinstance(kept, (list, tuple, dict)):
        return any(map(_may_hold_numbers, kept.values() if isinstance(kept, dict) else kept))
    plain = isinstance(kept, (int, float, str, NoneType, ReferenceType))
    return not plain and type(kept).__module__.partition(".")[0] != "torch"


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


def derivative() -> int:
    """Which derivative that autograd takes this thread is inside of, as what a checkpoint runs again is; -1
    if of none."""
    return int(torch._C._current_graph_task_id())


def within_derivative(function: Callable[[], list[Any]]) -> list[Any]:
    """What a function gives that is called while autograd takes a derivative."""
    found: list[Any] = []
    start = torch.zeros((), device="cpu", requires_grad=True)
    end: Any = start.clone()
    end.grad_fn.register_hook(lambda below, above: found.extend(function()))
    torch.autograd.grad(end, start)
    return found


def made_so_far() -> int:
    """How many nodes this thread has made: the next one's `sequence_number`."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def sequence_number(node: Node) -> int:
    """How many nodes the thread had made before this one."""
    return int(node._sequence_nr())


@contextmanager
def not_passed(some: Iterable[Node]) -> Iterator[None]:
    """Derivatives in this context end at some nodes."""
    handles = [node.register_hook(lambda below, above: (None,) * len(below)) for node in some]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def after_backward(function: Callable[[], None]) -> None:
    """Calls `function` when the derivative that this thread is inside of is done."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
