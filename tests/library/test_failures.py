"""Where torch has no derivative, or a wrong one: an error with a remedy, or the right number."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fam_optim import FAM, observe, relative_flatness
from fam_optim.graph import errors
from tests import reference
from tests.support import TORCH, warnings_as

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0])


def kappa_behind(
    tail: Callable[[Tensor], Tensor], mode: str = "exact", layer: nn.Module | None = None
) -> Tensor:
    torch.manual_seed(0)
    layer = layer or nn.Linear(5, 4)
    with observe(layer) as observed:
        loss = tail(layer(X.to(layer.weight.dtype)))
    return relative_flatness(loss, observed, mode=mode)


def ctc(z: Tensor) -> Tensor:
    return F.ctc_loss(z.log_softmax(-1)[:, None], Y[None, 1:2], torch.tensor([4]), torch.tensor([1]))


class Invented(torch.autograd.Function):
    """An operation of torch's whose derivative nobody has written yet."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise NotImplementedError("the derivative for 'aten::invented_backward' is not implemented.")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * z.cos()


class AsASoftmax(torch.autograd.Function):
    """Has the name of an operation of torch's, and computes something else."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin().cumsum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad.flip(0).cumsum(0).flip(0) * z.cos()


SECOND: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "ctc": (ctc, "_ctc_loss_backward has none.*elementary operations"),
    "invented": (lambda z: Invented.apply(z.tanh()).square().sum(), "invented_backward has none.*elementary"),
    "multi_margin": (lambda z: F.multi_margin_loss(z, Y).square(), "multi_margin_loss_backward has none"),
    "once_differentiable": (lambda z: Once.apply(z.tanh()).square().sum(), r"\(function Once\).*once_differ"),
    "once_differentiable first": (lambda z: Once.apply(z).square().sum(), r"\(function Once\).*once_differ"),
    "fused attention": (
        lambda z: F.scaled_dot_product_attention(z[None, None], z[None, None], z[None, None]).square().sum(),
        "Fused attention.*sdpa_kernel",
    ),
}


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
@pytest.mark.parametrize(("tail", "message"), SECOND.values(), ids=SECOND)
def test_no_second_derivative(tail: Callable[[Tensor], Tensor], message: str, mode: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)kappa needs second derivatives of what follows.*{message}"):
        kappa_behind(tail, mode)


def test_second_derivatives_that_torch_does_not_have_or_gives_wrong() -> None:
    """Of logcumsumexp nan; what is computed in chunks is a constant after its first derivative; and some
    checkpoints allow but one."""
    saved = partial(create_selective_checkpoint_contexts, [torch.ops.aten.sin.default])

    def selective(z: Tensor) -> Tensor:
        return checkpoint(lambda z: z.sin().square().sum(), z, use_reentrant=False, context_fn=saved)

    tails: dict[str, Callable[[Tensor], Tensor]] = {
        "logcumsumexp": lambda z: (z.logcumsumexp(0) - z).sum(),
        "context_fn": selective,
    }
    if hasattr(nn, "LinearCrossEntropyOptions"):
        options = nn.LinearCrossEntropyOptions()
        tails["options"] = lambda z: F.linear_cross_entropy(z, torch.ones(3, 4), Y, options=options)
    for (message, tail), mode in itertools.product(tails.items(), ("exact", "full", "hutchinson")):
        with pytest.raises(RuntimeError, match=f"(?s)kappa needs second derivatives of what.*{message}"):
            kappa_behind(tail, mode)


def test_what_is_not_known_of_torch_is_quoted_with_what_to_do() -> None:
    layer = nn.Linear(5, 3)
    with warnings_as("ignore"):
        z = layer(torch.nested.nested_tensor([X[:1], X[1:]])).to_padded_tensor(0.0)
    for mode in ("full", "hutchinson"):
        with pytest.raises(
            RuntimeError, match=r'torch says of one there: "Expected both to be nested.*on plain'
        ):
            relative_flatness(z.tanh().square().mean(), layer.weight, mode=mode)


def test_remedies_belong_to_what_they_are_for() -> None:
    """ "rnn" is in many words."""
    message = "derivative for aten::learned_journey_backward is not implemented"
    text = errors.remedy(RuntimeError(message))
    assert text is not None and "learned_journey_backward" in text and "recurrent" not in text
    assert errors.remedy(RuntimeError("internal error: turn nothing")) is None
    for rnn in ("derivative for aten::_cudnn_rnn_backward is not implemented", "CuDNN RNN double backward"):
        assert "recurrent" in (errors.remedy(RuntimeError(rnn)) or "")


def test_functions_named_as_operations_are_not_taken_for_them(float64: None) -> None:
    """Its rows interact, whatever its name."""
    AsASoftmax.__name__ = AsASoftmax.__qualname__ = "Tanh"
    named = type("Tanh", (AsASoftmax,), {})
    for mode in ("exact", "full"):
        kappa = kappa_behind(lambda z: named.apply(z).square().sum(), mode)
        expected = kappa_behind(lambda z: z.sin().cumsum(0).square().sum(), "full")
        torch.testing.assert_close(kappa, expected, rtol=1e-9, atol=0)
    nll = type("NllLoss", (AsASoftmax,), {})
    kappa = kappa_behind(lambda z: nll.apply(z.log_softmax(-1)).square().sum())
    expected = kappa_behind(lambda z: z.log_softmax(-1).sin().cumsum(0).square().sum(), "full")
    torch.testing.assert_close(kappa, expected, rtol=1e-9, atol=0)


WRITTEN_OUT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hardsigmoid": (F.hardsigmoid, lambda z: F.relu6(z + 3) / 6),
    "squeeze and excitation": (
        lambda z: z * F.hardsigmoid(2 * z.mean(1, keepdim=True)),
        lambda z: z * F.relu6(2 * z.mean(1, keepdim=True) + 3) / 6,
    ),
    "hardsigmoid in place": (
        lambda z: F.hardsigmoid(z * 3, inplace=True) * z,
        lambda z: F.relu6(z * 3 + 3) / 6 * z,
    ),
    "layer_norm": (
        lambda z: F.layer_norm(z, (4,)),
        lambda z: (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
    ),
    "layer_norm in a checkpoint": (
        lambda z: checkpoint(lambda z: F.hardsigmoid(F.layer_norm(z, (4,))), z, use_reentrant=False),
        lambda z: F.relu6(WRITTEN_OUT["layer_norm"][1](z) + 3) / 6,
    ),
    "group_norm": (
        lambda z: F.group_norm(z, 2),
        lambda z: (
            (z.view(-1, 2, 2) - z.view(-1, 2, 2).mean(-1, keepdim=True))
            / (z.view(-1, 2, 2).var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        ).view_as(z),
    ),
}


@pytest.mark.parametrize("mode", ["exact", "full"])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_corrected_backwards(name: str, mode: str, float64: None) -> None:
    """Value and whole gradient are those of the same function in elementary operations, in mode full."""
    own, written_out = WRITTEN_OUT[name]
    results = []
    for function, by in ((own, mode), (written_out, "full")):
        torch.manual_seed(2)
        layer, head = nn.Linear(5, 4), nn.Linear(4, 3)
        with observe(layer) as observed:
            loss = F.cross_entropy(head(function(layer(X.double())).sin()), Y)
        kappa = relative_flatness(loss, observed, mode=by)
        parameters = [*layer.parameters(), *head.parameters()]
        gradient = torch.autograd.grad(kappa, parameters, allow_unused=True, materialize_grads=True)
        results.append((kappa, *gradient))
    # torch's plain backward of hardsigmoid, which is a part of it, multiplies with 1/6 in float32.
    tolerance = 1e-8 if "norm" in name else 1e-6
    largest = max(wanted.abs().max() for wanted in results[1][1:])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=tolerance, atol=0)
    for actual, wanted in zip(*results, strict=True):
        assert (actual - wanted).abs().max() <= tolerance * max(largest, wanted.abs().max())


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_direction_of_a_weight_norm(dim: int, float64: None) -> None:
    """The bare parameter v of ``w = g v / ||v||``: torch's own second derivative is off by some per cent."""
    torch.manual_seed(0)
    v, x = nn.Parameter(torch.randn(3, 4)), torch.randn(5, 4)
    kept = [i for i in range(2) if i == dim]
    g = nn.Parameter(
        torch.rand([n if i in kept else 1 for i, n in enumerate(v.shape)]) if kept else torch.ones(())
    )
    axes = tuple(i for i in range(2) if i not in kept)

    def loss(own: bool) -> Tensor:
        w = torch._weight_norm(v, g, dim) if own else v * (g / v.square().sum(axes, keepdim=True).sqrt())
        return torch.tanh(F.linear(x, w)).square().sum()

    hessian = reference.brute_force_hessian(loss(own=False), v, create_graph=True).reshape(3, 4, 3, 4)
    wanted = reference.kappa(v, hessian, "neuronwise")
    actual = relative_flatness(loss(own=True), v, mode="full")
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=0)
    for a, w in zip(torch.autograd.grad(actual, (v, g)), torch.autograd.grad(wanted, (v, g)), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-8, atol=1e-12)


class Norm(torch.autograd.Function):
    """LayerNorm, whose statistics are computed again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return F.layer_norm(z, (4,))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        _, mean, deviation = torch.native_layer_norm(z, [4], None, None, 1e-5)
        backward = torch.ops.aten.native_layer_norm_backward
        by_z: Tensor = backward(grad, z, [4], mean, deviation, None, None, [True, False, False])[0]
        return by_z


THIRD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "BatchNorm": (
        lambda z: F.batch_norm(z, None, None, training=True),
        "none of BatchNorm in train mode.*detach_hessian=True.*BatchNorm.*in eval mode",
    ),
    "LayerNorm in a function": (
        lambda z: Norm.apply(z),
        r"torch's of LayerNorm is wrong.*within torch.jit.script and autograd.Function.*detach_hessian=True",
    ),
    "InstanceNorm": (
        lambda z: F.instance_norm(z[None]).squeeze(0),
        r"none of InstanceNorm.*detach_hessian=True.*nn.GroupNorm\(channels, channels\)",
    ),
}
if TORCH >= (2, 7):  # before, pdist has no second derivative either
    THIRD["pdist"] = lambda z: F.pdist(z), "torch's of pdist is nan.*detach_hessian=True.*triu_indices"


@pytest.mark.parametrize(("normalise", "message"), THIRD.values(), ids=THIRD)
def test_no_third_derivative(normalise: Callable[[Tensor], Tensor], message: str) -> None:
    kappa = kappa_behind(lambda z: normalise(z).sin().sum(), "full")
    assert kappa.isfinite()
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        kappa.backward()


def test_group_norm_is_instance_norm_with_a_third_derivative(float64: None) -> None:
    """As the remedy says: the same function."""

    def tail(normalise: Callable[[Tensor], Tensor]) -> Tensor:
        return kappa_behind(lambda z: normalise(z[None]).sin().sum(), "full")

    instance, group = tail(F.instance_norm), tail(lambda z: F.group_norm(z, 4))
    torch.testing.assert_close(group, instance, rtol=1e-9, atol=0)
    group.backward()


def test_a_weight_used_without_its_module() -> None:
    """As SwinV2 its qkv: the message says what to do, and that works."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qkv.weight, self.qkv.bias).tanh()

    model = Functional()
    fam = FAM(model.parameters(), torch.optim.SGD, model.qkv, 0.1, lr=0.1)
    with pytest.raises(RuntimeError, match=r"although on its weight.*qkv.weight.*nn.Parameter.*hutchinson"):
        fam.step(lambda: F.cross_entropy(model(X), Y))
    fam = FAM(model.parameters(), torch.optim.SGD, model.qkv.weight, 0.1, "hutchinson", lr=0.1)
    fam.step(lambda: F.cross_entropy(model(X), Y))
    assert fam.last_kappa is not None and fam.last_kappa != 0
