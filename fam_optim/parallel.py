"""Data-parallel wrappers, while kappa is computed.

kappa takes derivatives of the loss before the step's one backward. They are local to the process: what is
averaged over processes is the gradient of ``loss + lam * kappa``, by the wrapper and once. But a wrapper's
hooks on the graph take any derivative that passes them for the step's backward, and must be told.

The attributes used here are torch's own and not public; tests/test_distributed.py guards each of them.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.autograd.graph import Node

    from fam_optim.tail import Tail

DDP_SINK = "_DDPSink"
"""The name, without "Backward", of a node that passes on what a model wrapped in DDP returns."""


def inputs_of(node: Node, output: int) -> Sequence[tuple[Node | None, int]]:
    """What the node computes its `output` from: for the sink, which has many, one of its inputs."""
    if node.name() != f"{DDP_SINK}Backward":
        return node.next_functions
    # The model may return other things than tensors: they count among outputs, not among next_functions.
    attached: Any = node
    rank = sum(attached.needs_input_grad[1 : 1 + output])
    return [edge for edge in node.next_functions if edge[0] is not None][rank : rank + 1]


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


def local_derivatives(tails: Sequence[Tail]) -> AbstractContextManager[None]:
    """Derivatives of the tails' losses taken in this context start no communication of gradients."""
    return _local_derivatives(tails) if _in_process_group() else nullcontext()


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _local_derivatives(tails: Sequence[Tail]) -> Iterator[None]:
    with _unsunk(tails), _gathered(tails):
        yield


@contextmanager
def _unsunk(tails: Sequence[Tail]) -> Iterator[None]:
    """DDP with static_graph reduces all gradients when the first backward through its sink ends, and so
    would reduce, once and for all, those of a derivative inside kappa."""
    sinks: list[Any] = [node for tail in tails for node in tail.path if node.name() == f"{DDP_SINK}Backward"]
    static = [ddp for ddp in {node.ddp_weakref() for node in sinks} if ddp.static_graph]
    before = [ddp._static_graph_delay_allreduce_enqueued for ddp in static]
    for ddp in static:
        ddp._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for ddp, enqueued in zip(static, before, strict=True):
            ddp._static_graph_delay_allreduce_enqueued = enqueued


@contextmanager
def _gathered(tails: Sequence[Tail]) -> Iterator[None]:
    """FSDP2 gathers a module's weights when a derivative enters it, and frees them when it leaves.

    A derivative inside kappa must gather but not free: kappa's own backward needs the weights again, and
    runs before that of the forward, whose hooks would gather them. The layer's weight is the gathered leaf
    that its forward used, so its gradient joins the loss's there and is averaged with it, once.
    """
    group_type = _fsdp_group_type()
    if group_type is None:
        yield
        return
    post_backward = group_type.post_backward
    group_type.post_backward = lambda group: None
    try:
        for tail in tails:
            if any(_is_freed(use.weight) for use in tail.uses):
                torch.autograd.grad(tail.loss, tail.edges, retain_graph=True, allow_unused=True)
        yield
    finally:
        group_type.post_backward = post_backward


def lasting(weight: Tensor) -> Tensor:
    """`weight`, and with FSDP2 a copy: another forward's backward may free it before kappa's is done."""
    return weight if _fsdp_group_type() is None else weight.clone()


def _fsdp_group_type() -> Any:
    """What holds FSDP2's gathered weights; None where FSDP2 cannot be in use."""
    if not _in_process_group():  # imported it may be all the same, by a framework
        return None
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param_group")
    return getattr(module, "FSDPParamGroup", None)


def _is_freed(weight: Tensor) -> bool:
    return weight.numel() > 0 and weight.untyped_storage().size() == 0
