"""Keeps data-parallel wrappers quiet while kappa is computed, and adds up curvature over processes.

kappa takes derivatives of the loss before the step's one backward. These are local to the process. The
wrapper averages only the gradient of ``loss + lam * kappa`` over processes, once. But the wrapper's hooks on
the graph mistake any derivative for the step's backward, so they are switched off meanwhile.

The attributes of torch used here are not public; test_torch_names.py guards each of them.
"""

import gc
import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fam_optim.graph import nodes
from fam_optim.graph.trace import Tail


def _in_process_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def known(owner: Any, name: str) -> Any:
    """Returns an attribute that torch does not promise, of an object or of a module given by name."""
    found = getattr(sys.modules.get(owner) if isinstance(owner, str) else owner, name, None)
    if found is None:
        raise RuntimeError(
            f"this version of torch ({torch.__version__}) has no {name} where fam_optim looks for it, so "
            "gradients over several processes could be wrong. Use a version from 2.6 to 2.15."
        )
    return found


@contextmanager
def unsunk(graph: Iterable[Any]) -> Iterator[None]:
    """A context in which DDP with static_graph reduces no gradients. Otherwise it would do so, once and for
    all, after the first backward through its sink, which is a derivative inside kappa."""
    name = "_static_graph_delay_allreduce_enqueued"
    with ExitStack() as undoing:
        if _in_process_group():
            known("torch.nn.parallel.distributed", nodes.DDP_SINK)
            for ddp in {node.ddp_weakref() for node in graph if nodes.kind(node) == nodes.DDP_SINK}:
                if ddp.static_graph:
                    undoing.callback(setattr, ddp, name, getattr(ddp, name))
                    setattr(ddp, name, True)
        yield


@contextmanager
def gathered(tails: Sequence[Tail]) -> Iterator[None]:
    """A context in which FSDP2 gathers a module's weights when a derivative enters it, but never frees them:
    kappa's own backward needs them again, and runs before the forward's, whose hooks would gather them. The
    layer's weight is the gathered leaf of its forward, so kappa's gradient is averaged with the loss's."""
    groups = _fsdp_groups()
    for group in groups:
        known(type(group), "post_backward")
        group.post_backward = lambda *unused: None  # hides the class's method, for this group only
    try:
        for tail in tails if groups else ():
            stored = [use.weight.untyped_storage().size() for use in tail.uses if use.weight.numel()]
            if 0 in stored:  # FSDP2 has freed a weight
                torch.autograd.grad(tail.loss, tail.edges, retain_graph=True, allow_unused=True)
        yield
    finally:
        for group in groups:
            del group.post_backward


def lasting(weight: Tensor) -> Tensor:
    """Returns `weight`, or with FSDP2 a copy, since another backward may free it before kappa's is done."""
    return weight.clone() if _fsdp_groups() else weight


def _fsdp_groups() -> list[Any]:
    """Returns all groups of weights that FSDP2 shards and gathers together; none if it is not in use."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not _in_process_group():  # a framework may import it without using it
        return []
    modules = list(known("torch.distributed._composable_state", "_module_state_mapping"))
    state_of = known("torch.distributed._composable_state", "_get_module_state")
    states = [state_of(module) for module in modules if isinstance(module, fsdp.FSDPModule)]
    of_states = [getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] for s in states]
    # Modules that are sharded together share a state, so duplicates are dropped.
    return list(dict.fromkeys(group for groups in of_states for group in groups if group is not None))


class Replicas:
    """The processes that train copies of the same weights, each on a share of the batch."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters

    @cached_property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that the weights' DistributedDataParallel averages over; None for one process. Raises
        RuntimeError if there are several processes but no such module, since weights may differ then."""
        if not _in_process_group() or dist.get_world_size() == 1:
            return None
        ours = {id(p) for p in self._parameters}
        for wrapped in gc.get_objects():  # checks type(wrapped), since isinstance would trust a proxy
            if not issubclass(type(wrapped), DistributedDataParallel):
                continue
            if ours <= {id(p) for p in wrapped.module.parameters()}:
                self._wrapped = weakref.ref(wrapped)
                group: dist.ProcessGroup = wrapped.process_group
                return group if dist.get_world_size(group) > 1 else None
        raise RuntimeError(
            f"this is one of {dist.get_world_size()} processes, and no DistributedDataParallel module is "
            "found that has all weights of mode='proximal', to move them alike. Wrap the trained model in "
            "one, call gc.freeze(), if at all, after the first regularize(), or use mode='hutchinson'."
        )

    def check_together(self) -> None:
        """Raises RuntimeError if some of the processes may have no batches left."""
        wrapped = None if self.group is None else self._wrapped()
        if wrapped is not None and known(wrapped, "_join_config").enable:
            raise RuntimeError(
                "mode='proximal' adds up over processes, and within DistributedDataParallel.join() some have "
                "no batches left. Give all as many batches: DistributedSampler(..., drop_last=True)."
            )

    @property
    def rank(self) -> int:
        """The number of this process among them; 0 for one process."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def joined(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns each tensor's sum over the processes, divided by the root of their number. If each process
        has A of its share of the batch, this is A of the whole batch, whose loss is the mean."""
        result = [(part / math.sqrt(dist.get_world_size(self.group))).contiguous() for part in parts]
        for part in result:
            dist.all_reduce(part, group=self.group)
        return result
