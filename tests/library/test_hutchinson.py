"""Hutchinson's estimator is unbiased, in value and in gradient, and leaves random numbers alone.

Unbiasedness needs no luck: the mean over *all* sign matrices of a tiny case is the expectation, and must
be the reference's kappa to rounding. One z-test at a fixed budget stands beside it, for the sampling.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fam_optim import FAM, relative_flatness
from fam_optim.estimators import hutchinson as estimator
from fam_optim.estimators.curvature import Curvature
from tests import reference
from tests.cases import (
    LOSSES,
    TAILS,
    Case,
    Layer,
    Problem,
    combination,
    conv1d,
    conv2d,
    linear,
    observed,
    up1d,
)
from tests.special_cases import CALLS, NESTED, bare, calls, head
from tests.support import crossed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TOLERANCE = 1e-10
MAX_SIGNS = 10


def tiny(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], kind: str, tail: str, loss: str
) -> Case:
    tails, losses = {t.name: t for t in TAILS}, {lo.name: lo for lo in LOSSES}
    case = combination(Layer(name, make, shape, kind), tails[tail], losses[loss])
    assert case is not None, f"{name}, {tail} and {loss} do not go together"
    return case


def two_layers() -> Case:
    def build() -> Problem:
        problem = calls(head, nn.Linear(2, 2), rows=2)
        problem.layers = (problem.net["stem"][0], problem.net["layer"])
        return problem

    return Case("two_layers", build)


# The rows of z are independent or not, in one call or several; m is 2 and d 2 or 3 throughout.
TINY = [
    tiny("linear", linear(2, 3), (2, 2), "features", "identity", "ce"),
    tiny("linear", linear(2, 3), (2, 2), "features", "mlp", "mse"),
    tiny("linear", linear(2, 3), (2, 2), "features", "layer_norm", "ce"),
    tiny("linear", linear(2, 2), (2, 2), "features", "tanh", "focal"),
    tiny("linear", linear(2, 2), (2, 2), "features", "relu_inplace", "bce"),
    tiny("linear", linear(2, 3), (3, 2), "features", "batch_norm_train", "ce"),
    tiny("linear", linear(2, 2), (3, 2), "features", "identity", "contrastive"),
    tiny("linear", linear(2, 2), (2, 2), "features", "coupling_of_zero", "mse"),
    tiny("linear", linear(2, 2), (2, 2), "features", "coupling_too_weak_to_see", "ce"),
    tiny("linear_vector", linear(2, 3), (2,), "vector", "tanh", "ce"),
    tiny("linear_tokens", linear(2, 2), (1, 2, 2), "tokens", "tanh", "ce"),
    tiny("linear_tokens", linear(2, 2), (2, 2, 2), "tokens", "causal_attention", "ce"),
    tiny("conv1d", conv1d(1, 2, 2, padding=1), (1, 1, 3), "maps", "tanh", "ce"),
    tiny("conv1d_positions", conv1d(1, 2, 2), (2, 1, 3), "maps", "identity", "ce_dense_maps"),
    tiny("conv2d_depthwise", conv2d(2, 2, (1, 2), groups=2), (2, 2, 2, 2), "maps", "softplus", "mse"),
    tiny("conv_transpose1d", up1d(2, 2, 1), (1, 2, 2), "maps", "gelu", "ce"),
    tiny("conv_transpose1d_groups", up1d(2, 2, 2, groups=2), (1, 2, 2), "maps", "tanh", "mse"),
    tiny("weight_norm", lambda: weight_norm(nn.Linear(2, 2)), (2, 2), "features", "tanh", "ce"),
    Case("siamese", lambda: calls(CALLS["siamese_contrastive"], nn.Linear(2, 2), rows=2)),
    Case("siamese_two_ces", lambda: calls(CALLS["siamese_two_ces"], nn.Linear(2, 2), rows=2)),
    Case("nested", lambda: calls(NESTED["nested_mse"], nn.Linear(2, 2), rows=2)),
    Case("weight_used_elsewhere", lambda: calls(CALLS["weight_used_elsewhere"], nn.Linear(2, 2), rows=2)),
    Case("bare_parameter", lambda: bare(CALLS["weight_used_elsewhere"], nn.Linear(2, 2))),
    Case("bare_parameter_nested", lambda: bare(NESTED["nested_mse"], nn.Linear(2, 2))),
    two_layers(),
]  # fmt: skip


@pytest.fixture
def over_all_signs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], list[Tensor]]], list[Tensor]]:
    """The mean of what a function returns over everything that its probes can be."""

    def mean(evaluate: Callable[[], list[Tensor]]) -> list[Tensor]:
        shapes: list[tuple[int, ...]] = []

        def record(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
            shapes.append(tuple(shape))
            return torch.ones(shape, dtype=like.dtype)

        with monkeypatch.context() as patched:
            patched.setattr(estimator, "rademacher", record)
            evaluate()
        count = sum(math.prod(shape) for shape in shapes)
        assert 0 < count <= MAX_SIGNS, f"probes of shapes {shapes} have {count} signs"

        sums: list[Tensor] = []
        for signs in product((-1.0, 1.0), repeat=count):
            with monkeypatch.context() as patched:
                patched.setattr(estimator, "rademacher", replay(iter(signs), iter(shapes)))
                terms = evaluate()
            sums = [s + t for s, t in zip(sums, terms, strict=True)] if sums else terms
        return [s / 2**count for s in sums]

    return mean


def replay(signs: Iterator[float], shapes: Iterator[tuple[int, ...]]) -> Callable[..., Tensor]:
    def rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        expected = next(shapes)
        assert tuple(shape) == expected, f"a probe of shape {shape}, of {expected} before"
        flat = [next(signs) for _ in range(math.prod(shape))]
        return torch.tensor(flat, dtype=like.dtype).reshape(shape)

    return rademacher


def relative_error(got: Tensor, wanted: Tensor, scale: Tensor) -> float:
    return ((got - wanted).norm() / scale.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize(
    ("case", "n_samples"),
    [*((case, 1) for case in TINY), (TINY[3], 2)],
    ids=lambda parameter: parameter.name if isinstance(parameter, Case) else f"{parameter}_samples",
)
def test_mean_over_all_signs_is_kappa(
    case: Case, n_samples: int, over_all_signs: Callable[..., list[Tensor]]
) -> None:
    for measure in reference.MEASURES:
        check_mean(case, measure, n_samples, over_all_signs)


def check_mean(case: Case, measure: str, n_samples: int, over_all_signs: Callable[..., list[Tensor]]) -> None:
    problem = case.problem()
    parameters = problem.trained()
    layers = reference.curvatures(problem, problem.layers, create_graph=case.whole_gradient)
    wanted = reference.sum_of_kappas(layers, measure)
    loss, layers = observed(problem)

    def estimate() -> list[Tensor]:
        kappa = relative_flatness(loss, layers, measure=measure, mode="hutchinson", n_samples=n_samples)
        gradient = reference.gradient(kappa, parameters) if case.whole_gradient else []
        return [kappa.detach(), *gradient]

    kappa, *gradient = over_all_signs(estimate)
    error = relative_error(kappa, wanted.detach(), wanted.detach())
    what = f"{case.name}, {measure}"
    assert error <= TOLERANCE, f"{what}: mean {kappa:.12g}, kappa {wanted:.12g}, error {error:.1e}"
    if case.whole_gradient:
        wanted_gradient = reference.gradient(wanted, parameters)
        whole = torch.cat([w.flatten() for w in wanted_gradient])
        errors = [relative_error(g, w, whole) for g, w in zip(gradient, wanted_gradient, strict=True)]
        wrong = {n: f"{e:.1e}" for n, e in zip(problem.names(), errors, strict=True) if not e <= TOLERANCE}
        assert not wrong, f"{what}: the mean gradient's relative errors: {wrong}"
    else:
        kappa = relative_flatness(loss, layers, measure=measure, mode="hutchinson")
        with pytest.raises(RuntimeError, match="detach_hessian"):
            kappa.backward()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_mean_over_all_signs_of_part_one(case: Case, over_all_signs: Callable[..., list[Tensor]]) -> None:
    """With a detached Hessian the mean gradient is part (I) of Lemma 1, 2 T W, and nothing else."""
    for measure in reference.MEASURES:
        check_part_one(case, measure, over_all_signs)


def check_part_one(case: Case, measure: str, over_all_signs: Callable[..., list[Tensor]]) -> None:
    problem = case.problem()
    parameters = problem.trained()
    curvatures = reference.curvatures(problem, problem.layers)
    through_weight = [
        (layer.weight * part).sum()
        for layer, part in zip(curvatures, reference.part_one(curvatures, measure), strict=True)
    ]
    wanted = reference.gradient(torch.stack(through_weight).sum(), parameters)
    layers, sgd = list(problem.layers), torch.optim.SGD
    options = {"mode": "hutchinson", "measure": measure, "detach_hessian": True}
    fam = FAM(problem.parameters(), sgd, layers, lam=1.0, lr=0.1, **options)
    loss = problem()

    def estimate() -> list[Tensor]:
        return reference.gradient(fam.regularize(loss) - loss, parameters)

    gradient = over_all_signs(estimate)
    whole = torch.cat([w.flatten() for w in wanted])
    errors = [relative_error(g, w, whole) for g, w in zip(gradient, wanted, strict=True)]
    wrong = {n: f"{e:.1e}" for n, e in zip(problem.names(), errors, strict=True) if not e <= TOLERANCE}
    assert not wrong, f"{case.name}, {measure}: relative errors of the mean gradient: {wrong}"


@pytest.mark.parametrize("measure", reference.MEASURES)
def test_probes_follow_a_tail_that_changes_under_the_same_graph(
    measure: str, over_all_signs: Callable[..., list[Tensor]]
) -> None:
    """Samples that begin to interact, and stop: right from the first evaluation on."""

    def coupled(f: nn.Module, p: Problem) -> Tensor:
        z = f(p.x)
        return torch.tanh(z + p.knob * z.mean(0)).square().mean()

    problem = calls(coupled, nn.Linear(2, 2), rows=2).double()
    for problem.knob in (torch.tensor(0.0), torch.tensor(0.9), torch.tensor(0.0)):
        wanted = reference.sum_of_kappas(reference.curvatures(problem, problem.layers), measure)
        loss, layers = observed(problem)

        def estimate(loss: Tensor = loss, layers: list[Any] = layers) -> list[Tensor]:
            return [relative_flatness(loss, layers, measure=measure, mode="hutchinson").detach()]

        (kappa,) = over_all_signs(estimate)
        error = relative_error(kappa, wanted, wanted)
        what = f"interaction {problem.knob.item()}, {measure}"
        assert error <= TOLERANCE, f"{what}: mean {kappa:.12g}, kappa {wanted:.12g}, error {error:.1e}"


@pytest.mark.parametrize("probes", [1, 3])
def test_a_probe_is_one_product(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether rows interact is read off the graph, at no product."""
    products = 0
    original = Curvature.hvp

    def counted(self: Curvature, *args: Any, **kwargs: Any) -> list[Tensor]:
        nonlocal products
        products += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Curvature, "hvp", counted)
    problem = calls(lambda f, p: torch.tanh(f(p.x)).square().mean(), nn.Linear(2, 2), rows=2).double()
    for _ in range(3):
        loss, layers = observed(problem)
        relative_flatness(loss, layers, mode="hutchinson", n_samples=probes)
    assert products == 3 * probes


SAMPLED = [
    tiny("linear", linear(5, 3), (4, 5), "features", "tanh", "ce"),
    tiny("conv2d", conv2d(2, 3, 2), (2, 2, 3, 2), "maps", "tanh", "ce"),
    tiny("linear_tokens", linear(4, 3), (2, 3, 4), "tokens", "tanh", "ce"),
]


@pytest.mark.parametrize(
    ("case", "measure"), crossed(SAMPLED, reference.MEASURES, by=1), ids=lambda one: getattr(one, "name", one)
)
def test_z_score_of_the_mean_of_1000_probes(case: Case, measure: str) -> None:
    """The value, and the gradient along one random direction. The budget is fixed; z stays below 4."""
    probes = 1000
    problem = case.problem()
    parameters = problem.trained()
    wanted = reference.sum_of_kappas(
        reference.curvatures(problem, problem.layers, create_graph=True), measure
    )
    direction = [torch.randn_like(p) for p in parameters]

    def along(kappa: Tensor) -> float:
        return sum(
            (g * d).sum().item()
            for g, d in zip(reference.gradient(kappa, parameters), direction, strict=True)
        )

    loss, layers = observed(problem)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(probes):
        kappa = relative_flatness(loss, layers, measure=measure, mode="hutchinson", generator=generator)
        draws.append([kappa.item(), along(kappa)])
    samples = torch.tensor(draws, dtype=torch.float64)
    deviation = samples.std(0) / math.sqrt(probes)
    assert (deviation > 0).all(), f"{case.name}, {measure}: probes do not differ"
    for quantity, mean, exact, std in zip(
        ("value", "gradient"), samples.mean(0), (wanted.item(), along(wanted)), deviation, strict=True
    ):
        z = abs(mean - exact) / std
        assert z < 4, (
            f"{case.name}, {measure}: {quantity} {mean:.6g} +- {std:.2g}, exact {exact:.6g}, z = {z:.1f}"
        )


@pytest.mark.parametrize("case", SAMPLED, ids=lambda case: case.name)
def test_a_generator_makes_it_reproducible_and_spares_the_global_one(case: Case) -> None:
    loss, layers = observed(case.problem())

    def kappa(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return relative_flatness(loss, layers, mode="hutchinson", n_samples=3, generator=generator).item()

    before = torch.get_rng_state()
    first, again, other = kappa(0), kappa(0), kappa(1)
    assert first == again, f"{case.name}: {first} and {again} with the same seed"
    assert first != other, f"{case.name}: {first} with two seeds"
    assert torch.equal(torch.get_rng_state(), before), f"{case.name}: the global generator advanced"


@pytest.mark.parametrize("case", SAMPLED, ids=lambda case: case.name)
def test_without_a_generator_the_global_one_advances_by_the_probes(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, layers = observed(case.problem())
    draw, drawn = estimator.rademacher, []

    def recording(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        drawn.append(shape)
        return draw(shape, like, generator)

    monkeypatch.setattr(estimator, "rademacher", recording)
    torch.manual_seed(1)
    first = relative_flatness(loss, layers, mode="hutchinson", n_samples=2).item()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    again = relative_flatness(loss, layers, mode="hutchinson", n_samples=2).item()
    assert first == again, f"{case.name}: {first} and {again} from the same global seed"

    torch.manual_seed(1)
    for shape in drawn[: len(drawn) // 2]:
        draw(shape, torch.ones(()), None)
    assert torch.equal(torch.get_rng_state(), after), f"{case.name}: more was drawn than probes of {drawn}"
