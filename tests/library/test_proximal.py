"""The proximal step: its formula written out, its roots of T over all signs, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, weight_layers
from fam_optim.estimators import roots
from fam_optim.estimators.running_mean import Dense, LowRank
from fam_optim.graph.losses import find_outputs
from fam_optim.graph.reach import reach
from fam_optim.layer.kinds import weight_matrix
from tests import reference
from tests.cases import GRID, Case
from tests.library.test_gauss_newton import LOSSES, TINY, by_network_and_loss, problem, weighted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.usefixtures("float64")


class Signs:
    """The signs that roots are taken with, kept, or given one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Tensor] = []
        self.given: Iterator[Tensor] | None = None
        original = roots.rademacher

        def draw(shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
            signs = original(shape, like, generator) if self.given is None else next(self.given)
            self.drawn.append(signs.reshape(shape).to(like))
            return self.drawn[-1]

        monkeypatch.setattr(roots, "rademacher", draw)


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> Signs:
    return Signs(monkeypatch)


def roots_of(
    loss: Tensor, layers: Sequence[Any], rows: bool = True, n_samples: int = 1
) -> tuple[dict[int, Tensor], list[Any]]:
    """A of every layer by number, and what the loss is a function of."""
    weights = [weight_matrix(layer) for layer in layers]
    reached = reach(loss, [w.parameter for w in weights])
    ends = frozenset(reached.leaves.values())
    outputs = find_outputs(loss, reached.path | ends, ends, differentiable=False)
    products = roots.products_of_rows(reached, weights) if rows else {}
    found = roots.sample_roots(
        reached, outputs, weights, products, lambda device: torch.Generator(device), n_samples
    )
    return {i: root.matrix() for i, root in found.items()}, outputs


def matrix_entries(layer: Any, weight: nn.Parameter) -> Tensor:
    """The numbers of a weight's entries as W ``(d, m)``."""
    return torch.tensor(reference.entries_by_neuron(layer, weight.shape))


def true_trace(loss: Tensor, outputs: Tensor, layer: Any, weight: nn.Parameter) -> Tensor:
    """T by loops over the whole Gauss-Newton matrix, every use of the weight counting."""
    flat = reference.brute_force_gauss_newton(loss, outputs, weight).detach()
    entries = matrix_entries(layer, weight)
    return reference.trace_matrix(flat[entries][:, :, entries])


# ------------------------------------------------------------------------------------ the roots of T


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("name", TINY)
def test_mean_over_all_signs_is_the_trace(name: str, rows: bool, signs: Signs) -> None:
    torch.manual_seed(0)
    make, shape, loss_of = TINY[name]
    net, x = make(), torch.randn(shape)
    layers = weighted(net)
    wanted = [true_trace(loss_of(o := net(x)), o, layer, layer.weight) for layer in layers]
    size = net(x).numel()
    total = [torch.zeros_like(t) for t in wanted]
    for every in itertools.product((-1.0, 1.0), repeat=size):
        signs.given = iter([torch.tensor(every)])
        found, _ = roots_of(loss_of(net(x)), layers, rows)
        for t, a in zip(total, found.values(), strict=True):
            t += a @ a.mT / 2**size
    for got, right in zip(total, wanted, strict=True):
        assert torch.allclose(got, right, rtol=1e-11, atol=1e-13)


def one_hot(shapes: Sequence[torch.Size]) -> Iterator[list[Tensor]]:
    """One 1 in all of several tensors, at every place."""
    for index, shape in enumerate(shapes):
        for place in range(shape.numel()):
            vectors = [torch.zeros(other) for other in shapes]
            vectors[index].view(-1)[place] = 1.0
            yield vectors


def mean_of_squares(
    loss: Callable[[], Tensor], layers: Sequence[Any], rows: bool, signs: Signs
) -> list[Tensor]:
    """``E A A^T`` over all signs: A is linear in them, so it is the sum over one-hot vectors."""
    signs.given = None
    _, outputs = roots_of(loss(), layers, rows)
    total: dict[int, Any] = dict.fromkeys(range(len(layers)), 0.0)
    for vectors in one_hot([output.shape for output in outputs]):
        signs.given = iter(vectors)
        for i, a in roots_of(loss(), layers, rows)[0].items():
            total[i] = total[i] + a @ a.mT
    return list(total.values())


@by_network_and_loss
def test_trace_of_networks(name: str, loss: str, signs: Signs) -> None:
    """BatchNorm in train mode, several uses, every loss; in both forms."""
    net, x = problem(name)
    layers = weighted(net)
    for rows in (True, False):
        got = mean_of_squares(lambda: LOSSES[loss](net(x)), layers, rows, signs)
        for t, layer in zip(got, layers, strict=True):
            right = true_trace(LOSSES[loss](o := net(x)), o, layer, layer.weight)
            assert torch.allclose(t, right, rtol=1e-10, atol=1e-12), f"{layer}, rows {rows}"


@pytest.mark.parametrize("case", GRID[::9], ids=lambda case: case.name)
def test_trace_of_the_cases(case: Case, signs: Signs) -> None:
    """Layers x tails x losses: T, a refusal of the loss, or of a computed weight."""
    torch.manual_seed(0)
    whole = case.problem()
    (layer,) = whole.layers
    try:
        weight = weight_matrix(layer).parameter
    except TypeError as error:
        assert "is computed at every call" in str(error)
        return
    made: list[Tensor] = []
    whole.net.register_forward_hook(lambda module, inputs, out: made.append(out))
    try:
        (got,) = mean_of_squares(whole, [layer], True, signs)
    except RuntimeError as error:
        assert "convex in the network's outputs" in str(error)
        return
    outputs_of_the_loss = {"contrastive", "ce_plus_contrastive"}
    if case.name.rsplit("-", 1)[1] in outputs_of_the_loss:  # convex in what the loss makes of the outputs
        assert torch.linalg.eigvalsh(got).min() > -1e-12
        return
    right = true_trace(whole(), made[-1], layer, weight)
    assert torch.allclose(torch.as_tensor(got), right, rtol=1e-8, atol=1e-11)


def test_samples_stand_side_by_side() -> None:
    net, x = problem("perceptron")
    layers = weighted(net)
    found, _ = roots_of(LOSSES["ce"](net(x)), layers, rows=False, n_samples=3)
    for a, layer in zip(found.values(), layers, strict=True):
        assert a.shape == (layer.out_features, 3 * layer.in_features)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


ROWS_OR_NOT: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "few vectors": (wide, True),
    "batch norm in between": (
        lambda: nn.Sequential(
            nn.Linear(9, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3)
        ),
        False,
    ),
    "softmax over samples": (
        lambda: nn.Sequential(nn.Linear(9, 8), nn.Softmax(0), nn.Linear(8, 7), nn.Linear(7, 3)),
        False,
    ),
    "no bias": (lambda: nn.Sequential(nn.Linear(9, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)), True),
}


@pytest.mark.parametrize("name", ROWS_OR_NOT)
def test_rows_where_they_are_few_and_do_not_interact(name: str, signs: Signs) -> None:
    make, of_rows = ROWS_OR_NOT[name]
    torch.manual_seed(0)
    net, x = make(), torch.randn(5, 9)
    layers = weight_layers(net)[:-1]
    loss = lambda: F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0, 1]))  # noqa: E731
    found, _ = roots_of(loss(), layers)
    for a, layer in zip(found.values(), layers, strict=True):
        assert a.shape == (layer.out_features, 5 if of_rows else layer.in_features)
    for got, layer in zip(mean_of_squares(loss, layers, True, signs), layers, strict=True):
        o = net(x)
        right = true_trace(F.cross_entropy(o, torch.tensor([0, 1, 2, 0, 1])), o, layer, layer.weight)
        assert torch.allclose(got, right, rtol=1e-10, atol=1e-12)


def test_a_hook_on_the_weight_is_obeyed() -> None:
    """Rows that a hook freezes have no curvature, and so do not move."""
    net, x, y = wide(), torch.randn(5, 9), torch.tensor([0, 1, 2, 0, 1])
    net[0].weight.register_hook(lambda g: g * (torch.arange(8) > 2)[:, None])
    before = net[0].weight.detach().clone()
    fam = FAM.for_model(net, torch.optim.SGD, lr=0.1, every=1)
    for _ in range(3):
        fam.step(lambda: (fam.zero_grad(), F.cross_entropy(net(x), y))[1])
    assert torch.equal(net[0].weight[:3], before[:3])
    assert not torch.equal(net[0].weight[3:], before[3:])


# -------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("q", [3, 5, 12])
@pytest.mark.parametrize("c", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("m", [4, 2])
def test_resolvent_is_the_minimiser(m: int, c: float, q: int) -> None:
    torch.manual_seed(0)
    w, a = torch.randn(1, 5, m), torch.randn(1, 5, q)
    right = reference.minimiser(w[0], a[0] @ a[0].mT, torch.tensor(c))
    twice_c = torch.tensor([2 * c])
    for t, tolerance in ((Dense(a @ a.mT, w), 1e-12), (LowRank(a, w), 1e-10)):
        assert torch.allclose(t.solve(twice_c), right, rtol=0, atol=tolerance)
        assert t.pull.item() == pytest.approx((a @ a.mT @ w).norm().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [Dense, LowRank])
def test_resolvent_never_lengthens(form: type, dtype: torch.dtype) -> None:
    for seed, exponent in itertools.product(range(20), (-8, 0, 4, 8, 16)):
        torch.manual_seed(seed)
        w, a = torch.randn(1, 6, 5, dtype=dtype), torch.randn(1, 6, 1 + seed % 6, dtype=dtype)
        t = a @ a.mT
        moved = form(t if form is Dense else a, w).solve(torch.tensor([10.0**exponent], dtype=dtype))
        rounding = 1 + 64 * torch.finfo(dtype).eps
        assert moved.isfinite().all()
        assert moved.norm() <= w.norm() * rounding
        assert ((t @ moved) * moved).sum() <= ((t @ w) * w).sum() * rounding


BASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("n", [4, 16])
def test_steps_are_the_formula_written_out(base: str, n: int, signs: Signs) -> None:
    """Rows (4 samples) and the weights' gradient with its running mean (16), over three due steps."""
    lam, every = 0.7, 2
    net, kind = wide(), BASES[base]
    twin = copy.deepcopy(net)
    torch.manual_seed(1)
    fam = FAM.for_model(net, kind[0], lam=lam, every=every, **kind[1])
    plain = kind[0](twin.parameters(), **kind[1])
    means: dict[int, Any] = {}
    for step in range(6):
        x, y = torch.randn(n, 9), torch.randint(3, (n,))
        fam.zero_grad()
        signs.drawn.clear()
        fam.regularize(F.cross_entropy(net(x), y)).backward()
        fam.step()

        hidden = [twin[0], twin[2]]
        before = [layer.weight.detach().clone() for layer in hidden]
        due = (step + 1) % every == 0
        assert len(signs.drawn) == due
        if due:
            logits = twin(x)
            vector = reference.root_of_cross_entropy(logits.detach(), signs.drawn[0])
            inputs = [x, twin[:2](x)]
            for i, layer in enumerate(hidden):
                if n < 7:  # one row each: delta of a sample is the derivative of its own outputs
                    samples = [
                        torch.autograd.grad((logits[a] * vector[a]).sum(), layer.bias, retain_graph=True)[0]
                        for a in range(n)
                    ]
                    means[i] = sum(
                        inputs[i][a].detach().square().sum() * torch.outer(s, s)
                        for a, s in enumerate(samples)
                    )
                else:
                    (g,) = torch.autograd.grad((logits * vector).sum(), layer.weight, retain_graph=True)
                    means[i] = 0.75 * means.get(i, 0) + 0.25 * g @ g.mT
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.step()
        if due:
            with torch.no_grad():
                for i, layer in enumerate(hidden):
                    layer.weight.copy_(reference.proximal(layer.weight, before[i], means[i], lam, every))
        for got, right in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(got, right, rtol=0, atol=1e-10), f"step {step}"


def test_last_kappa_is_that_of_the_batch(signs: Signs) -> None:
    """``||A^T W||^2``, whose mean over all signs is Gauss-Newton kappa, where the base has not moved W."""
    torch.manual_seed(0)
    make, shape, loss_of = TINY["tokens"]
    net, x = make(), torch.randn(shape)
    wanted = 0.0
    for layer in weighted(net)[:-1]:
        t = true_trace(loss_of(o := net(x)), o, layer, layer.weight)
        w = layer.weight.detach().flatten(1)
        wanted += float(((w @ w.T) * t).sum())
    total, size = 0.0, net(x).numel()
    for every in itertools.product((-1.0, 1.0), repeat=size):
        twin = copy.deepcopy(net)
        signs.given = iter([torch.tensor(every)])
        fam = FAM.for_model(twin, torch.optim.SGD, lr=0.0, every=1)
        fam.step(lambda twin=twin: loss_of(twin(x)))
        assert fam.last_kappa is not None
        total += float(fam.last_kappa) / 2**size
    assert total == pytest.approx(wanted, rel=1e-10)


def test_first_order() -> None:
    """For a small lam a weight is pulled ``lam * every`` times as far as the base moved it, along ``T W``."""
    lam, every, n = 1e-6, 3, 32
    x, y = torch.randn(n, 9), torch.randint(3, (n,))
    nets = [wide() for _ in range(2)]
    for net, value in zip(nets, (0.0, lam), strict=True):
        fam = FAM.for_model(net, torch.optim.SGD, lam=value, every=every, lr=0.1)
        for _ in range(every):
            before = [layer.weight.detach().clone() for layer in (net[0], net[2])]
            fam.zero_grad()
            fam.regularize(F.cross_entropy(net(x), y)).backward()
            fam.step()
    means = [fam.regularizer.means.kept[i] for i in range(2)]
    for i, k in enumerate((0, 2)):
        w, moved = nets[0][k].weight.detach(), nets[0][k].weight.detach() - before[i]
        pull = w - nets[1][k].weight.detach()
        along = means[i] @ w
        assert pull.norm() == pytest.approx(lam * every * moved.norm().item(), rel=1e-4)
        assert (pull * along).sum() / (pull.norm() * along.norm()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [1.0, 1e4, 1e8])
def test_cannot_overshoot(lam: float, dtype: torch.dtype) -> None:
    net = wide().to(dtype)
    layers = [net[0], net[2]]
    fam = FAM.for_model(net, torch.optim.SGD, lam=lam, every=1, lr=0.5)
    for step in range(20):
        torch.manual_seed(step)
        x, y = torch.randn(16, 9, dtype=dtype), torch.randint(3, (16,))
        fam.zero_grad()
        fam.regularize(F.cross_entropy(net(x), y)).backward()
        seen: list[Tensor] = []
        original = fam.regularizer.after_step
        fam.regularizer.after_step = lambda o=original, s=seen: (  # type: ignore[method-assign]
            s.extend(layer.weight.detach().clone() for layer in layers),
            o(),
        )
        fam.step()
        del fam.regularizer.after_step
        for i, layer in enumerate(layers):
            w, t = layer.weight.detach(), fam.regularizer.means.kept[i]
            slack = 1 + 1e3 * torch.finfo(dtype).eps
            assert w.isfinite().all()
            assert w.norm() <= seen[i].norm() * slack
            assert ((t @ w) * w).sum() <= ((t @ seen[i]) * seen[i]).sum() * slack


@pytest.mark.parametrize("closure", [True, False])
def test_lam_zero_and_the_steps_in_between_are_the_bases(closure: bool) -> None:
    """Bit for bit, dropout masks and global random numbers included."""

    def train(make: Callable[[nn.Module], Any], steps: int) -> tuple[list[Tensor], Tensor]:
        net = wide()
        net.insert(2, nn.Dropout(0.3))
        optimizer = make(net)
        torch.manual_seed(3)
        for _ in range(steps):
            x, y = torch.randn(8, 9), torch.randint(3, (8,))
            optimizer.zero_grad()
            if closure:
                optimizer.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
            else:
                optimizer.regularize(F.cross_entropy(net(x), y)).backward()
                optimizer.step()
        return [p.detach() for p in net.parameters()], torch.rand(1)

    class Plain(torch.optim.SGD):
        def regularize(self, loss: Tensor) -> Tensor:
            return loss

        def step(self, f: Any = None) -> Any:
            if f is not None:
                f().backward()
            return super().step()

    base = {"lr": 0.1, "momentum": 0.9}
    for lam, steps in ((0.0, 25), (1.0, 9)):
        plain, number = train(lambda net: Plain(net.parameters(), **base), steps)
        fam, its_number = train(
            lambda net, lam=lam: FAM.for_model(net, torch.optim.SGD, lam=lam, **base), steps
        )
        assert torch.equal(number, its_number)
        assert all(torch.equal(a, b) for a, b in zip(plain, fam, strict=True))


# ---------------------------------------------------------------------------------- weights and layers


def test_transposed_convolutions_and_groups() -> None:
    for layer in (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.ConvTranspose1d(3, 5, 2),
        nn.Conv2d(4, 6, 3, groups=2),
    ):
        w = weight_matrix(layer)
        entries = matrix_entries(layer, layer.weight)
        assert torch.equal(w.of(layer.weight), layer.weight.flatten()[entries])
        assert torch.equal(w.back(w.of(layer.weight)), layer.weight)


def test_a_weight_named_twice_counts_once() -> None:
    net = wide()
    fam = FAM(net.parameters(), torch.optim.SGD, [net[0], net[0], net[0].weight], mode="proximal", lr=0.1)
    assert len(fam.regularizer.weights) == 1
