"""Gauss-Newton curvature: the definition's value and whole gradient, never negative, all layers at once."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fam_optim import FAM, dataset_relative_flatness, observe, relative_flatness, unnoticed, weight_layers
from fam_optim.estimators import gauss_newton as module
from tests import reference

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.tensor([0, 2, 1, 0])
WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
SOFT = torch.tensor([[0.2, 0.5, 0.3], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8], [0.6, 0.4, 0.0]], dtype=torch.float64)


NETWORKS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)),
        (4, 5),
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.GELU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        ),
        (4, 5),
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
        (4, 5),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2),
            nn.GELU(),
            nn.Conv2d(4, 2, 2, groups=2),
            nn.Flatten(),
            nn.Linear(2, 3),
        ),
        (4, 1, 4, 4),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(2, 2, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
        ),
        (4, 2, 2),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 3)),
        (4, 2, 5),
    ),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "ce": lambda o: F.cross_entropy(o, Y),
    "ce sum": lambda o: F.cross_entropy(o, Y, reduction="sum"),
    "ce weights smoothing": lambda o: F.cross_entropy(o, Y, weight=WEIGHT, label_smoothing=0.1),
    "ce ignore_index": lambda o: F.cross_entropy(o, Y, ignore_index=2),
    "ce soft targets": lambda o: F.cross_entropy(o, SOFT),
    "ce scaled and shifted": lambda o: F.cross_entropy(o / 3 + WEIGHT, Y),
    "two softmaxes": lambda o: F.cross_entropy(o, Y) + 0.3 * F.cross_entropy(o.flip(1) * 2, Y),
    "bce": lambda o: F.binary_cross_entropy_with_logits(o, SOFT),
    "bce weights": lambda o: F.binary_cross_entropy_with_logits(
        o, SOFT, weight=WEIGHT, pos_weight=WEIGHT.flip(0)
    ),
    "bce none": lambda o: (F.binary_cross_entropy_with_logits(o, SOFT, reduction="none") * SOFT).sum(),
    "mse": lambda o: F.mse_loss(o, SOFT),
    "mse sum": lambda o: F.mse_loss(SOFT, o, reduction="sum"),
    "mse none": lambda o: (F.mse_loss(o, SOFT, reduction="none").mean(1) * SOFT[:, 0]).sum(),
    "square": lambda o: 3 * (o - SOFT).square().sum(1).mean(),
    "power": lambda o: ((SOFT - o) ** 2).mean(),
    "sum": lambda o: F.cross_entropy(o, Y) + 0.1 * F.mse_loss(o, SOFT),
    "huber": lambda o: (
        F.huber_loss(SOFT, o, delta=0.4)
        + (F.smooth_l1_loss(o, SOFT, reduction="none", beta=0.3) * SOFT).sum()
    ),
    "softplus": lambda o: F.softplus(-o, beta=2).mean() - F.logsigmoid(o[:, 0] - o[:, 1]).sum(),
    "bce written out": lambda o: (F.softplus(o) - SOFT * o).mean() + 0.1 * o.mean(),
    "ce written out": lambda o: (2 * o.logsumexp(1) - 2 * o[torch.arange(len(Y)), Y]).mean(),
    "logsumexp": lambda o: (o / 2 + WEIGHT).logsumexp(1, keepdim=True).sum(),
    "the largest": lambda o: F.cross_entropy(o, Y, reduction="none").topk(2).values.mean(),
}


def weighted(net: nn.Module) -> list[Any]:
    return [
        m
        for m in net.modules()
        if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.dim() > 1
    ]


def matrix_of(layer: Any) -> Tensor:
    """The weight as (d, m)."""
    weight: Tensor = layer.weight
    return weight.transpose(0, 1).flatten(1) if isinstance(layer, nn.ConvTranspose1d) else weight.flatten(1)


def definition(
    net: nn.Module, x: Tensor, loss_of: Callable[[Tensor], Tensor], layer: Any, measure: str
) -> Tensor:
    made: list[Tensor] = []

    def loss() -> Tensor:
        made.append(net(x))
        return loss_of(made[-1])

    return reference.sum_of_kappas(reference.curvatures(loss, [layer], outputs=lambda: made[-1]), measure)


def gradient(value: Tensor, net: nn.Module) -> Tensor:
    parameters = list(net.parameters())
    found = torch.autograd.grad(
        value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in found])


def assert_same(value: Tensor, wanted: Tensor, net: nn.Module, what: str = "") -> None:
    assert value.item() == pytest.approx(wanted.item(), rel=1e-9), what
    actual, right = gradient(value, net), gradient(wanted, net)
    assert (actual - right).norm() <= 1e-8 * right.norm(), what


def problem(name: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    return make(), torch.randn(shape)


# Where rows do not interact, samples do not, and all do, every loss; elsewhere one of every sort.
EVERY_LOSS = ("perceptron", "convolutions", "batch norm")
ONE_OF_A_SORT = ("ce", "bce weights", "mse none")


by_network_and_loss = pytest.mark.parametrize(
    ("name", "loss"),
    [(name, loss) for name in NETWORKS for loss in LOSSES if name in EVERY_LOSS or loss in ONE_OF_A_SORT],
)


@by_network_and_loss
def test_exact_and_full_are_the_definition(name: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large layers compute it; the other tests take the way of small ones."""
    monkeypatch.setattr("fam_optim.estimators.measure.CHEAP", 0)
    net, x = problem(name)
    for layer, measure in itertools.product(weighted(net), reference.MEASURES):
        wanted = definition(net, x, LOSSES[loss], layer, measure)
        for mode in ("exact", "full"):
            with observe(layer) as observed:
                value = LOSSES[loss](net(x))
            kappa = relative_flatness(value, observed, mode=mode, measure=measure, curvature="gauss_newton")
            assert_same(kappa, wanted, net, f"{layer}, {measure}, {mode}")


@pytest.mark.parametrize("mode", ["exact", "full"])
@pytest.mark.parametrize("name", NETWORKS)
def test_several_layers_add_up(name: str, mode: str) -> None:
    net, x = problem(name)
    layers = weighted(net)
    wanted = sum(
        definition(net, x, LOSSES["ce"], layer, "neuronwise") / matrix_of(layer).shape[1] for layer in layers
    )
    observed = [observe(layer).__enter__() for layer in layers]
    loss = LOSSES["ce"](net(x))
    kappa = relative_flatness(loss, observed, mode=mode, curvature="gauss_newton", normalize=True)
    assert_same(kappa, wanted, net)


def test_several_layers_cost_one_backward_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    original = module.Jacobian.pull

    def pull(self: Any, r: Any) -> Any:
        nonlocal counted
        counted += 1
        return original(self, r)

    monkeypatch.setattr(module.Jacobian, "pull", pull)
    net, x = problem("perceptron")
    for mode, products in (("hutchinson", 2), ("exact", 3), ("full", 12)):
        counted = 0
        observed = [observe(layer).__enter__() for layer in weighted(net)]
        relative_flatness(LOSSES["ce"](net(x)), observed, mode=mode, n_samples=2, curvature="gauss_newton")
        assert counted == products, mode


@pytest.mark.parametrize("measure", reference.MEASURES)
@pytest.mark.parametrize("loss", ["ce", "bce", "mse"])
def test_is_the_hessians_on_last_layers_and_behind_piecewise_linear_ones(loss: str, measure: str) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
        torch.randn(4, 5),
    )
    for layer in weighted(net):
        kappas = []
        for curvature in ("gauss_newton", "hessian"):
            with observe(layer) as observed:
                value = LOSSES[loss](net(x))
            kappas.append(relative_flatness(value, observed, measure=measure, curvature=curvature))
        assert_same(*kappas, net)


TINY: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "rows": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2)),
        (3, 2),
        lambda o: F.cross_entropy(o, torch.tensor([0, 1, 0])),
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.GELU(), nn.Linear(2, 2)),
        (3, 2),
        lambda o: F.cross_entropy(o, torch.tensor([0, 1, 0])),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2)),
        (2, 2, 2),
        lambda o: F.binary_cross_entropy_with_logits(o, torch.full((2, 2), 0.3)),
    ),
    "strided convolution": (
        lambda: nn.Sequential(nn.Conv1d(1, 2, 2, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(4, 2)),
        (2, 1, 4),
        lambda o: F.mse_loss(o, torch.ones(2, 2)),
    ),
}


@pytest.mark.parametrize("measure", reference.MEASURES)
@pytest.mark.parametrize("name", TINY)
def test_mean_over_all_signs_is_exact(name: str, measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and whole gradient, to rounding; two layers at once."""
    torch.manual_seed(0)
    make, shape, loss_of = TINY[name]
    net, x = make(), torch.randn(shape)
    layers = weighted(net)
    wanted = sum(definition(net, x, loss_of, layer, measure) for layer in layers)
    total: Any = 0.0
    outputs = net(x).numel()
    for signs in itertools.product((-1.0, 1.0), repeat=outputs):
        monkeypatch.setattr(
            module, "rademacher", lambda shape, like, generator, s=signs: like.new_tensor(s).view(shape)
        )
        observed = [observe(layer).__enter__() for layer in layers]
        value = loss_of(net(x))
        total = total + relative_flatness(
            value, observed, mode="hutchinson", measure=measure, curvature="gauss_newton"
        )
    assert_same(total / 2**outputs, wanted, net)


def test_positive_where_the_hessians_is_negative() -> None:
    negative = 0
    for seed in range(40):
        torch.manual_seed(seed)
        net, x = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)), torch.randn(4, 5)
        kappas = {}
        for curvature in ("hessian", "gauss_newton"):
            with observe(net[0]) as observed:
                loss = F.cross_entropy(net(x), Y)
            kappas[curvature] = relative_flatness(loss, observed, curvature=curvature).item()
        negative += kappas["hessian"] < 0
        assert kappas["gauss_newton"] > 0
    assert negative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_never_negative_in_any_precision(dtype: torch.dtype) -> None:
    """Forty random networks; where all class vectors are one, kappa is 0 and rounding all there is."""
    for seed in range(40):
        torch.manual_seed(seed)
        head = [nn.Flatten(), nn.Linear(4, 3)] if seed % 2 else [nn.GELU(), nn.Conv1d(2, 3, 2, padding=1)]
        body = nn.Linear(4, 3), nn.GELU(), nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2)
        net = nn.Sequential(*body, *head).float()
        zero = seed % 4 > 1
        with torch.no_grad():
            for p in net.parameters():
                p *= 10 ** float(torch.randn(()))
            if zero:
                net[5].weight[:] = net[5].weight[0]
        layer = observe(net[5 if zero else seed // 4 % 2 * 3]).__enter__()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = net(torch.randn(4, 4).float())
            loss = F.cross_entropy(out, Y.reshape(-1, *[1] * (out.dim() - 2)).expand(out[:, 0].shape))
        for mode in ("exact", "hutchinson", "full"):
            kappa = relative_flatness(loss, layer, mode=mode, curvature="gauss_newton")
            assert kappa >= 0, f"seed {seed}, {layer}, {mode}: {kappa}"


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convolutions_before_batch_norm_under_autocast(dtype: torch.dtype, detach: bool) -> None:
    """Where a convolution's own node computes in low precision, its derivative in the weight does not."""

    def step(enabled: bool) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 4, 2),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ).float()
        settings = {"curvature": "gauss_newton", "mode": "hutchinson", "detach_hessian": detach}
        fam = FAM(net.parameters(), torch.optim.SGD, weight_layers(net)[:-1], lam=1.0, lr=1.0, **settings)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = F.cross_entropy(net(torch.randn(4, 3, 5, 5).float()), Y)
        fam.regularize(loss).backward()
        assert fam.last_kappa is not None and fam.last_kappa.dtype == torch.float32
        return fam.last_kappa, torch.cat([p.grad.flatten() for p in net.parameters()])

    (kappa, gradient), (wanted, wanted_gradient) = step(True), step(False)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(kappa, wanted, rtol=8 * eps, atol=0)
    # BatchNorm's derivatives magnify what the forward has rounded.
    assert (gradient - wanted_gradient).norm() <= 32 * eps * wanted_gradient.norm()


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "focal": lambda o: ((1 - o.softmax(1)[:, 0]) ** 2 * F.cross_entropy(o, Y, reduction="none")).mean(),
    "dice": lambda o: 1 - (o.sigmoid() * SOFT).sum() / (o.sigmoid().sum() + SOFT.sum()),
    "logsumexp of all": lambda o: o.logsumexp((0, 1)),
    "logsumexp of losses": lambda o: F.mse_loss(o, SOFT, reduction="none").logsumexp(1).sum(),
    "linear below the output": lambda o: F.softplus(o.tanh()).mean() - o.mean(),
    "fourth power": lambda o: (o - SOFT).pow(4).mean(),
    "exponential of a cross-entropy": lambda o: F.cross_entropy(o, Y).exp(),
    "product of outputs": lambda o: F.mse_loss(o, o.detach() + o.roll(1, 0)) * F.cross_entropy(o, Y),
}


@pytest.mark.parametrize("mode", ["exact", "hutchinson", "full"])
@pytest.mark.parametrize("loss", UNKNOWN.values(), ids=UNKNOWN)
def test_a_loss_that_is_not_known_is_refused(loss: Callable[[Tensor], Tensor], mode: str) -> None:
    net, x = problem("perceptron")
    with observe(net[0]) as layer:
        value = loss(net(x))
    with pytest.raises(
        RuntimeError, match=r"softmax cross-entropy, binary.*squared error.*curvature='hessian'"
    ):
        relative_flatness(value, layer, mode=mode, curvature="gauss_newton")


@pytest.mark.parametrize("later", [False, True])
def test_negative_weights_are_refused(later: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unnoticed, "reading_waits", lambda tensor: later)
    net, x = problem("perceptron")

    def kappa(weight: float) -> Tensor:
        with observe(net[0]) as layer:
            rows = F.cross_entropy(net(x), Y, reduction="none")
            loss = (rows * torch.tensor([1.0, 1.0, weight, 1.0])).sum()
        return relative_flatness(loss, layer, mode="hutchinson", curvature="gauss_newton")

    if later:  # as on an accelerator, where nobody waits for a number
        assert kappa(-1.0).isnan()
    else:
        with pytest.raises(RuntimeError, match="negative weight"):
            kappa(-1.0)
    assert kappa(0.0).isfinite()


def test_terms_that_do_not_depend_on_the_layer_do_not_matter() -> None:
    net, x = problem("perceptron")
    with observe(net[4]) as layer:
        loss = F.cross_entropy(net(x), Y)
        kappas = [
            relative_flatness(value, layer, curvature="gauss_newton")
            for value in (loss, loss + net[0].weight.abs().sum().exp() + net[2](net[0](x)).sin().prod())
        ]
    torch.testing.assert_close(*kappas)


def brier_and_cross_entropy(o: Tensor) -> list[tuple[Tensor, Tensor]]:
    log_p = o.log_softmax(1)
    p = log_p.exp()
    return [(F.nll_loss(log_p, Y), o), ((p - SOFT).square().mean(), p)]


def prototypes_and_distances(o: Tensor) -> list[tuple[Tensor, Tensor]]:
    difference = o[:, None] - torch.eye(3)
    squares = difference.square()
    logits = -squares.sum(-1)
    return [(F.cross_entropy(logits, Y), logits), (squares.mean(), difference)]


@pytest.mark.parametrize("mode", ["exact", "full"])
@pytest.mark.parametrize("parts", [brier_and_cross_entropy, prototypes_and_distances])
def test_a_term_that_is_computed_from_another(parts: Callable[[Tensor], Any], mode: str) -> None:
    """Each counts with the outputs of its own, and with its own coefficient alone."""
    net, x = problem("perceptron")
    for layer in weighted(net):
        wanted = sum(
            reference.gauss_newton_traces(o, part, layer.weight, "neuronwise") for part, o in parts(net(x))
        )
        with observe(layer) as observed:
            loss = sum(part for part, _ in parts(net(x)))
        kappa = relative_flatness(loss, observed, mode=mode, curvature="gauss_newton")
        assert_same(kappa, wanted, net, str(layer))


def test_too_many_products_are_refused_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PRODUCTS", 3)
    net, x = problem("perceptron")
    with observe(net[0]) as layer:
        loss = F.cross_entropy(net(x), Y)
    relative_flatness(loss, layer, curvature="gauss_newton")
    net, x = problem("batch norm")  # samples interact: a product for every output of every one
    with observe(net[0]) as layer:
        loss = F.cross_entropy(net(x), Y)
    with pytest.raises(RuntimeError, match=r"takes 12 vector-Jacobian products here.*mode='hutchinson'"):
        relative_flatness(loss, layer, curvature="gauss_newton")


def lstm() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    recurrent, head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)
    return nn.ModuleList([recurrent, head]), lambda z: head(recurrent(z[:, None])[0][:, -1])


def attention() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    head = nn.Linear(4, 3)

    def tail(z: Tensor) -> Tensor:
        q = z[None, None]
        return head(F.scaled_dot_product_attention(q, q, q)[0, 0])

    return head, tail


def reentrant() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    head = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))
    return head, lambda z: checkpoint(head, z, use_reentrant=True)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (1 - z.tanh().square())


def once_differentiable() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    head = nn.Linear(4, 3)
    return head, lambda z: head(Once.apply(z))


def compiled() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    head = nn.Linear(4, 3)
    return head, torch.compile(lambda z: head(z.tanh()), backend="aot_eager")


@pytest.mark.parametrize("make", [lstm, attention, once_differentiable, compiled])
def test_with_the_jacobian_held_constant_a_first_derivative_is_enough(make: Callable[[], Any]) -> None:
    """The gradient is ``2 T W``, with the T of the same tail in operations that torch can differentiate."""
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # as the error says
        check_first_derivative(make)


def check_first_derivative(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    tail_module, tail = make()
    x = torch.randn(4, 5)
    with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
        plain = {
            once_differentiable: lambda z: tail_module(z.tanh()),
            compiled: lambda z: tail_module(z.tanh()),
        }
        outputs = plain.get(make, tail)(layer(x))
        jacobians = reference.gauss_newton_traces(
            outputs, F.cross_entropy(outputs, Y), layer.weight, "neuronwise"
        )
    fam = FAM([*layer.parameters(), *tail_module.parameters()], torch.optim.SGD, layer, 0.5, "exact",
              curvature="gauss_newton", detach_hessian=True, lr=0.0)  # fmt: skip
    loss = F.cross_entropy(tail(layer(x)), Y)
    plain_gradient = torch.autograd.grad(F.cross_entropy(tail(layer(x)), Y), layer.weight)[0]
    fam.regularize(loss).backward()
    assert fam.last_kappa is not None and layer.weight.grad is not None
    assert fam.last_kappa.item() == pytest.approx(jacobians.item(), rel=1e-6 if make is lstm else 1e-9)
    # kappa is quadratic in W where T is constant: <W, 2 T W> = 2 kappa.
    part_one = (layer.weight.grad - plain_gradient) / 0.5
    assert (part_one * layer.weight).sum().item() == pytest.approx(2 * fam.last_kappa.item(), rel=1e-9)


def test_the_whole_gradient_needs_a_second_derivative() -> None:
    """Which torch would leave out of a derivative with respect to chosen inputs without a word."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4)
    head, tail = once_differentiable()
    with observe(layer) as observed:
        loss = F.cross_entropy(tail(layer(torch.randn(4, 5))), Y)
    with pytest.raises(RuntimeError, match=r"\(function Once\).*once_differentiable"):
        relative_flatness(loss, observed, mode="hutchinson", curvature="gauss_newton")
    assert head.weight.grad is None


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    # torch's own limit: such a checkpoint has no derivative with respect to chosen inputs.
    "reentrant checkpoint": (reentrant, "use_reentrant=False"),
    "compiled, buffers given away": (compiled, "donated_buffer = False"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
@torch._functorch.config.patch(donated_buffer=True)
def test_tails_that_allow_no_derivative_beside_the_backward(make: Callable[[], Any], message: str) -> None:
    torch.compiler.reset()
    layer = nn.Linear(5, 4)
    head, tail = make()
    F.cross_entropy(
        tail(layer(torch.randn(4, 5))), Y
    ).backward()  # the first backward of a region compiles it
    fam = FAM([*layer.parameters(), *head.parameters()], torch.optim.SGD, layer, 0.5, "hutchinson",
              curvature="gauss_newton", detach_hessian=True, lr=0.1)  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        fam.regularize(F.cross_entropy(tail(layer(torch.randn(4, 5))), Y))


@pytest.mark.parametrize(("mode", "convolution"), [("exact", False), ("exact", True), ("hutchinson", False)])
def test_parameters_shared_and_nested_layers(mode: str, convolution: bool) -> None:
    """Every use counts, and what they do to each other in the first derivative."""
    torch.manual_seed(0)
    layer, head = nn.Conv1d(2, 2, 2, padding="same") if convolution else nn.Linear(4, 4), nn.Linear(4, 3)
    net = nn.ModuleList([layer, head])
    x = torch.randn(4, 2, 2) if convolution else torch.randn(4, 4)

    def forward(x: Tensor) -> Tensor:
        z: Tensor = head(torch.tanh(layer(torch.tanh(layer(x)))).flatten(1))
        return z

    outputs = forward(x)
    wanted = reference.gauss_newton_traces(outputs, F.cross_entropy(outputs, Y), layer.weight, "neuronwise")
    for of in (layer, layer.weight):
        observed = observe(of).__enter__() if isinstance(of, nn.Module) else of
        loss = F.cross_entropy(forward(x), Y)
        if mode == "exact":
            assert_same(relative_flatness(loss, observed, curvature="gauss_newton"), wanted, net)
        else:
            kappa = relative_flatness(loss, observed, mode=mode, n_samples=1500, curvature="gauss_newton")
            assert kappa.item() == pytest.approx(wanted.item(), rel=0.15)


@pytest.mark.parametrize("style", ["returns loss", "calls backward", "regularize"])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("name", ["perceptron", "batch norm"])
def test_a_step_is_that_of_the_objective(name: str, style: str, detach: bool) -> None:
    net, x = problem(name)
    other, _ = problem(name)
    layers = weighted(net)[:-1]
    fam = FAM(
        net.parameters(),
        torch.optim.SGD,
        layers,
        0.2,
        curvature="gauss_newton",
        detach_hessian=detach,
        lr=0.1,
    )
    plain = torch.optim.SGD(other.parameters(), lr=0.1)

    def closure() -> Tensor:
        fam.zero_grad()
        loss = F.cross_entropy(net(x), Y)
        if style == "calls backward":
            loss.backward()
        return loss

    for _ in range(3):
        if style == "regularize":
            fam.zero_grad()
            fam.regularize(F.cross_entropy(net(x), Y)).backward()
            fam.step()
        else:
            fam.step(closure)
        outputs = other(x)
        loss = F.cross_entropy(outputs, Y)
        plain.zero_grad()
        if detach:
            for layer in weighted(other)[:-1]:
                traces = block_traces(outputs, layer.weight)
                loss = loss + 0.2 * (layer.weight @ layer.weight.T * traces).sum()
        else:
            for layer in weighted(other)[:-1]:
                loss = loss + 0.2 * reference.gauss_newton_traces(
                    outputs, F.cross_entropy(outputs, Y), layer.weight, "neuronwise"
                )
        loss.backward()
        plain.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def block_traces(outputs: Tensor, weight: Tensor) -> Tensor:
    """T of ``J^T B J``, a constant."""
    jacobian = torch.stack([torch.autograd.grad(o, weight, retain_graph=True)[0] for o in outputs.flatten()])
    (slope,) = torch.autograd.grad(F.cross_entropy(outputs, Y), outputs, create_graph=True)
    rows = [torch.autograd.grad(entry, outputs, retain_graph=True)[0].flatten() for entry in slope.flatten()]
    return torch.einsum("ast,ab,but->su", jacobian, torch.stack(rows), jacobian).detach()


def test_data_set_and_generator() -> None:
    net, x = problem("perceptron")
    whole = dataset_relative_flatness(net, net[0], F.cross_entropy, [(x, Y)], curvature="gauss_newton")
    parts = dataset_relative_flatness(
        net, net[0], F.cross_entropy, [(x[:1], Y[:1]), (x[1:], Y[1:])], curvature="gauss_newton"
    )
    torch.testing.assert_close(whole, parts, rtol=1e-9, atol=0)
    values = []
    for _ in range(2):
        with observe(net[0]) as layer:
            loss = F.cross_entropy(net(x), Y)
        generator = torch.Generator().manual_seed(3)
        values.append(
            relative_flatness(loss, layer, mode="hutchinson", curvature="gauss_newton", generator=generator)
        )
    assert torch.equal(*values)


def test_unknown_curvature() -> None:
    with pytest.raises(ValueError, match=r"`curvature` to be one of.*'hessian', 'gauss_newton'.*'fisher'"):
        FAM(nn.Linear(2, 2).parameters(), torch.optim.SGD, nn.Linear(2, 2), curvature="fisher", lr=0.1)


def test_weight_layers() -> None:
    """In the order of the model, each once; the weight itself where its owner multiplies with it."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Sequential(shared, nn.GELU(), shared), nn.Embedding(3, 4),
        nn.MultiheadAttention(4, 2), nn.ConvTranspose2d(1, 1, 1), nn.Linear(4, 3, bias=False),
    )  # fmt: skip
    attention = model[4]
    expected = [model[0], shared, attention.in_proj_weight, attention.out_proj.weight, model[5], model[6]]
    assert [id(layer) for layer in weight_layers(model)] == [id(layer) for layer in expected]
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    fam = FAM(block.parameters(), torch.optim.SGD, weight_layers(block), mode="hutchinson",
              curvature="gauss_newton", detach_hessian=True, lr=0.1)  # fmt: skip
    fam.step(lambda: F.mse_loss(block(torch.randn(2, 3, 4)), torch.zeros(2, 3, 4)))
    assert fam.last_kappa is not None and fam.last_kappa > 0


@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
def test_loops_people_have(mode: str) -> None:
    """Accumulation and a GradScaler: the step of the full batch, in plain arithmetic."""
    results = {}
    for loop in ("plain", "micro-batches", "scaled", "closure of micro-batches"):
        net, x = problem("perceptron")
        hidden = weight_layers(net)[:-1]
        generator = torch.Generator().manual_seed(1)
        fam = FAM(net.parameters(), torch.optim.SGD, hidden, 0.3, mode, curvature="gauss_newton",
                  generator=generator, lr=0.1)  # fmt: skip
        halves = [(x[:2], Y[:2]), (x[2:], Y[2:])]
        fam.zero_grad()
        if loop == "plain":
            fam.regularize(F.cross_entropy(net(x), Y)).backward()
            fam.step()
        elif loop == "micro-batches":
            for a, b in halves:
                (fam.regularize(F.cross_entropy(net(a), b)) / 2).backward()
            fam.step()
        elif loop == "scaled":
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(fam.regularize(F.cross_entropy(net(x), Y))).backward()
            scaler.step(fam)
        else:

            def closure(net: nn.Module = net, fam: FAM = fam, halves: Any = halves) -> Tensor:
                total = torch.zeros(())
                for a, b in halves:
                    loss = F.cross_entropy(net(a), b) / 2
                    loss.backward()
                    total += loss.detach()
                return total

            fam.step(closure)
        results[loop] = [p.detach() for p in net.parameters()]
    for loop, parameters in results.items():
        for p, q in zip(parameters, results["plain"], strict=True):
            torch.testing.assert_close(
                p, q, rtol=1e-9, atol=1e-12, msg=lambda text, loop=loop: f"{loop}: {text}"
            )
