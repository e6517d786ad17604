"""What may be asked of a node of the autograd graph. Attributes of nodes that are private to torch are read
in this file alone (test_torch_names.py says what each is needed for).

A node stands for one operation of the forward. Its *outputs* are the operation's results. Its *inputs* are
the nodes that made the operands, each with the number of its output.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import NoneType
from typing import Any
from weakref import ReferenceType

import torch
import torch._functorch.config
from torch.autograd.graph import Node

DDP_SINK = "_DDPSink"  # an autograd.Function that passes on what a model wrapped in DDP returns


def kind(node: Node) -> str:
    """Returns the operation, "Addmm" for AddmmBackward0. A user's autograd.Function is "function NAME", since
    it may have the name of one of torch's operations and compute something else."""
    name = node.name().rstrip("0123456789").removesuffix("Backward")
    if name == "Slice" and shape(node, 0) == shape(*node.next_functions[0]):  # type: ignore[arg-type]
        return "Alias"  # of the whole tensor: torch 2.6 makes one for the colon in x[:, 0]
    return f"function {name}" if is_function(node) and name != DDP_SINK else name


def is_function(node: Node) -> bool:
    """Returns whether the node is of an autograd.Function written in Python."""
    return hasattr(type(node), "_forward_cls")


def shape(node: Node, output: int) -> torch.Size:
    """Returns the shape of one of the operation's results."""
    return torch.Size(node._input_metadata[output].shape)


def results(node: Node) -> Sequence[Any]:
    """Returns the shape, dtype and device of each of the operation's results."""
    return node._input_metadata


def inputs_of(node: Node, output: int) -> Sequence[tuple[Node | None, int]]:
    """Returns the inputs that the node computes an output from: all of them, but only one for DDP's sink."""
    if node.name() != f"{DDP_SINK}Backward":
        return node.next_functions
    # What the model returns beside tensors counts among the outputs, but not among next_functions.
    attached: Any = node
    rank = sum(attached.needs_input_grad[1 : 1 + output])
    return [edge for edge in node.next_functions if edge[0] is not None][rank : rank + 1]


def has_sparse_gradient(node: Node) -> bool:
    """Returns whether the node is an embedding whose weight gets a sparse gradient."""
    return bool(getattr(node, "_saved_sparse", False))


def metadata(node: Node) -> dict[str, Any]:
    """Returns the dict that Python code may fill. It lives as long as the node."""
    return node.metadata  # type: ignore[return-value]  # a property that torch declares as a method


def leaf(node: Node) -> torch.Tensor | None:
    """Returns the leaf whose gradient the node accumulates; None for all other nodes."""
    return getattr(node, "variable", None)


def kept(node: Node, name: str) -> Any:
    """Returns what the node keeps of its operation, a tensor or a number, by the operation's name for it."""
    return getattr(node, f"_saved_{name}")


def factors(node: Node) -> Iterator[torch.Tensor]:
    """Yields the factors that a product keeps; none where (from 2.7 on) that may run a checkpoint again."""
    for name in ("self", "mat", "mat1", "mat2", "weight"):
        raw = getattr(node, f"_raw_saved_{name}", None)
        found = raw and (raw.data if hasattr(raw, "data") else kept(node, name))
        if isinstance(found, torch.Tensor):
            yield found


def settings(node: Node) -> tuple[tuple[str, Any], ...]:
    """Returns what the node keeps of its operation beside tensors: axes, sizes, modes."""
    # Leaves tensors out, which have a raw form too: unpacking one may recompute a checkpoint.
    names = dir(type(node))
    return tuple((n, getattr(node, n)) for n in names if n.startswith("_saved_") and f"_raw{n}" not in names)


def axes(node: Any, dimensions: int) -> set[int]:
    """Returns the axes that an operation works along, counted from the front; all if the node keeps none."""
    along: Any = getattr(node, "_saved_dim", getattr(node, "_saved_dims", None))
    if isinstance(along, int):
        along = (along,)
    return {from_front(axis, dimensions) for axis in along or ()} or set(range(dimensions))


def order(node: Any, dimensions: int) -> list[int]:
    """Returns, for every axis of a permutation's result, which axis of the operand it is."""
    if hasattr(node, "_saved_dims"):
        return [from_front(axis, dimensions) for axis in node._saved_dims]
    swapped = list(range(dimensions))
    pair = getattr(node, "_saved_dim0", 0), getattr(node, "_saved_dim1", 1)  # t() of a matrix keeps none
    a, b = (from_front(axis, dimensions) for axis in pair)
    swapped[a], swapped[b] = b, a
    return swapped


def from_front(axis: int, dimensions: int) -> int:
    """Returns an axis, or a place along one, counted from the front of `dimensions`."""
    return (axis - 2**64 if axis >= 2**63 else axis) % dimensions  # torch returns negative ones unsigned


def picked_axes(node: Any) -> range:
    """Returns the axes that ``x[:, index]`` picks from; if they are not side by side, all up to the last."""
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
    """Returns whether a product or quotient has one number beside its operand at `position`."""
    if kind(node) == "Div" and position != 0:
        return False
    other: Any = node._saved_other if position == 0 else node._saved_self
    return other is not None and (not isinstance(other, torch.Tensor) or other.numel() == 1)


def by_one_index(node: Any, axis: int) -> bool:
    """Returns whether one entry of its index picks all entries along an axis of a gather's result."""
    index: torch.Tensor = node._saved_index
    return index.shape[axis] == 1 or index.stride(axis) == 0


def averages(node: Any) -> bool:
    """Returns whether a loss is the mean of its entries, rather than their sum or one number for each."""
    return getattr(node, "_saved_reduction", None) == 1


def curvature_of_error(node: Any) -> Any:
    """Returns the second derivative of a squared, Huber or smooth L1 error; None for powers but squares."""
    if kind(node) == "Pow":  # Pow with another number has a tensor for its exponent, which may be learned
        return 2 if node.name() == "PowBackward0" and node._saved_exponent == 2 else None
    if kind(node) in ("MseLoss", "Mul", "Dot"):
        return 2
    error = (node._saved_self - node._saved_target).detach().abs()
    if kind(node) == "HuberLoss":
        return error < node._saved_delta
    return (error < node._saved_beta).to(error) / node._saved_beta


def softmax_axis(node: Node) -> int:
    """Returns the axis that a softmax or log_softmax was taken over."""
    (axis,) = axes(node, len(shape(node, 0)))
    return axis


def normalises_over_batch(node: Node) -> bool:
    """Returns whether the node is BatchNorm (InstanceNorm, ...) with the statistics of its own input."""
    return "BatchNorm" in node.name() and bool(node._saved_training)  # type: ignore[attr-defined]


def is_compiled(node: Node) -> bool:
    """Returns whether AOTAutograd compiled `node`, as every back end of torch.compile but "eager" does."""
    return node.name().startswith("CompiledFunction")


def hides(node: Node) -> bool:
    """Returns whether `node` hides what it does: a user's function, a region compiled or scripted."""
    return is_function(node) or is_compiled(node) or "DifferentiableGraph" in node.name()


def gives_buffers_away(node: Node) -> bool:
    """Returns whether `node` is a compiled region whose backward can run only once on a graph."""
    region: Any = getattr(type(node), "_forward_cls", None)
    return is_compiled(node) and region.compiled_bw is not None and bool(region.metadata.bw_donated_idxs)


def keep_buffers() -> None:
    """Makes regions that are compiled from now on keep their buffers after a backward."""
    torch._functorch.config.donated_buffer = False


def is_reentrant_checkpoint(node: Node) -> bool:
    """Returns whether `node` hides a part of the forward in a reentrant checkpoint."""
    return node.name() == "CheckpointFunctionBackward"


def keeps_numbers(node: Any) -> bool:
    """Returns whether an autograd.Function may keep floating point numbers for its backward, also coded in 8
    or 16 bits: in tensors, lists, dicts, or any object but plain numbers, names and torch's own objects."""
    return any(map(_may_hold_numbers, (*node.saved_tensors, *vars(node).values())))


def _may_hold_numbers(kept: Any) -> bool:
    if isinstance(kept, torch.Tensor):
        return kept.dtype not in (torch.bool, torch.int32, torch.int64)  # masks and indices
    if isinstance(kept, (list, tuple, dict)):
        return any(map(_may_hold_numbers, kept.values() if isinstance(kept, dict) else kept))
    plain = isinstance(kept, (int, float, str, NoneType, ReferenceType))
    return not plain and type(kept).__module__.partition(".")[0] != "torch"


def is_scalar(node: Node) -> bool:
    """Returns whether all results of the operation are single numbers."""
    return all(math.prod(made.shape) == 1 for made in results(node))


def communicates(node: Node) -> bool:
    """Returns whether a derivative through `node` talks to other processes, except to average gradients."""
    function = getattr(type(node), "_forward_cls", type(node))  # the autograd.Function that made it, if any
    home = function.__module__
    collective = home.startswith("torch.distributed.") and not home.startswith("torch.distributed.fsdp.")
    return collective or "c10d" in node.name() or function.__name__ == "SyncBatchNorm"


def derivative() -> int:
    """Returns the number of the derivative that autograd is taking in this thread, or -1."""
    return int(torch._C._current_graph_task_id())


def within_derivative(function: Callable[[], list[Any]]) -> list[Any]:
    """Calls a function while autograd takes a derivative, and returns its result."""
    found: list[Any] = []
    start: Any = torch.zeros((), device="cpu", requires_grad=True)
    start.register_hook(lambda gradient: found.extend(function()))
    torch.autograd.grad(start.clone(), start)
    return found


def made_so_far() -> int:
    """Returns how many nodes this thread has made, which is the next node's `sequence_number`."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def sequence_number(node: Node) -> int:
    """Returns how many nodes the thread had made before this one."""
    return int(node._sequence_nr())


@contextmanager
def hooked(hooks: Iterable[tuple[Node, Callable[..., Any]]]) -> Iterator[None]:
    """Makes derivatives in this context pass on what hooks return in place of what the nodes compute."""
    handles = [node.register_hook(hook) for node, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def not_passed(some: Iterable[Node]) -> AbstractContextManager[None]:
    """Makes derivatives in this context end at some nodes."""
    return hooked((node, lambda below, above: (None,) * len(below)) for node in some)


def after_backward(function: Callable[[], None]) -> None:
    """Calls `function` once the derivative that this thread is taking is done."""
    torch.autograd.Variable._execution_engine.queue_callback(function)
