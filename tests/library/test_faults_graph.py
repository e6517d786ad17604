"""Inputs that came out wrong without a word: what the graph means, and how often it may be differentiated.

Each is right by the definition, written out here with autograd, or refused with what to do instead.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fam_optim import FAM, observe, relative_flatness, unnoticed, weight_layers
from fam_optim.estimators import measure as measures
from fam_optim.graph.trace import find_tails
from tests.support import TORCH, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("float64")

CE = F.cross_entropy
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def definition(loss: Tensor, weight: Tensor) -> Tensor:
    """``sum_su <w_s, w_u> Tr(H_su)``, every use of the weight counting."""
    (g,) = torch.autograd.grad(loss, weight, create_graph=True)
    rows = [
        torch.autograd.grad(entry, weight, create_graph=True, materialize_grads=True)[0]
        if entry.requires_grad
        else 0 * weight
        for entry in g.flatten()
    ]
    d, m = weight.flatten(1).shape
    traces = torch.einsum("stut->su", torch.stack(rows).reshape(d, m, d, m))
    return ((weight.flatten(1) @ weight.flatten(1).T) * traces).sum()


def kappa(loss_of: Callable[[], Tensor], layer: nn.Module, **settings: Any) -> Tensor:
    with observe(layer) as seen:
        loss = loss_of()
    return relative_flatness(loss, seen, **settings)


def gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def assert_right(model: nn.Module, loss_of: Callable[[], Tensor], layer: Any, mode: str = "exact") -> None:
    """Value and gradient in all parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    value, right = kappa(loss_of, layer, mode=mode), definition(loss_of(), layer.weight)
    torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(
        gradient(value, parameters), gradient(right, parameters), rtol=1e-8, atol=1e-11
    )


def perceptron() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


# ------------------------------------------------------------------------ functions of the user's


def cross_entropy_function(mark: bool) -> type[torch.autograd.Function]:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, y = ctx.saved_tensors
        return grad[:, None] * (p - F.one_hot(y, 3)), None

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(z.softmax(1), y)
            return CE(z, y, reduction="none")

    Fused.backward = staticmethod(torch.autograd.function.once_differentiable(backward) if mark else backward)
    return Fused


class Calls(torch.autograd.Function):
    """sin, whose backward calls a function that has no second derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * Cosine.apply(z)


class Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.cos()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return -grad * z.sin()


def sine(backward_of: str) -> type[torch.autograd.Function]:
    """sin, whose backward makes constants of what it keeps, in one of several ways."""

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        if backward_of == "numpy":
            return grad * torch.from_numpy(z.detach().numpy()).cos()
        if backward_of == "made in the forward":
            return grad * z
        if backward_of == "coded":
            return grad * (z.to(grad) / 32).cos()
        if backward_of == "attribute":
            return grad * ctx.z[0].cos()
        with torch.set_grad_enabled(backward_of != "no_grad"):
            slope = z.cos()
        return grad * slope

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            ctx.z = [z.detach()] if backward_of == "attribute" else None
            kept = {"made in the forward": z.cos(), "coded": (32 * z).to(torch.int8)}
            ctx.save_for_backward(kept.get(backward_of, z))
            return z.sin()

    if backward_of == "vjp":
        Sine.vjp = staticmethod(torch.autograd.function.once_differentiable(backward))
    elif backward_of == "all of it":
        Sine.backward = staticmethod(torch.no_grad()(backward))
    else:
        Sine.backward = staticmethod(backward)
    return Sine


class FusedLoss(torch.autograd.Function):
    """Cross-entropy whose gradient is made in the forward, as fused kernels do, marked in no way."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((z.softmax(1) - F.one_hot(y, 3)) / len(y))
        return CE(z, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


CONSTANTS = ["numpy", "made in the forward", "coded", "attribute", "no_grad", "vjp", "all of it"]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "behind a mean": lambda z: cross_entropy_function(True).apply(z, Y).mean(),
    "behind a sum": lambda z: cross_entropy_function(True).apply(z, Y).sum(),
    "behind a square": lambda z: cross_entropy_function(True).apply(z, Y).square().mean(),
    "in its backward": lambda z: Calls.apply(z).mean(),
    "the loss itself": lambda z: FusedLoss.apply(z, Y),
    "a multiple of the loss": lambda z: 0.5 * FusedLoss.apply(z, Y),
    **{f"{how}, behind a mean": lambda z, how=how: sine(how).apply(z).mean() for how in CONSTANTS},
    **{f"{how}, before a softmax": lambda z, how=how: CE(sine(how).apply(z), Y) for how in CONSTANTS},
}


@pytest.mark.parametrize("number", [0, 2], ids=["below", "last"])
@pytest.mark.parametrize("tail", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_that_are_once_differentiable(tail: Callable[[Tensor], Tensor], number: int) -> None:
    m = perceptron()
    for mode in ("exact", "full", "hutchinson"):
        with pytest.raises(RuntimeError, match=r"autograd.Function there .* has none.*elementary operations"):
            kappa(lambda: tail(m(X)), m[number], mode=mode)


class Mask(torch.autograd.Function):
    """relu, which keeps a mask; or the sign reversed, which keeps a number."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, reverse: bool) -> Tensor:
        ctx.reverse = reverse
        ctx.save_for_backward(z > 0)
        return z.clone() if reverse else z.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -0.5 * grad if ctx.reverse else grad * ctx.saved_tensors[0], None


class Several(torch.autograd.Function):
    """A product, where the largest is, and a sum."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        largest = a.argmax(1)
        ctx.mark_non_differentiable(largest)
        return a * b, largest, a + b

    @staticmethod
    def backward(ctx: Any, by_product: Tensor, _: Any, by_sum: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return by_product * b + by_sum, by_product * a + by_sum


class Half(torch.autograd.Function):
    """A product, whose derivative in one operand makes a constant of the other, or is left out."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, left_out: bool) -> Tensor:
        ctx.left_out = left_out
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        a, b = ctx.saved_tensors
        return grad * b, None if ctx.left_out else grad * a.detach(), None


class Apart(torch.autograd.Function):
    """A square and a sum, whose operands have no mixed derivative."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.square() + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * grad * ctx.saved_tensors[0], grad


@pytest.mark.parametrize("number", [0, 2], ids=["below", "last"])
def test_functions_with_several_operands_and_results(number: int) -> None:
    m = perceptron()

    def halves(reverse: bool, left_out: bool) -> Tensor:
        z = m(X)  # one operand is made of the other
        return CE(Half.apply(*((z.exp(), z) if reverse else (z, z.exp())), left_out), Y)

    for settings in ({}, {"mode": "full"}, {"curvature": "gauss_newton"}):
        for which in itertools.product((False, True), repeat=2):
            with pytest.raises(RuntimeError, match=r"autograd.Function there \(function Half\) has none"):
                kappa(lambda which=which: halves(*which), m[number], **settings)

    def loss() -> Tensor:
        z = m(X)
        product, largest, total = Several.apply(z, z.exp())
        return CE(product, largest) + Apart.apply(total, total.sin()).mean()

    assert_right(m, loss, m[number])


class Scaled(torch.autograd.Function):
    """``w z / ||z||``, which keeps z and w, or what it has computed of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, w: Tensor, constant: bool) -> Tensor:
        normal, norm = F.normalize(z), z.norm(dim=1, keepdim=True)
        ctx.constant = constant
        ctx.save_for_backward(*((normal, norm) if constant else (z,)), w)
        return w * normal

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        *kept, w = ctx.saved_tensors
        normal, norm = kept if ctx.constant else (F.normalize(kept[0]), kept[0].norm(dim=1, keepdim=True))
        along = (grad * w * normal).sum(1, keepdim=True)
        return (grad * w - along * normal) / norm, (grad * normal).sum(0), None


@pytest.mark.parametrize("mode", ["exact", "full"])
@pytest.mark.parametrize("number", [0, 2], ids=["below", "last"])
def test_a_function_that_depends_on_another_parameter_alone_drops_out(number: int, mode: str) -> None:
    m, w = perceptron(), nn.Parameter(torch.rand(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="makes constants of the numbers that it keeps"):
        kappa(lambda: CE(Scaled.apply(m(X), w, True), Y), m[number], mode=mode)
    value = kappa(lambda: CE(Scaled.apply(m(X), w, False), Y), m[number], mode=mode)
    right = kappa(lambda: CE(w * F.normalize(m(X)), Y), m[number], mode=mode)
    torch.testing.assert_close(value, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["exact", "full"])
def test_a_function_below_the_layer_may_be_differentiable_once(mode: str) -> None:
    """It is passed by the first derivative only."""
    m = perceptron()
    body = nn.Linear(4, 4)

    def loss() -> Tensor:
        return CE(Mask.apply(m(sine("no_grad").apply(body(X))), False), Y)

    value = kappa(loss, m[0], mode=mode)
    right = kappa(lambda: CE(m(body(X).sin()).relu(), Y), m[0], mode=mode)
    torch.testing.assert_close(value, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("number", [0, 2], ids=["below", "last"])
def test_functions_that_are_linear_where_they_are(number: int, reverse: bool) -> None:
    m = perceptron()
    assert_right(m, lambda: CE(Mask.apply(m(X), reverse), Y), m[number])


# ----------------------------------------------------------------- differentiating kappa once more


def product(loss: Tensor, parameters: list[Tensor], along: list[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    found = torch.autograd.grad(gradients, parameters, along, allow_unused=True, materialize_grads=True)
    return torch.cat([h.flatten() for h in found])


SETTINGS: dict[str, dict[str, Any]] = {
    **{f"{mode}": {"mode": mode} for mode in ("exact", "full", "hutchinson")},
    "layerwise": {"measure": "layerwise"},
    **{
        f"gauss_newton {mode}": {"curvature": "gauss_newton", "mode": mode}
        for mode in ("exact", "hutchinson")
    },
}


@pytest.mark.parametrize("few", [True, False], ids=["few classes", "many classes"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("number", [0, 2], ids=["below", "last"])
def test_hessian_vector_products_of_kappa(
    settings: dict[str, Any], number: int, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As AdaHessian and Sophia take them: right where kappa can be differentiated twice, else refused."""
    monkeypatch.setattr(measures, "SMALL", measures.SMALL if few else 0)
    m = perceptron()
    parameters = list(m.parameters())
    torch.manual_seed(2)
    along = [torch.randn_like(p) for p in parameters]
    value = kappa(lambda: CE(m(X), Y), m[number], **settings)
    twice = settings.get("mode", "exact") == "full" or (number == 2 and "curvature" not in settings)
    if not twice or settings.get("mode") == "hutchinson":
        with pytest.raises(RuntimeError, match=r"can be differentiated once only.*mode='full'"):
            product(value, parameters, along)
        return
    right = definition(CE(m(X), Y), m[number].weight)
    if "measure" in settings:
        w = m[number].weight
        (g,) = torch.autograd.grad(CE(m(X), Y), w, create_graph=True)
        trace = sum(
            torch.autograd.grad(a, w, create_graph=True)[0].flatten()[i] for i, a in enumerate(g.flatten())
        )
        right = w.square().sum() * trace
    torch.testing.assert_close(
        product(value, parameters, along), product(right, parameters, along), rtol=1e-8, atol=1e-11
    )


def test_steps_that_ask_for_a_graph_are_refused_by_name() -> None:
    m = perceptron()
    fam = FAM(m.parameters(), torch.optim.SGD, m[0], 0.1, "hutchinson", lr=0.1)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        fam.regularize(CE(m(X), Y)).backward(create_graph=True)


# ------------------------------------------------------------------------------- equal only now


SCALES: dict[str, Callable[[], Tensor]] = {
    "by class": lambda: torch.ones(3),
    "by class, one row": lambda: torch.ones(1, 3),
    "by row": lambda: torch.ones(6, 1),
    "one number": lambda: torch.ones(()),
    "one number in a vector": lambda: torch.ones(1),
}


@pytest.mark.parametrize("divide", [False, True], ids=["times", "over"])
@pytest.mark.parametrize("make", SCALES.values(), ids=SCALES)
def test_learned_factors_that_begin_at_one(make: Callable[[], Tensor], divide: bool) -> None:
    m = perceptron()
    m.scale = nn.Parameter(make())
    head = m[2]

    def loss() -> Tensor:
        z = m[:3](X)
        return CE(z / m.scale if divide else z * m.scale, Y)

    assert_right(m, loss, head)


def test_one_number_expanded_is_one_number() -> None:
    m = perceptron()
    m.scale = nn.Parameter(torch.tensor(1.5))
    assert_right(m, lambda: CE(m[:3](X) * m.scale.expand(3), Y), m[2])


class Coupled(nn.Module):
    """``tanh(z + w * mean of z)`` over the classes (axis 1) or over the samples (axis 0)."""

    def __init__(self, axis: int, w: float, size: int = 4, train: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, size)
        self.w, self.axis = nn.Parameter(torch.tensor(w), requires_grad=train), axis

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return torch.tanh(z + self.w * z.mean(self.axis, keepdim=True))


@pytest.mark.parametrize("w", [0.0, 0.5])
@pytest.mark.parametrize("axis", [0, 1])
def test_couplings_that_are_zero_now(axis: int, w: float) -> None:
    """Whatever was seen before: samples interact, with a weight that is zero and a gradient that is not."""
    for one in (Coupled(1, 0.5), Coupled(axis, w), Coupled(axis, w, train=False)):
        assert_right(one, lambda one=one: CE(one(X), Y), one.layer)


def test_a_branch_that_was_dropped_when_it_was_first_seen() -> None:
    torch.manual_seed(1)
    m = nn.ModuleDict({"l": nn.Linear(4, 4), "out": nn.Linear(4, 4), "h": nn.Linear(4, 3)})
    nn.init.zeros_(m["out"].weight)
    nn.init.zeros_(m["out"].bias)
    x = X.reshape(2, 3, 4)

    def loss(keep: float) -> Tensor:
        z = m["l"](x)
        mixed = (z @ z.mT).softmax(-1) @ z
        return CE(m["h"](torch.tanh(z + m["out"](mixed) * keep)).flatten(0, 1), Y)

    for keep in (0.0, 1.0):
        assert_right(m, lambda keep=keep: loss(keep), m["l"])


def test_extreme_weights_of_samples() -> None:
    """In float32 a comparison of numbers would not see the sample that counts little."""
    m = Coupled(0, 0.5).float()
    weights = torch.tensor([1e12, 1, 1, 1, 1, 1e-12])
    x = X.float()

    def loss() -> Tensor:
        return (CE(m(x), Y, reduction="none") * weights).sum()

    exact = kappa(loss, m.layer)
    torch.testing.assert_close(exact, kappa(loss, m.layer, mode="full"), rtol=1e-4, atol=0)


def test_beyond_the_limit_exact_says_how_many_products(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Coupled(0, 0.5)
    monkeypatch.setattr("fam_optim.estimators.exact.MAX_PRODUCTS", 15)
    with pytest.raises(RuntimeError, match=r"Linear\(in_features=4.*takes 16 Hess.*limit of 15.*mode='hutch"):
        kappa(lambda: CE(m(X), Y), m.layer)


def test_computed_weights_of_two_calls() -> None:
    """Computed alike they are one weight; others are refused, although they have the same numbers now."""
    layer = nn.Linear(4, 4)
    other = layer.weight.detach().clone().requires_grad_()

    def loss(*weights: Tensor) -> Tensor:
        z = sum(torch.func.functional_call(layer, {"weight": w, "bias": layer.bias}, (X,)) for w in weights)
        return CE(torch.tanh(z), Y)

    assert kappa(lambda: loss(layer.weight * 1, layer.weight * 1), layer).isfinite()
    for one in (other, other * 1, other * 2):
        with pytest.raises(RuntimeError, match="made with different weights"):
            kappa(lambda one=one: loss(layer.weight * 1, one), layer)


# ------------------------------------------------------------------- what Gauss-Newton takes for o


T = torch.ones(6, 3)
NO_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "square of a norm": lambda z: (z - T).norm(dim=1).pow(2).mean(),
    "of a shifted norm": lambda z: ((z - T).norm(dim=1) - 1).square().mean(),
    "of a clipped norm": lambda z: (1 - (z - T).norm(dim=1)).clamp_min(0).square().mean(),
    "of a norm written out": lambda z: ((z - T).square().sum(1).sqrt() / 2).square().mean(),
    "of a vector norm": lambda z: torch.linalg.vector_norm(z - T).square(),
    "of a distance": lambda z: torch.dist(z, T.to(z)) ** 2 / 6,
    "of all distances": lambda z: torch.cdist(z, T.to(z)).square().mean(),
    "of a pair's distance": lambda z: F.pairwise_distance(z, T.to(z)).square().mean(),
    "of absolute values": lambda z: (z - T).abs().sum(1).square().mean(),
    "of a mean square": lambda z: ((z - T) ** 2).mean() ** 2,
    "of a loss": lambda z: CE(z, Y).square(),
    "of a bounded norm": lambda z: z.norm(dim=1).sigmoid().square().mean(),
    "of a loss's logarithm": lambda z: CE(z, Y).log().square(),
    "squared error of a norm": lambda z: F.mse_loss(z.norm(dim=1), T[:, 0].to(z)),
    "squared error of a loss": lambda z: F.mse_loss(CE(z, Y, reduction="none"), T[:, 0].to(z)),
    "of the nearest distance": lambda z: torch.cdist(z, T.to(z)).min(1).values.square().mean(),
    "of the hardest distances": lambda z: torch.cdist(z, T.to(z)).topk(2).values.square().mean(),
    "of a largest entry": lambda z: (z - T).abs().amax(1).square().mean(),
    "of distances of pairs": lambda z: (F.pdist(z) - 1).square().mean(),
    "of a hypotenuse": lambda z: (torch.hypot(z[:, 0], z[:, 1]) - 1).square().mean(),
    "of a deviation": lambda z: (z.std(0) - 1).square().mean(),
    "of a variance": lambda z: (z.var(0) - 1).square().mean(),
    "of a variance with its mean": lambda z: (torch.var_mean(z, 0)[0] - 1).square().mean(),
    "of a margin": lambda z: F.multi_margin_loss(z, Y, reduction="none").square().mean(),
    "of a binary loss written out": lambda z: F.logsigmoid(z).mean().square(),
    "learned exponent": lambda z: ((z - 1).abs() ** torch.tensor(2.0, requires_grad=True).to(z)).mean(),
    "tensor exponent": lambda z: ((z - 1) ** torch.full((3,), 2.0).to(z)).mean(),
    "third power": lambda z: (z**3).mean(),
    "of a squared norm as a product": lambda z: ((z * z).sum(1) - 1).square().mean(),
    "of one by einsum": lambda z: (torch.einsum("ij,ij->i", z, z) - 1).square().mean(),
    "of one by matmul": lambda z: ((z[:, None] @ z[:, :, None]).flatten() - 1).square().mean(),
    "of one number": lambda z: (z.flatten() @ z.flatten()).square(),
    "of a Gram matrix": lambda z: (z.T @ z - torch.eye(3)).square().mean(),
    "of a nuclear norm": lambda z: torch.linalg.matrix_norm(z, "nuc").square(),
    "of the logarithm of a probability": lambda z: (z.softmax(1)[:, 0].log() + 1).square().mean(),
    "of a cross-entropy written out": lambda z: (z.exp().sum(1).log() - z[:, 0]).square().mean(),
    "product of a square": lambda z: (z.square() * z.square()).mean(),
}


@pytest.mark.parametrize("tail", NO_OUTPUTS.values(), ids=NO_OUTPUTS)
def test_no_outputs_of_the_network(tail: Callable[[Tensor], Tensor]) -> None:
    m = perceptron()
    for mode in ("exact", "full", "hutchinson"):
        with pytest.raises(RuntimeError, match=r"needs a loss that is known to be convex.*curvature='hess"):
            kappa(lambda: tail(m(X)), m[2], curvature="gauss_newton", mode=mode)


def product_with_itself(z: Tensor) -> Tensor:
    e = z - T
    return (e * e * torch.arange(3)).mean() + e.flatten() @ e.flatten()


def each(z: Tensor) -> Tensor:
    return CE(z, Y, reduction="none")


OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "difference": lambda z: (z - T).square().mean(),
    "average": lambda z: (z.mean(1) - 1).square().mean(),
    "both sides": lambda z: F.mse_loss(z[:3], z[3:]),
    "linear in each of two": lambda z: ((z[:, :1] * T.to(z)[:, :1]).sum(1) - 1).square().mean(),
    "scaled": lambda z: (2 * z / 3).pow(2).sum(),
    "product with itself": product_with_itself,
    "by group": lambda z: torch.zeros(3).to(z).index_add(0, Y, each(z)).cumsum(0).sum(),
    "scattered": lambda z: torch.zeros(3).to(z).scatter_add(0, Y, each(z)).amax(),
    "put in place": lambda z: torch.zeros(9).to(z).index_put((torch.arange(6),), each(z)).nanmean(),
    "copied": lambda z: F.pad(torch.zeros(6).to(z).copy_(each(z)), (1, 2)).sum(),
    "between": lambda z: torch.lerp(CE(z, Y), CE(z, Y.roll(1)), 0.3),
    "on the diagonal": lambda z: (
        -z.log_softmax(1)[:3].trace() - z.log_softmax(1)[3:].tril().diagonal(1).sum()
    ),
}


@pytest.mark.parametrize("tail", OUTPUTS.values(), ids=OUTPUTS)
def test_squares_of_outputs(tail: Callable[[Tensor], Tensor]) -> None:
    m = perceptron()
    right = definition(tail(m(X)), m[2].weight)
    for mode in ("exact", "full"):
        value = kappa(lambda: tail(m(X)), m[2], curvature="gauss_newton", mode=mode)
        torch.testing.assert_close(value, right, rtol=1e-9, atol=0)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "absolute values": torch.abs,
    "squares": torch.square,
    "log-probabilities": lambda h: h.log_softmax(1),
    "distances": lambda h: torch.cdist(h, torch.ones(5, 5).to(h)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_a_head_on_distances_puts_out_no_distance(features: Callable[[Tensor], Tensor], bias: bool) -> None:
    torch.manual_seed(1)
    body, head = nn.Linear(4, 5), nn.Linear(5, 3, bias)

    def loss() -> Tensor:
        return F.mse_loss(head(features(body(X))), T.to(X))

    right = definition(loss(), head.weight)
    values = [
        kappa(loss, layer, curvature="gauss_newton", mode=mode)
        for layer in (head, body)
        for mode in ("exact", "full")
    ]
    torch.testing.assert_close(values[0], right, rtol=1e-9, atol=0)
    torch.testing.assert_close(values[2], values[3], rtol=1e-9, atol=0)


@pytest.mark.parametrize("negative", [-1.0, -1e-3, -1e-6])
@pytest.mark.parametrize("what", ["sample", "class", "binary", "square"])
def test_negative_weights(what: str, negative: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small. On an accelerator, where nobody waits for a number, kappa is nan."""
    m = perceptron()
    of_rows, of_classes = torch.ones(6), torch.ones(3)
    of_rows[2] = of_classes[1] = negative
    tails: dict[str, Callable[[Tensor], Tensor]] = {
        "sample": lambda z: (CE(z, Y, reduction="none") * of_rows).mean(),
        "class": lambda z: CE(z, Y, of_classes.to(z), reduction="sum"),
        "binary": lambda z: F.binary_cross_entropy_with_logits(z, T, pos_weight=of_classes.to(z)),
        "square": lambda z: ((z - T).square() * of_rows[:, None]).mean(),
    }

    def value() -> Tensor:
        return kappa(lambda: tails[what](m(X)), m[2], curvature="gauss_newton")

    with pytest.raises(RuntimeError, match="counts with a negative weight"):
        value()
    monkeypatch.setattr(unnoticed, "reading_waits", lambda tensor: True)
    assert value().isnan()


# ---------------------------------------------------------------------------- derivatives on trust


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 has no second derivative of cdist")
def test_distances_to_prototypes() -> None:
    """torch's batched second derivative of cdist is wrong."""
    m = perceptron()
    m.prototypes = nn.Parameter(torch.randn(3, 3))
    assert_right(m, lambda: CE(-torch.cdist(m[:3](X), m.prototypes), Y), m[2])


# ----------------------------------------------------- state that advances, batches as they come


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("mode", ["exact", "hutchinson", "full"])
def test_batch_norm_in_a_checkpoint_counts_as_in_plain_training(mode: str, curvature: str) -> None:
    def train(with_kappa: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer, norm, head = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        m = nn.ModuleList([layer, norm, head])
        settings: dict[str, Any] = {"mode": mode, "curvature": curvature, "detach_hessian": True}
        optimizer = FAM(m.parameters(), torch.optim.SGD, layer, float(with_kappa), lr=0.0, **settings)

        def closure() -> Tensor:
            optimizer.zero_grad()
            z = checkpoint(lambda z: head(norm(z).tanh()), layer(X), use_reentrant=False)
            return CE(z, Y)

        for _ in range(2):
            optimizer.step(closure)
        return [b.clone() for b in norm.buffers()]

    for got, right in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=0)


class Counts(nn.Module):
    """Counts its calls, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.number, self.tensor = how, 0, torch.zeros(())
        self.list: list[int] = []
        self.dict = {"calls": 0}
        self.register_buffer("buffer", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        if self.how == "number":
            self.number += 1
        elif self.how == "tensor":
            self.tensor.add_(1)
        elif self.how == "another tensor":
            self.tensor = self.tensor + 1
        elif self.how == "buffer":
            self.buffer.add_(1)
        elif self.how == "list":
            self.list.append(1)
        elif self.how == "dict":
            self.dict["calls"] += 1
        else:
            self.buffer = self.buffer + 1
        return z.tanh()


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(
    "how", ["number", "tensor", "another tensor", "buffer", "another buffer", "list", "dict"]
)
def test_what_modules_count_in_a_checkpoint(how: str, curvature: str) -> None:
    counts = []
    for lam in (0.0, 0.1):
        layer, counting, head = nn.Linear(4, 5), Counts(how), nn.Linear(5, 3)
        m = nn.ModuleList([layer, head])
        fam = FAM(m.parameters(), torch.optim.SGD, layer, lam, "hutchinson", curvature=curvature, lr=0.1)
        for _ in range(2):
            fam.zero_grad()
            z = layer(X)
            loss = CE(checkpoint(lambda z, c=counting, h=head: h(c(z)), z, use_reentrant=False), Y)
            fam.regularize(loss).backward()
            fam.step()
        held = sum(counting.list) + counting.dict["calls"]
        counts.append(counting.number + counting.tensor + counting.buffer + held)
    assert counts == [4, 4]


EMPTY: dict[str, Callable[[Tensor], Tensor]] = {
    "no rows": lambda z: CE(z[:0], Y[:0], reduction="sum"),
    "nothing unmasked": lambda z: CE(z, Y.where(Y < 0, -100), reduction="sum"),
    "no rows of squares": lambda z: z[:0].square().sum(),
    "no rows of probabilities": lambda z: F.binary_cross_entropy_with_logits(z[:0], T[:0], reduction="sum"),
}


@pytest.mark.parametrize("mode", ["exact", "hutchinson", "full"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("tail", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_to_learn_from(
    tail: Callable[[Tensor], Tensor], rows: int, curvature: str, mode: str
) -> None:
    if rows == 0 and tail is EMPTY["nothing unmasked"]:
        return
    for number in (0, 2):
        m = perceptron()
        value = kappa(lambda m=m: tail(m(X[:rows])), m[number], curvature=curvature, mode=mode)
        assert value.item() == 0, f"layer {number}"
        if value.requires_grad:
            assert gradient(value, list(m.parameters())).abs().max() == 0


# -------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("few", [True, False], ids=["few classes", "many classes"])
def test_class_vectors_with_much_in_common(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "SMALL", measures.SMALL if few else 0)
    torch.manual_seed(0)
    weight, x, y = torch.randn(10, 64) + 2e4, (torch.randn(8, 64) * 1e-3).float(), torch.arange(8)
    for classes in (slice(0, 10), slice(None)):
        single, double = nn.Linear(64, 10).float(), nn.Linear(64, 10).double()
        single.weight.data[classes] = weight[classes].float()
        double.load_state_dict(single.state_dict())
        values = [kappa(lambda m=m: CE(m(x.to(m.weight)), y), m) for m in (single, double)]
        assert values[0].item() == pytest.approx(values[1].item(), rel=2e-3), "logits are in float32, too"
        grads = [gradient(v, [m.weight]) for v, m in zip(values, (single, double), strict=True)]
        assert (grads[0] - grads[1]).norm() <= 2e-3 * grads[1].norm()


IN_COMMON: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "temperatures": lambda m, x: CE(m(x) * torch.arange(1, 9).to(x)[:, None], torch.arange(8) % 5),
    "tokens": lambda m, x: CE(m(x.view(2, 4, 6)).flatten(0, 1), torch.arange(8) % 5),
    "pooled tokens": lambda m, x: CE(m(x.view(2, 4, 6)).mean(1), torch.arange(2)),
}


@pytest.mark.parametrize("by_weight", [False, True], ids=["module", "weight"])
@pytest.mark.parametrize("loss_of", IN_COMMON.values(), ids=IN_COMMON)
def test_what_class_vectors_have_in_common_cancels(loss_of: Callable[..., Tensor], by_weight: bool) -> None:
    """In float32 W W^T would keep nothing else."""
    single = seeded(lambda: nn.Linear(6, 5)).float()
    single.weight.data += 2e3
    double = copy.deepcopy(single).double()
    ways: list[dict[str, Any]] = [{"mode": "hutchinson"}] if by_weight else [{}, {"mode": "hutchinson"}]
    ways += [{"curvature": "gauss_newton", "mode": mode} for mode in ("exact", "hutchinson", "full")]
    for way in ways:
        values = []
        for m in (single, double):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(m.weight) / 100
            with observe(m) as seen:
                loss = loss_of(m, x)
            probes = torch.Generator().manual_seed(0)
            values.append(relative_flatness(loss, m.weight if by_weight else seen, generator=probes, **way))
        assert values[0].item() == pytest.approx(values[1].item(), rel=5e-3), way
        grads = [gradient(v, [m.weight]) for v, m in zip(values, (single, double), strict=True)]
        assert (grads[0] - grads[1]).norm() <= 5e-3 * grads[1].norm(), way


SURE: dict[str, Callable[[Tensor], Tensor]] = {
    "binary cross-entropy": lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)),
    "of negatives": lambda z: F.binary_cross_entropy_with_logits(-z, torch.zeros_like(z)),
    "weighted": lambda z: F.binary_cross_entropy_with_logits(
        z, torch.full_like(z, 0.9), torch.full_like(z, 2.0), pos_weight=torch.full((1,), 3.0).to(z)
    ),
    "log_sigmoid": lambda z: -F.logsigmoid(z).mean(),
    "softplus": lambda z: F.softplus(z).mean(),
    "softplus of a smaller unit": lambda z: F.softplus(z, beta=0.5, threshold=40).mean(),
}


@pytest.mark.parametrize(
    ("tail", "curvature"),
    [(tail, "hessian") for tail in SURE.values()] + [(tail, "gauss_newton") for tail in [*SURE.values()][:3]],
    ids=[*SURE, *(f"{name}, Gauss-Newton" for name in [*SURE][:3])],
)
def test_sure_predictions(tail: Callable[[Tensor], Tensor], curvature: str) -> None:
    """In float32 the curvature of one at a logit of 18 is 1.5e-8, not 0."""
    for logit in (-20.0, 4.0, 16.0, 18.0, 19.5):
        values, grads = [], []
        for dtype in (torch.float32, torch.float64):
            layer = nn.Linear(1, 1, bias=False).to(dtype)
            layer.weight.data.fill_(logit)
            x = torch.ones(2, 1, dtype=dtype)
            value = kappa(lambda m=layer, x=x: tail(m(x)), layer, curvature=curvature)
            values.append(value.item())
            grads.append(gradient(value, [layer.weight]).item())
        assert values[0] == pytest.approx(values[1], rel=1e-5), f"logit {logit}"
        assert grads[0] == pytest.approx(grads[1], rel=1e-4), f"logit {logit}"


WAYS = [
    ("hessian", "exact"),
    ("hessian", "full"),
    ("hessian", "hutchinson"),
    ("gauss_newton", "exact"),
    ("gauss_newton", "hutchinson"),
]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize(("curvature", "mode"), WAYS)
def test_sure_classes(curvature: str, mode: str, activation: type[nn.Module]) -> None:
    """In float32 the largest p rounds to one where the next logit is 17 below."""
    single = seeded(lambda: nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))).float()
    zeros = torch.zeros(6, dtype=torch.long)
    losses = [lambda z: CE(z, zeros)]
    if curvature == "hessian" and activation is nn.ReLU:  # the gradient of a difference cancels
        losses.append(lambda z: (z.logsumexp(1, keepdim=True) - z[:, :1]).mean())
    cases = itertools.product((16.0, 18.0, 60.0), (0, 2), losses)
    for gap, number, loss_of in cases:
        values, grads = [], []
        single[2].bias.data.copy_(torch.tensor([gap, 0.0, 0.5]))
        for model in (single, copy.deepcopy(single).double()):
            layer, x = model[number], X.to(model[0].weight)
            value = kappa(
                lambda model=model, x=x, loss_of=loss_of: loss_of(model(x)),
                layer,
                curvature=curvature,
                mode=mode,
                generator=torch.Generator().manual_seed(0),
            )
            values.append(value.item())
            grads.append(gradient(value, list(model.parameters())).double())
        assert values[0] == pytest.approx(values[1], rel=1e-5), f"gap {gap}, layer {number}"
        assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm(), f"gap {gap}, layer {number}"


def test_a_closed_form_that_overflows_takes_no_step() -> None:
    layer = nn.Linear(4, 3).float()
    layer.weight.data = torch.tensor([[1e20], [-1e20], [0.5e20]]).expand(3, 4).float().clone()
    before = layer.weight.detach().clone()
    optimizer = FAM(layer.parameters(), torch.optim.SGD, layer, 1.0, lr=0.1)
    x = torch.full((2, 4), 1e-20).float()
    assert CE(layer(x), Y[:2]).isfinite()
    with pytest.raises(RuntimeError, match="not finite, although the loss is"):
        optimizer.step(lambda: CE(layer(x), Y[:2]))
    assert torch.equal(layer.weight, before)


# ---------------------------------------------------------------------------- one walk for all layers


def test_what_is_asked_of_the_graph_grows_with_the_layers_not_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fam_optim.graph import nodes

    counts = []
    for layers in (10, 40):
        net = nn.Sequential(
            *[m for _ in range(layers) for m in (nn.Linear(4, 4), nn.Tanh())], nn.Linear(4, 3)
        )
        optimizer = FAM(
            net.parameters(), torch.optim.SGD, weight_layers(net)[:-1], 0.1, "hutchinson",
            curvature="gauss_newton", detach_hessian=True, lr=0.0,
        )  # fmt: skip
        calls = [0]

        def counted(ask: Callable[..., Any], calls: list[int] = calls) -> Callable[..., Any]:
            def count(*args: Any) -> Any:
                calls[0] += 1
                return ask(*args)

            return count

        with monkeypatch.context() as patch:
            for name in ("kind", "shape", "results", "metadata"):
                patch.setattr(nodes, name, counted(getattr(nodes, name)))
            optimizer.step(lambda net=net: CE(net(X), Y))
        counts.append(calls[0])
    assert counts[1] < 4.5 * counts[0]


def test_tails_of_several_layers_are_those_of_each() -> None:
    m = perceptron()
    m.add_module("3", nn.Linear(3, 3))
    a, b = m[0].weight, m[2].weight
    layers = [observe(layer) for layer in (m[0], m[2], m[3])]
    for layer in layers:
        layer.start()
    loss = CE(m[:3](X), Y) + m[0](X + 1).square().mean()
    together = find_tails(loss, [*layers, a, b])
    assert list(together) == [0, 1, 3, 4], "the loss does not depend on layer 2"
    for one, tail in zip([*layers[:2], a, b], together.values(), strict=True):
        alone = find_tails(loss, [one])[0]
        assert (alone.path, alone.ends, len(alone.uses)) == (tail.path, tail.ends, len(tail.uses))
    assert math.isclose(relative_flatness(loss, layers).item(), relative_flatness(loss, layers[:2]).item())


# ------------------------------------------------------------------------------- fused kernels


@pytest.mark.parametrize("mode", ["exact", "hutchinson", "full"])
def test_fused_attention_is_refused_before_its_backward(mode: str) -> None:
    """By Gauss-Newton's whole gradient too, whose value needs a first derivative only."""
    layer = nn.Linear(4, 4)

    def loss() -> Tensor:
        q = layer(X)[None, None]
        return CE(F.scaled_dot_product_attention(q, q, q)[0, 0], Y)

    for curvature in ("hessian", "gauss_newton"):
        with pytest.raises(RuntimeError, match=r"Fused attention has no second derivative.*SDPBackend.MATH"):
            kappa(loss, layer, curvature=curvature, mode=mode)
