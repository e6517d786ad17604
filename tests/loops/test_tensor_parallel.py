"""Tensor parallelism changes nothing before the regularised layer, and is refused at it and behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from fam_optim import FAM
from tests.distributed import (
    LAM,
    LR,
    Net,
    assert_weights,
    batch,
    build,
    descended,
    processes,
    regularizes,
    squares,
)
from tests.support import TORCH

Plan = dict[str, ParallelStyle]


def parallelized(plan: Plan) -> Any:
    return parallelize_module(Net(), init_device_mesh("cpu", (2,)), plan)


@processes(2)
@pytest.mark.parametrize(
    "settings", [{}, {"detach_hessian": True}, {"mode": "full"}], ids=["default", "detached", "full"]
)
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, squares])
def test_before_the_layer(loss_fn: Callable[..., Tensor], settings: dict[str, Any]) -> None:
    model = parallelized({"middle": ColwiseParallel(), "after.1": RowwiseParallel()})
    optimizer = build(model, ["head"], **settings)
    for step in range(3):
        regularizes(model, optimizer, *batch(step), loss_fn)
        twin = descended(step + 1, ("head",), loss_fn, "detach_hessian" in settings)
        assert_weights(model, twin, f"weights after step {step}")


@processes(2)
@pytest.mark.parametrize(
    "style",
    [
        ColwiseParallel(),
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
    ],
    ids=["columns", "columns, gathered", "rows"],
)
def test_the_layer_itself_is_refused(style: ParallelStyle) -> None:
    model = parallelized({"head": style})
    with pytest.raises(TypeError, match=r"tensor parallel.*out of the plan of parallelize_module"):
        optimizer = build(model, ["head"])
        assert TORCH < (2, 7), "a later torch marks what is parallelised"
        regularizes(model, optimizer, *batch(0))
    if TORCH >= (2, 7):
        assert not any("fam_optim" in str(hook) for hook in model.head._forward_hooks.values())
    with pytest.raises(TypeError, match=r"a sharded one.*Tensor parallelism is not supported"):
        FAM(model.parameters(), torch.optim.SGD, model.head.weight, mode="hutchinson", lr=LR)


@processes(2)
def test_weight_distributed_by_hand_is_refused_at_the_first_forward() -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    optimizer = FAM(model.parameters(), torch.optim.SGD, model, LAM, lr=LR)
    x = distribute_tensor(torch.randn(2, 4), mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"tensor parallel.*out of the plan of parallelize_module"):
        optimizer.step(lambda: model(x).full_tensor().square().sum())


@processes(2)
@pytest.mark.parametrize(
    "settings",
    [{}, {"detach_hessian": True}, {"mode": "hutchinson"}],
    ids=["default", "detached", "hutchinson"],
)
@pytest.mark.parametrize(
    ("layer", "plan"),
    [
        ("body.0", {"middle": ColwiseParallel(), "after.1": RowwiseParallel()}),
        ("middle", {"head": ColwiseParallel(output_layouts=Replicate())}),
    ],
    ids=["between layers", "at the end"],
)
def test_behind_the_layer_is_refused(layer: str, plan: Plan, settings: dict[str, Any]) -> None:
    """torch's second derivatives of DTensor's conversions are wrong without a word."""
    model = parallelized(plan)
    optimizer = build(model, [layer], **settings)
    with pytest.raises(RuntimeError, match=r"(TorchTensor|Redistribute)Backward there communicates"):
        regularizes(model, optimizer, *batch(0))
