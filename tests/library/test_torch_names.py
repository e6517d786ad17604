"""The names that torch does not promise: one row each, with what it is needed for.

A name that is gone fails here, by that name, before anything else goes wrong without a word.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, _JoinConfig
from torch.utils.checkpoint import checkpoint

from fam_optim import parallel, wrapper
from fam_optim.graph import corrections, nodes

if TYPE_CHECKING:
    from collections.abc import Callable

Z = torch.randn(2, 3, 4, 4, requires_grad=True)
ROW = torch.randn(4, 4, requires_grad=True)

# Nodes that are looked for, whatever they are called in Python: wrong results if they go by another name.
NODES: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "NativeLayerNorm": ("its third derivative is wrong", lambda: F.layer_norm(ROW, (4,))),
    "WeightNormInterface": ("its second derivative is wrong", lambda: torch._weight_norm(ROW, ROW[:, :1], 0)),
    "Hardsigmoid": ("has no second derivative", lambda: F.hardsigmoid(ROW)),
    "NativeBatchNorm": ("has no third derivative", lambda: F.batch_norm(ROW, None, None, training=True)),
    "LogSoftmax": ("softmax heads", lambda: ROW.log_softmax(1)),
    "NllLoss": ("softmax heads", lambda: F.nll_loss(ROW, torch.zeros(4, dtype=torch.long))),
    "Mul": ("factors, independence", lambda: ROW * 2),
    "Div": ("factors, independence", lambda: ROW / 2),
    "Add": ("shifts, independence", lambda: ROW + 2),
    "Sub": ("shifts, independence", lambda: ROW - 2),
    "Sum": ("independence", lambda: ROW.sum()),
    "Mean": ("independence", lambda: ROW.mean(1)),
    "Tanh": ("independence", lambda: ROW.tanh()),
    "Gelu": ("independence", lambda: F.gelu(ROW)),
    "Relu": ("independence", lambda: F.relu(ROW)),
    "Addmm": ("independence", lambda: F.linear(ROW, ROW, ROW[0])),
    "Mm": ("independence", lambda: ROW @ ROW),
    "Bmm": ("independence", lambda: torch.bmm(Z[0], Z[0])),
    "Convolution": ("independence", lambda: F.conv2d(Z, torch.ones(1, 3, 1, 1))),
    "View": ("softmax heads, independence", lambda: Z.view(2, -1)),
    "UnsafeView": ("softmax heads, independence", lambda: Z @ ROW),
    "Slice": ("softmax heads, independence", lambda: ROW[:2]),
    "Select": ("softmax heads, independence", lambda: ROW[0]),
    "Transpose": ("softmax heads, independence", lambda: Z.transpose(1, 2)),
    "Permute": ("softmax heads, independence", lambda: Z.permute(0, 2, 3, 1)),
    "Expand": ("softmax heads, independence", lambda: ROW[None].expand(2, 4, 4)),
    "Gather": ("softmax heads", lambda: ROW.gather(0, torch.zeros(1, 4, dtype=torch.long))),
    "Index": ("softmax heads", lambda: ROW[torch.tensor([0, 1])]),
    "Unsqueeze": ("softmax heads, independence", lambda: ROW[:, None]),
    "MseLoss": ("squared errors, independence", lambda: F.mse_loss(ROW, torch.zeros(4, 4))),
    "BinaryCrossEntropyWithLogits": (
        "Gauss-Newton, and its curvature in float32",
        lambda: F.binary_cross_entropy_with_logits(ROW, ROW.detach()),
    ),
    "Pow": ("squared errors", lambda: ROW.square()),
    "SmoothL1Loss": ("squared errors", lambda: F.smooth_l1_loss(ROW, torch.zeros(4, 4))),
    "HuberLoss": ("squared errors", lambda: F.huber_loss(ROW, torch.zeros(4, 4))),
    "LogSigmoid": ("its curvature in float32", lambda: F.logsigmoid(ROW)),
    "Softplus": ("its curvature in float32", lambda: F.softplus(ROW)),
    "LinalgVectorNorm": ("no squared error", lambda: torch.linalg.vector_norm(ROW)),
    "SafeSoftmax": ("independence: attention", lambda: torch._safe_softmax(ROW, 1)),
    "Baddbmm": ("independence: attention", lambda: torch.baddbmm(Z[0], Z[0], Z[0])),
    "NativeGroupNorm": ("independence", lambda: F.group_norm(Z, 3)),
    "ConstantPadNd": ("independence", lambda: F.pad(ROW, (1, 1))),
    "Stack": ("independence", lambda: torch.stack([ROW, ROW])),
    "Cat": ("independence", lambda: torch.cat([ROW, ROW])),
    "Softmax": ("independence", lambda: ROW.softmax(1)),
    "ScaledDotProductFlashAttentionForCpu": ("independence", lambda: F.scaled_dot_product_attention(Z, Z, Z)),
    "ConvolutionBackward": (
        "a derivative through a convolution",
        lambda: derivative(F.conv2d(Z, torch.ones(1, 3, 1, 1)).sin()),
    ),
    "NativeLayerNormBackward": ("a derivative of LayerNorm", lambda: derivative(F.layer_norm(Z, (4,)).sin())),
}


def derivative(value: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), Z, create_graph=True)[0]


def test_nodes() -> None:
    found = {name: (what, make().grad_fn) for name, (what, make) in NODES.items()}
    assert not {n: what for n, (what, node) in found.items() if node is None or nodes.kind(node) != n}


SAVED: dict[str, tuple[str, Callable[[], Tensor], Any]] = {
    "_saved_dim": ("axes of softmax, sums, ...", lambda: ROW.log_softmax(-1), None),
    "_saved_dims": ("permutations", lambda: Z.permute(0, 2, 3, 1), (0, 2, 3, 1)),
    "_saved_dim0": ("transpositions", lambda: Z.transpose(1, 2), 1),
    "_saved_dim1": ("transpositions", lambda: Z.transpose(1, 2), 2),
    "_saved_normalized_shape": ("LayerNorm written out", lambda: F.layer_norm(ROW, (4,)), (4,)),
    "_saved_input": ("LayerNorm written out", lambda: F.layer_norm(ROW, (4,)), None),
    "_saved_weight": ("LayerNorm written out", lambda: F.layer_norm(ROW, (4,), ROW[0]), None),
    "_saved_result2": ("LayerNorm written out: its eps", lambda: F.layer_norm(ROW, (4,)), None),
    "_saved_training": ("BatchNorm", lambda: F.batch_norm(ROW, None, None, training=True), True),
    "_saved_result": ("log p", lambda: ROW.log_softmax(1), None),
    "_raw_saved_result": ("what is a tensor, unseen", lambda: ROW.log_softmax(1), None),
    "_saved_self": ("hardsigmoid written out", lambda: F.hardsigmoid(ROW), None),
    "_saved_v": ("weight_norm written out", lambda: torch._weight_norm(ROW, ROW[:, :1], 0), None),
    "_saved_g": ("weight_norm written out", lambda: torch._weight_norm(ROW, ROW[:, :1], 0), None),
    "_saved_target": ("targets of a binary cross-entropy", lambda: binary(), None),
    "_saved_pos_weight": ("weights of its positives", lambda: binary(), None),
    "_saved_reduction": ("whether a loss is a mean", lambda: binary(), 1),
    "_saved_exponent": ("squares", lambda: ROW.square(), 2),
    "_saved_beta": ("softplus written out, smooth L1", lambda: F.softplus(ROW, 2.0), 2),
    "_saved_delta": ("Huber's loss", lambda: F.huber_loss(ROW, torch.zeros(4, 4), delta=2.0), 2),
    "_saved_threshold": ("softplus written out", lambda: F.softplus(ROW), 20),
    "_saved_indices": ("which axes are picked from", lambda: ROW[:, torch.tensor([0])], None),
    "_saved_index": ("one index for all classes", lambda: ROW.gather(0, torch.zeros(1, 4).long()), None),
    "_saved_sparse": ("sparse gradients", lambda: F.embedding(torch.tensor([0, 1]), ROW), False),
    "_saved_pad": ("which axes a padding moves", lambda: F.pad(ROW, (1, 2)), (1, 2)),
    "_saved_other": ("factors", lambda: ROW * ROW.exp(), None),
    "_saved_alpha": ("a product's own factor", lambda: torch.addmm(ROW, ROW, ROW, alpha=2), 2),
    "_saved_mat1": ("phi of a Linear layer", lambda: torch.addmm(ROW, ROW, ROW), None),
    "_saved_mat2": ("uses of a frozen layer", lambda: ROW @ ROW.exp(), None),
    "_saved_mat": ("uses of a frozen layer", lambda: torch.addmv(ROW[0], ROW, ROW[0]), None),
    "_raw_saved_mat2": ("uses of a frozen layer", lambda: ROW @ ROW.exp(), None),
    "_input_metadata": ("shapes of results", lambda: ROW * 2, None),
    "metadata": ("where records live", lambda: ROW * 2, None),
    "next_functions": ("the walk", lambda: ROW * 2, None),
}


def binary() -> Tensor:
    return F.binary_cross_entropy_with_logits(ROW, ROW.detach(), pos_weight=torch.ones(4))


def test_all_attributes_of_nodes_are_listed() -> None:
    """And asked for in `nodes` alone."""
    asked: set[str] = set()
    for path in Path(nodes.__file__).parents[1].rglob("*.py"):
        names = re.findall(r"_saved_[a-z0-9_]+", path.read_text())
        assert not names or path.name == "nodes.py", path.name
        asked |= set(names) | {f"_saved_{n}" for n in re.findall(r'kept\(node, "(\w+)"\)', path.read_text())}
    asked |= {f"_saved_{n}" for _, names, _ in corrections._CORRECTIONS.values() for n in names.split()}
    assert asked <= SAVED.keys()


def test_attributes_of_nodes() -> None:
    wrong = {}
    for name, (what, make, value) in SAVED.items():
        made = make()  # which keeps what the node has of its operands
        if not hasattr(made.grad_fn, name) or value not in (None, getattr(made.grad_fn, name)):
            wrong[name] = what
    assert not wrong


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_functions_of_python() -> None:
    """A user's may have any name, and may forbid to be differentiated twice."""
    z = Function.apply(ROW.sin())
    node = z.grad_fn
    assert nodes.is_function(node) and nodes.kind(node) == "function Function"
    assert not nodes.is_function(node.next_functions[0][0])
    (grad,) = torch.autograd.grad(z.square().sum(), ROW, create_graph=True)
    assert any(below.name() == "torch::autograd::Error" for below in everything_below(grad))


KEPT: dict[str, tuple[Callable[[Tensor], Any], bool]] = {
    "a tensor": (lambda x: x.detach(), True),
    "tensors in containers": (lambda x: {"x": [(1, x.detach())]}, True),
    "an array": (lambda x: x.detach().numpy(), True),
    "a function": (lambda x: lambda: x, True),
    "a mask": (lambda x: [x > 0], False),
    "settings": (lambda x: (2, 0.5, "mean", None, x.shape, x.dtype, x.device), False),
    "an object of torch": (lambda x: torch.Generator(), False),
}


class Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Callable[[Tensor], Any] | None) -> Tensor:
        if keep is None:
            ctx.save_for_backward(x)
        else:
            ctx.kept = keep(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_what_functions_keep() -> None:
    assert nodes.keeps_numbers(Keeps.apply(ROW, None).grad_fn)
    for name, (keep, numbers) in KEPT.items():
        assert nodes.keeps_numbers(Keeps.apply(ROW, keep).grad_fn) == numbers, name


def everything_below(t: Tensor) -> set[Any]:
    seen: set[Any] = set()
    stack = [t.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(below for below, _ in node.next_functions)
    return seen


def test_leaves_and_checkpoints() -> None:
    assert any(nodes.leaf(node) is ROW for node in everything_below(ROW * 2))
    assert nodes.is_reentrant_checkpoint(checkpoint(torch.sin, ROW, use_reentrant=True).grad_fn)
    (grad,) = torch.autograd.grad(ROW.tanh().sum(), ROW, create_graph=True)
    assert grad.grad_fn.name().count("Backward") > 1


def test_a_call_within_a_reentrant_checkpoint_is_numbered_next() -> None:
    numbers = []

    def run(x: Tensor) -> Tensor:
        numbers.append(nodes.made_so_far())
        return x.sin()

    before = ROW.sin()
    after = checkpoint(run, before, use_reentrant=True)  # torch 2.6 crashes where the node is left alone
    made = [nodes.sequence_number(x.grad_fn) for x in (before, after)]
    assert numbers == [made[1] + 1] != [made[0] + 1]


def test_the_end_of_a_backward() -> None:
    ended: list[str] = []
    value = ROW.sin().sum()
    value.register_hook(lambda g: nodes.after_backward(lambda: ended.append("backward")))
    torch.autograd.grad(value, ROW)
    assert ended == ["backward"]


def test_compiled_regions() -> None:
    """Its first backward decides whether a region has another."""
    for kept in (True, False):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: x.sin().exp().sin(), backend="aot_eager")
        with torch._functorch.config.patch(donated_buffer=True):
            for backward in range(2):
                made = compiled(ROW).sum()
                (region,) = (below for below in everything_below(made) if nodes.is_compiled(below))
                assert nodes.gives_buffers_away(region) == (backward > 0 and not kept)
                torch.autograd.grad(made, ROW, retain_graph=kept)
            nodes.keep_buffers()
            assert not torch._functorch.config.donated_buffer


ATTRIBUTES: dict[str, tuple[Any, str]] = {
    "torch.Tensor._backward_hooks": (ROW, "hooks of the user's on a weight"),
    "torch.Tensor._version": (ROW, "in-place changes of the input and of the weight"),
    "torch.Tensor._base": (ROW, "views"),
    "torch.Tensor._is_view": (ROW, "views"),
    "torch.nn.Module._forward_hooks": (nn.Linear(2, 2), "removing our hook"),
    "torch.nn.Module._forward_hooks_with_kwargs": (nn.Linear(2, 2), "removing our hook"),
    "torch.nn.Conv2d._conv_forward": (nn.Conv2d(1, 1, 1), "padding modes"),
    "torch._C._are_functorch_transforms_active": (torch._C, "torch.func"),
    "torch._foreach_norm": (torch, "gradients that are not finite"),
    "torch.nn.modules.module._global_forward_hooks": (nn.modules.module, "a forward that is not the class's"),
    "torch.autograd._get_sequence_nr": (torch.autograd, "calls within reentrant checkpoints"),
    "torch.autograd.graph.Node._sequence_nr": (ROW.sin().grad_fn, "calls within reentrant checkpoints"),
    "torch.autograd.Variable._execution_engine": (torch.autograd.Variable, "the end of a backward"),
    "torch.optim.Optimizer._patch_step_function": (torch.optim.Optimizer, "step hooks"),
    "torch.optim.Optimizer.profile_hook_step": (torch.optim.Optimizer, "the base's step below its hooks"),
    "torch.optim.Optimizer._optimizer_step_pre_hooks": (torch.optim.SGD([ROW]), "step hooks run once"),
    "torch.optim.Optimizer._optimizer_step_post_hooks": (torch.optim.SGD([ROW]), "step hooks run once"),
    "torch.nn.parallel.distributed._DDPSink": (torch.nn.parallel.distributed, "DDP, static graph"),
    "torch.distributed._composable_state._module_state_mapping": (
        sys.modules["torch.distributed._composable_state"], "FSDP2: which modules are sharded"),
    "torch.distributed._composable_state._get_module_state": (
        sys.modules["torch.distributed._composable_state"], "FSDP2: its state"),
    "torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup.post_backward": (
        sys.modules["torch.distributed.fsdp._fully_shard._fsdp_param_group"].FSDPParamGroup, "FSDP2: frees"),
}  # fmt: skip


def test_attributes() -> None:
    missing = {n: what for n, (owner, what) in ATTRIBUTES.items() if not hasattr(owner, n.rpartition(".")[2])}
    assert not missing


def test_marks_of_wrappers() -> None:
    assert hasattr(torch.compile(nn.Linear(2, 2)), "_orig_mod"), "a compiled layer is its module"
    optimizer = torch.optim.SGD([ROW], lr=0.1)
    assert torch.optim.SGD.step.__code__ is wrapper._TORCHS_WRAPPER, "the base's step below its hooks"
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched"), "the base's step below a scheduler's"
    ddp = nn.parallel.DistributedDataParallel
    source = ddp.__init__.__code__.co_names + ddp._post_forward.__code__.co_names
    assert "static_graph" in source
    assert "_static_graph_delay_allreduce_enqueued" in source
    assert "_join_config" in Joinable.__init__.__code__.co_names
    assert not _JoinConfig.construct_disabled_join_config().enable


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.nn.parallel.distributed", "_DDPSink"),
        ("torch.distributed._composable_state", "_module_state_mapping"),
        ("torch.distributed._composable_state", "_get_module_state"),
    ],
)
def test_a_missing_name_is_an_error_where_several_processes_are_at_work(
    owner: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fam_optim import FAM

    layer = nn.Linear(4, 3)
    fam = FAM(layer.parameters(), torch.optim.SGD, layer, lr=0.1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fam.regularize(layer(ROW).square().sum())
        monkeypatch.delattr(sys.modules[owner], name)
        with pytest.raises(RuntimeError, match=f"has no {name} where fam_optim looks for it"):
            fam.regularize(layer(ROW).square().sum())
    finally:
        dist.destroy_process_group()
    assert fam.regularize(layer(ROW).square().sum()).requires_grad, "alone nothing is asked for"


def test_known_names_the_version() -> None:
    with pytest.raises(RuntimeError, match=r"this version of torch \(.*has no nothing"):
        parallel.known(torch, "nothing")
