"""Attention and recurrence behind the layer: without a second derivative, the error names the remedy."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fam_optim import FAM
from tests import reference
from tests.sandwich import MODES, Sandwich, assert_step, check, data, definition, fam_on
from tests.support import LAM, LR, seeded

pytestmark = pytest.mark.usefixtures("float64")


class Attending(nn.Module):
    """The layer feeds a transformer block, and the body contains one."""

    def __init__(self) -> None:
        super().__init__()
        block = partial(nn.TransformerEncoderLayer, 4, 2, 8, dropout=0.0, batch_first=True)
        self.body, self.layer, self.tail, self.head = block(), nn.Linear(4, 4), block(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.layer(self.body(x))).mean(1))


def attention_loss(model: nn.Module, tail_only: bool = False, fused: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(3, 4, 4, generator=generator), torch.tensor([0, 2, 1])
    with nullcontext() if fused or tail_only else sdpa_kernel(SDPBackend.MATH):
        z = model.layer(model.body(x))
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        return F.cross_entropy(model.head(model.tail(z).mean(1)), y)


def operations(loss: Tensor) -> str:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [below for below, _ in node.next_functions]
    return " ".join(node.name() for node in seen)


@MODES
def test_fused_attention_behind_the_layer_names_the_math_kernel(mode: str) -> None:
    model = seeded(Attending)
    fam = fam_on(model, mode)
    assert "FlashAttention" in operations(attention_loss(model, fused=True))
    with pytest.raises(RuntimeError, match=r"torch.nn.attention.sdpa_kernel\(SDPBackend.MATH\)"):
        fam.step(lambda: attention_loss(model, fused=True))


@pytest.mark.parametrize("mode", ["exact", pytest.param("full", marks=pytest.mark.slow)])
def test_math_attention_behind_the_layer(mode: str) -> None:
    """With the remedy, also where attention before the layer stays fused."""
    run = partial(attention_loss, tail_only=True)
    kappa, moved = definition(Attending, attention_loss)
    model = seeded(Attending)
    assert "FlashAttention" in operations(run(model))
    fam = fam_on(model, mode)
    fam.step(lambda: run(model))
    assert_step(model, fam, kappa, moved)


def test_output_of_multihead_attention_is_never_called() -> None:
    model = seeded(Attending)
    fam = FAM(model.parameters(), torch.optim.SGD, model.tail.self_attn.out_proj, LAM, lr=LR)
    with pytest.raises(RuntimeError, match=r"although on its weight.*out_proj.weight.*hutchinson"):
        fam.step(lambda: attention_loss(model))
    weight = model.tail.self_attn.out_proj.weight
    fam = FAM(model.parameters(), torch.optim.SGD, weight, LAM, "full", lr=LR)
    loss = attention_loss(model)
    hessian = reference.brute_force_hessian(loss, weight).reshape(4, 4, 4, 4)
    fam.regularize(loss)
    assert fam.last_kappa is not None
    wanted = reference.kappa(weight, hessian, "neuronwise").detach()
    torch.testing.assert_close(fam.last_kappa, wanted, rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------------------- recurrence


class Recurrent(nn.Module):
    """The layer feeds a recurrent network."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.recurrent, self.head = nn.Linear(4, 4), kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.layer(x))[0][:, -1])


def recurrent_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    like = model.layer.weight
    x = torch.randn(3, 4, 4, generator=generator).to(like)
    return F.cross_entropy(model(x), torch.tensor([0, 2, 1], device=like.device))


KINDS = pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])


@KINDS
def test_recurrent_tail(kind: type[nn.RNNBase]) -> None:
    check(partial(Recurrent, kind), recurrent_loss)


@KINDS
def test_recurrent_tail_in_single_precision(kind: type[nn.RNNBase], device: str) -> None:
    """Single precision is what fused kernels exist for; an accelerator needs the remedy of the message."""
    kappa, _ = definition(partial(Recurrent, kind), recurrent_loss)
    model = seeded(partial(Recurrent, kind)).to(device, torch.float32)
    fam = fam_on(model)
    if device == "cuda":
        with pytest.raises(RuntimeError, match=r"torch.backends.cudnn.flags\(enabled=False\)"):
            fam.regularize(recurrent_loss(model))
    with torch.backends.cudnn.flags(enabled=False):
        loss = recurrent_loss(model)
    fam.regularize(loss).backward()
    assert fam.last_kappa is not None
    torch.testing.assert_close(fam.last_kappa.cpu().double(), kappa, rtol=1e-4, atol=0)


class CuDnn(torch.autograd.Function):
    """tanh, which has a derivative but no second one, and says so in the words of a cuDNN RNN."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _CuDnnBackward.apply(gradient, *ctx.saved_tensors)


class _CuDnnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient * (1 - z.tanh().square())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported "
            "for CuDNN RNNs due to limitations in the CuDNN API."
        )


@MODES
def test_cudnn_recurrence_names_the_flag(mode: str) -> None:
    model = seeded(Sandwich)
    fam, (x, y) = fam_on(model, mode), data()
    with pytest.raises(
        RuntimeError, match=r"second derivatives.*torch.backends.cudnn.flags\(enabled=False\)"
    ):
        fam.step(lambda: F.cross_entropy(model.tail(CuDnn.apply(model.layer(model.body(x)))), y))
    fam_on(model).step(lambda: F.cross_entropy(model(CuDnn.apply(x)), y))  # before the layer it is welcome
