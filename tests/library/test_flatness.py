"""kappa's value and gradient, modes full and exact, against the definition by loops.

Finite differences check the reference's gradient, and the reference checks both modes: `exact` over all
cases, since it reads layer, tail and loss off the graph; what depends on one of them over a few, in which
each of them is.
Then what these cannot show: tails that change under an unchanged graph, and sizes at which only the
closed form of a softmax cross-entropy is possible.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fam_optim import FAM, observe, relative_flatness
from tests import reference
from tests.cases import GRID, Case, Problem, each, observed, pairs
from tests.special_cases import CHANGES, SPECIAL, Change, calls
from tests.support import covering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

VALUE, GRADIENT, SINGLE = 1e-9, 1e-8, 1e-4
FLOOR = 1e-6
"""Errors are relative, except to what is smaller than this (a kappa of zero, say)."""

ALL = [*GRID, *SPECIAL]
EXACT = [case for case in ALL if "exact" in case.modes]


def families(case: Case) -> Iterable[object]:
    """Its layer, and a family of tails with a family of losses."""
    if not case.parts:
        return [case.name]
    layer, tail, loss = case.parts
    return layer, (tail.family, loss.family)


def by_name(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class Expected(NamedTuple):
    """What the reference says of one case and measure."""

    kappa: Tensor
    normalized: Tensor
    gradient: list[Tensor]
    part_one: list[Tensor]


@cache
def expected(case: Case) -> dict[str, Expected]:
    problem = case.problem()
    parameters = problem.trained()
    layers = reference.curvatures(problem, problem.layers, create_graph=case.whole_gradient)
    result = {}
    for measure in reference.MEASURES:
        kappa = reference.sum_of_kappas(layers, measure)
        parts = reference.part_one(layers, measure)
        through_weight = torch.stack(
            [(la.weight * g).sum() for la, g in zip(layers, parts, strict=True)]
        ).sum()
        result[measure] = Expected(
            kappa.detach(),
            reference.sum_of_kappas(layers, measure, normalize=True).detach(),
            reference.gradient(kappa, parameters) if case.whole_gradient else [],
            reference.gradient(through_weight, parameters),
        )
    return result


@cache
def expected_gauss_newton(case: Case) -> dict[str, Expected]:
    """The same of the Gauss-Newton part, in what the case's network puts out."""
    problem = case.problem()
    parameters = problem.trained()
    made: list[Tensor] = []
    problem.net.register_forward_hook(lambda module, inputs, out: made.append(out))
    layers = reference.curvatures(problem, problem.layers, outputs=lambda: made[-1])
    result = {}
    for measure in reference.MEASURES:
        kappa = reference.sum_of_kappas(layers, measure)
        result[measure] = Expected(kappa.detach(), kappa.detach(), reference.gradient(kappa, parameters), [])
    return result


def check_value(got: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == (), f"{what}: expected a scalar, got shape {tuple(got.shape)}"
    error = abs(got.item() - wanted.item()) / max(abs(wanted.item()), FLOOR)
    assert error <= tolerance, (
        f"{what}: kappa is {got.item():.12g}, expected {wanted.item():.12g}, error {error:.1e}"
    )


def check_gradient(
    got: Sequence[Tensor], wanted: Sequence[Tensor], names: Sequence[str], tolerance: float, what: str
) -> None:
    """Every parameter's error, relative to the norm of the whole gradient."""
    norm = max(torch.stack([w.square().sum() for w in wanted]).sum().sqrt().item(), FLOOR)
    errors = {n: (g - w).norm().item() / norm for n, g, w in zip(names, got, wanted, strict=True)}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{what}: relative errors of kappa's gradient beyond {tolerance:.0e}: {wrong}"


def gradient(kappa: Tensor, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """kappa's gradient, taken as a user does: through loss + kappa. A kappa of 0 may come without a graph."""
    return list(
        torch.autograd.grad(
            kappa + 0 * loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def check(case: Case, mode: str) -> None:
    problem = case.problem()
    loss, layers = observed(problem)
    random_numbers = torch.get_rng_state()
    for measure, wanted in expected(case).items():
        what = f"{case.name}, {mode}, {measure}"
        kappa = relative_flatness(loss, layers, measure=measure, mode=mode)
        assert torch.equal(torch.get_rng_state(), random_numbers), f"{what}: the global generator advanced"
        check_value(kappa, wanted.kappa, VALUE, what)
        if case.whole_gradient:
            got = gradient(kappa, loss, problem.trained())
            check_gradient(got, wanted.gradient, problem.names(), GRADIENT, what)
        else:
            with pytest.raises(RuntimeError, match="detach_hessian"):
                (loss + kappa).backward(retain_graph=True)


# Gauss-Newton curvature of these losses is refused: they are not convex in the outputs, or not known to be.
REFUSED = {
    *("ce_signed_weights", "ce_flooded", "ce_log_of_softmax"),
    *("ce_power_still_one", "ce_soft_maximum", "ce_exponential", "ce_squared", "ce_weights_from_prediction"),
    *("ce_over_all_classes", "ce_own_prediction", "focal", "focal_gamma_still_zero", "generalised_ce"),
    *("poly_ce", "confidence_penalty", "kl_reversed", "js_divergence", "poisson", "gaussian_nll"),
    *("cosine", "dice_per_row", "dice_over_batch", "hinge", "z_loss", "z_loss_still_zero"),
}
# Convex in what the loss itself has made of that: similarities of samples.
OF_OTHER_OUTPUTS = {"contrastive", "ce_plus_contrastive"}
REFUSAL = r"convex in the network's outputs.*curvature='hessian'"


def of_gauss_newton(case: Case) -> Iterable[object]:
    """Of a loss that is refused there is no more to see, nor of outputs for which there is no reference."""
    loss = case.parts[2]
    return [loss] if loss.name in REFUSED | OF_OTHER_OUTPUTS else pairs(*case.parts)


def check_gauss_newton(case: Case, mode: str) -> None:
    problem, tail_name, loss_name = case.problem(), case.parts[1].name, case.parts[2].name
    loss, layers = observed(problem)
    options = {"mode": mode, "curvature": "gauss_newton"}
    of_a_distance = (tail_name, loss_name) == ("square", "rank_pairs")  # which squares are taken for
    if loss_name in REFUSED or of_a_distance:
        with pytest.raises(RuntimeError, match=REFUSAL):
            relative_flatness(loss, layers, **options)
        return
    if loss_name in OF_OTHER_OUTPUTS:
        assert relative_flatness(loss, layers, **options) >= 0
        return
    if loss_name == "linear_loss":  # known to have no curvature where all that follows the layer is linear
        try:
            assert relative_flatness(loss, layers, **options) == 0
        except RuntimeError as error:
            assert re.search(REFUSAL, str(error))
        return
    for measure, wanted in expected_gauss_newton(case).items():
        what = f"{case.name}, {mode}, {measure}"
        kappa = relative_flatness(loss, layers, measure=measure, **options)
        check_value(kappa, wanted.kappa, VALUE, what)
        got = gradient(kappa, loss, problem.trained())
        check_gradient(got, wanted.gradient, problem.names(), GRADIENT, what)


# ----------------------------------------------------------------------------------------- all cases


@by_name(covering([case for case in ALL if case.whole_gradient and case.finite_differences], each))
def test_gradient_of_the_reference_agrees_with_finite_differences(case: Case) -> None:
    problem = case.problem()
    parameters = problem.trained()
    direction = [torch.randn_like(p) for p in parameters]
    length = torch.stack([d.square().sum() for d in direction]).sum().sqrt()
    direction = [d / length for d in direction]

    def kappa() -> float:
        return reference.sum_of_kappas(reference.curvatures(problem, problem.layers), "neuronwise").item()

    wanted = expected(case)["neuronwise"].gradient
    norm = max(torch.stack([w.square().sum() for w in wanted]).sum().sqrt().item(), FLOOR)
    analytic = sum((w * d).sum().item() for w, d in zip(wanted, direction, strict=True))
    numeric, uncertainty = reference.directional_derivative(kappa, parameters, direction, step=4e-4)
    error = abs(analytic - numeric) / norm
    assert error <= GRADIENT, (
        f"{case.name}: error {error:.1e}; finite differences are sure to {uncertainty / norm:.1e}"
    )


@by_name(covering(ALL, each))
def test_full_agrees_with_the_definition(case: Case) -> None:
    check(case, "full")


@by_name(EXACT)
def test_exact_agrees_with_the_definition(case: Case) -> None:
    check(case, "exact")


@pytest.fixture
def many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form that is meant for many classes, also where there are few."""
    monkeypatch.setattr("fam_optim.estimators.measure.SMALL", 0)


@by_name(covering([case for case in EXACT if "ce" in case.name], each))
@pytest.mark.usefixtures("many_classes")
def test_the_form_for_many_classes_agrees_with_the_definition(case: Case) -> None:
    check(case, "exact")


@by_name(covering([case for case in GRID if case.parts[2].name not in REFUSED], each))
def test_full_gauss_newton_agrees_with_the_definition(case: Case) -> None:
    check_gauss_newton(case, "full")


@by_name(covering(GRID, of_gauss_newton))
def test_exact_gauss_newton_agrees_with_the_definition(case: Case) -> None:
    check_gauss_newton(case, "exact")


def class_of_layer(case: Case) -> Iterable[object]:
    """By the names of the table, and whether it has groups."""
    name = case.parts[0].name
    return [(name.split("_")[0], "groups" in name)]


SEVERAL_LAYERS = ("three_layers-ce", "convolution_and_head", "module_and_bare_parameter")


@by_name([*covering(GRID, class_of_layer), *(case for case in SPECIAL if case.name in SEVERAL_LAYERS)])
def test_normalize_divides_by_m(case: Case) -> None:
    """A division by each layer's own m."""
    loss, layers = observed(case.problem())
    for measure, wanted in expected(case).items():
        for mode in case.modes:
            kappa = relative_flatness(loss, layers, measure=measure, mode=mode, normalize=True)
            check_value(kappa, wanted.normalized, VALUE, f"{case.name}, {mode}, {measure}, normalized")


@by_name(covering(ALL, families))
def test_detach_hessian_keeps_part_one_of_the_gradient(case: Case) -> None:
    problem = case.problem()
    for measure, wanted in expected(case).items():
        for mode in case.modes:
            what = f"{case.name}, {mode}, {measure}, detach_hessian"
            fam = fam_on(problem, lam=1.0, mode=mode, measure=measure, detach_hessian=True)
            loss = problem()
            penalty = fam.regularize(loss) - loss
            check_value(fam.last_kappa, wanted.kappa, VALUE, what)
            got = gradient(penalty, loss, problem.trained())
            check_gradient(got, wanted.part_one, problem.names(), GRADIENT, what)


@by_name(covering([case for case in GRID if case.whole_gradient], each))
def test_exact_in_single_precision(case: Case, device: str) -> None:
    problem = case.problem(torch.float32, device)
    loss, layers = observed(problem)
    for measure, wanted in expected(case).items():
        what = f"{case.name}, exact, {measure}, float32 on {device}"
        kappa = relative_flatness(loss, layers, measure=measure)
        check_value(kappa.cpu(), wanted.kappa, SINGLE, what)
        got = [g.cpu() for g in gradient(kappa, loss, problem.trained())]
        check_gradient(got, wanted.gradient, problem.names(), SINGLE, what)


def fam_on(problem: Problem, **kwargs: Any) -> FAM:
    return FAM(problem.parameters(), torch.optim.SGD, layer=list(problem.layers), lr=0.1, **kwargs)


# ------------------------------------------------------------- what changes under an unchanged graph


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
@pytest.mark.parametrize("through", ["one_observation", "fam"])
def test_exact_follows_a_tail_that_changes_under_the_same_graph(change: Change, through: str) -> None:
    problem = change.problem()
    parameters, names = problem.trained(), problem.names()
    fam = fam_on(problem, lam=1.0)
    with observe(problem.layers[0]) as layer:
        for turn, problem.knob in enumerate(change.settings):
            what = f"{change.name}, setting {turn}: {problem.knob}"
            differentiable = not change.undifferentiable[turn]
            weights = reference.curvatures(problem, problem.layers, create_graph=differentiable)
            wanted = reference.sum_of_kappas(weights, "neuronwise")
            loss = problem()
            kappa = fam.regularize(loss) - loss if through == "fam" else relative_flatness(loss, layer)
            check_value(fam.last_kappa if through == "fam" else kappa, wanted, VALUE, what)
            if differentiable:
                got = gradient(kappa, loss, parameters)
                check_gradient(got, reference.gradient(wanted, parameters), names, GRADIENT, what)
            else:
                with pytest.raises(RuntimeError, match="detach_hessian"):
                    kappa.backward()


class _LooksAtNumbers(torch.autograd.Function):
    """tanh with a backward that reads the numbers that it is given."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        y = z.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        assert math.isfinite(grad.sum().item())
        return grad * (1 - y * y)


@pytest.mark.parametrize("tail", [_LooksAtNumbers.apply, torch.tanh])
def test_directions_through_functions(tail: Callable[[Tensor], Tensor]) -> None:
    problem = calls(lambda f, p: tail(f(p.x)).square().mean(), nn.Linear(5, 4), rows=2).double()
    parameters, what = problem.trained(), f"{tail}"
    weights = reference.curvatures(problem, problem.layers, create_graph=True)
    wanted = reference.sum_of_kappas(weights, "neuronwise")
    loss, layers = observed(problem)
    kappa = relative_flatness(loss, layers)
    check_value(kappa, wanted, VALUE, what)
    got = gradient(kappa, loss, parameters)
    check_gradient(got, reference.gradient(wanted, parameters), problem.names(), GRADIENT, what)


def test_two_samples_that_begin_to_interact_are_always_noticed() -> None:
    """Not just with high probability: 120 different graphs, each of which begins without interaction."""
    missed = []
    for i in range(120):

        def run(f: nn.Module, p: Problem, i: int = i) -> Tensor:
            z = f(p.x)
            for _ in range(i // 2):
                z = z + 0.01 if i % 2 else z * 1.01
            return torch.tanh(z + p.knob * z.flip(0)).square().mean()

        problem = calls(run, nn.Linear(2, 2), rows=2).double()
        with observe(problem.layers[0]) as layer:
            for problem.knob in (torch.tensor(0.0), torch.tensor(1.0)):
                kappa = relative_flatness(problem(), layer)
                wanted = reference.sum_of_kappas(reference.curvatures(problem, problem.layers), "neuronwise")
                if abs(kappa - wanted) > VALUE * abs(wanted):
                    missed.append((i, problem.knob.item(), kappa.item(), wanted.item()))
    assert not missed, f"(graph, interaction, kappa, expected) of {len(missed)} of 120: {missed}"


def test_asking_again_gives_the_same_answer() -> None:
    loss, layers = observed(SPECIAL[0].problem())
    first = [relative_flatness(loss, layers, mode=mode).item() for mode in ("exact", "full", "exact", "full")]
    assert first[0] == first[2] and first[1] == first[3], f"{SPECIAL[0].name}: {first}"


# ----------------------------------------------------------------------------------------- at scale


class LargestOutput(TorchDispatchMode):
    """Records the size of the largest tensor that any operation puts out, forward or backward."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, Tensor):
                self.numel = max(self.numel, output.numel())
        return result


def covariance_form(phi: Tensor, weight: Tensor, bias: Tensor, a: Tensor | float, measure: str) -> Tensor:
    """sum_i a_i ||phi_i||^2 1/2 sum_{k,l} p_k p_l ||w_k - w_l||^2, the pairs summed up one class at a time.

    Pairs instead of a difference of squares: nothing cancels, however sure the softmax is.
    """
    p = (phi @ weight.T + bias).softmax(-1)
    total = phi.new_zeros(())
    for k in range(weight.shape[0]):
        if measure == "neuronwise":
            distances = (weight - weight[k]).square().sum(1)
        else:
            distances = 2 * weight.square().sum() * (torch.arange(len(weight)) != k)
        total = total + (a * phi.square().sum(-1) * p[..., k] * (p @ distances) / 2).sum()
    return total


def trace_form(phi: Tensor, weight: Tensor, bias: Tensor, a: Tensor | float, measure: str) -> Tensor:
    """sum_i a_i ||phi_i||^2 (sum_k p_ik ||w_k||^2 - ||sum_k p_ik w_k||^2), or its layerwise twin."""
    p = (phi @ weight.T + bias).softmax(-1)
    if measure == "neuronwise":
        spread = p @ weight.square().sum(1) - (p @ weight).square().sum(-1)
    else:
        spread = weight.square().sum() * (1 - p.square().sum(-1))
    return (a * phi.square().sum(-1) * spread).sum()


def weighted(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.linspace(0.5, 2, z.shape[1], dtype=z.dtype)
    return F.cross_entropy(z, y, weight=w), w[y] / w[y].sum()


def weighted_and_smoothed(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.linspace(0.5, 2, z.shape[1], dtype=z.dtype)
    a = (0.9 * w[y] + 0.1 * w.mean()) / w[y].sum()
    return F.cross_entropy(z, y, weight=w, label_smoothing=0.1), a


def ignoring(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.arange(len(y)) != 1
    return F.cross_entropy(z, y.where(kept, -100)), kept.double() / kept.sum()


def distilled(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    teacher = torch.randn_like(z).softmax(1)
    return F.kl_div(z.log_softmax(1), teacher, reduction="batchmean"), torch.ones(len(y)) / len(y)


HEADS = {"imagenet": (1000, 64, 8), "bert": (30522, 16, 4)}
SOFTMAX_LOSSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor | float]]] = {
    "mean": lambda z, y: (F.cross_entropy(z, y), 1 / len(y)),
    "sum": lambda z, y: (F.cross_entropy(z, y, reduction="sum"), 1.0),
    "weights": weighted,
    "smoothing": lambda z, y: (F.cross_entropy(z, y, label_smoothing=0.1), 1 / len(y)),
    "weights_and_smoothing": weighted_and_smoothed,
    "ignore_index": ignoring,
    "soft_targets": lambda z, y: (F.cross_entropy(z, torch.randn_like(z).softmax(1)), 1 / len(y)),
    "kl_to_teacher": distilled,
    "two_added": lambda z, y: (F.cross_entropy(z, y) + F.cross_entropy(z, y.flip(0)), 2 / len(y)),
    "by_hand": lambda z, y: (-z.log_softmax(1).gather(1, y[:, None]).mean(), 1 / len(y)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("loss_name", SOFTMAX_LOSSES)
@pytest.mark.parametrize("head_name", HEADS)
def test_a_large_softmax_head_takes_no_more_than_its_logits(
    head_name: str, loss_name: str, dtype: torch.dtype
) -> None:
    for measure in reference.MEASURES:
        check_large_head(head_name, loss_name, dtype, measure)


def check_large_head(head_name: str, loss_name: str, dtype: torch.dtype, measure: str) -> None:
    d, m, n = HEADS[head_name]
    head = nn.Linear(m, d).double()
    nn.init.normal_(head.weight, std=0.3)
    phi, y = torch.randn(n, m, dtype=torch.float64, requires_grad=True), torch.randint(d, (n,))
    _, a = SOFTMAX_LOSSES[loss_name](head(phi), y)
    parameters = [phi, head.weight, head.bias]
    wanted = trace_form(phi, head.weight, head.bias, a, measure)
    wanted_gradient = reference.gradient(wanted, parameters)

    head, phi = head.to(dtype), phi.detach().to(dtype).requires_grad_()
    with observe(head) as layer:
        loss, _ = SOFTMAX_LOSSES[loss_name](head(phi), y)
    parameters = [phi, head.weight, head.bias]
    with LargestOutput() as largest:
        kappa = relative_flatness(loss, layer, measure=measure)
        got = gradient(kappa, loss, parameters)
    what = f"{head_name}, {loss_name}, {dtype}, {measure}"
    double = dtype == torch.float64
    check_value(kappa, wanted, VALUE if double else SINGLE, what)
    check_gradient(got, wanted_gradient, ["phi", "weight", "bias"], GRADIENT if double else SINGLE, what)
    limit = 2 * max(d * m, n * d)
    assert limit < d * d
    assert largest.numel <= limit, f"{what}: a tensor of {largest.numel} numbers; the logits have {n * d}"


def language_model(head: nn.Module, phi: Tensor, y: Tensor) -> Tensor:
    z = head(phi)[:, :-1]
    return F.cross_entropy(z.reshape(-1, z.shape[-1]), y[:, 1:].reshape(-1))


@pytest.mark.parametrize("measure", reference.MEASURES)
def test_a_large_language_model_head(measure: str) -> None:
    d, m = 2000, 8
    head = nn.Linear(m, d).double()
    phi, y = torch.randn(2, 5, m, dtype=torch.float64, requires_grad=True), torch.randint(d, (2, 5))
    wanted = trace_form(phi[:, :-1], head.weight, head.bias, 1 / 8, measure)
    with observe(head) as layer:
        loss = language_model(head, phi, y)
    with LargestOutput() as largest:
        kappa = relative_flatness(loss, layer, measure=measure)
        got = gradient(kappa, loss, [phi, head.weight, head.bias])
    check_value(kappa, wanted, VALUE, measure)
    wanted_gradient = reference.gradient(wanted, [phi, head.weight, head.bias])
    check_gradient(got, wanted_gradient, ["phi", "weight", "bias"], GRADIENT, measure)
    assert largest.numel <= 2 * 10 * d, f"a tensor of {largest.numel} numbers"


@pytest.mark.parametrize("measure", reference.MEASURES)
def test_a_large_segmentation_head(measure: str) -> None:
    """A 1 x 1 convolution to 150 classes: the same at every pixel."""
    d, m = 150, 16
    head = nn.Conv2d(m, d, 1).double()
    x, y = torch.randn(2, m, 5, 4, dtype=torch.float64, requires_grad=True), torch.randint(d, (2, 5, 4))
    wanted = trace_form(x.movedim(1, -1), head.weight[:, :, 0, 0], head.bias, 1 / y.numel(), measure)
    with observe(head) as layer:
        loss = F.cross_entropy(head(x), y)
    with LargestOutput() as largest:
        kappa = relative_flatness(loss, layer, measure=measure)
        got = gradient(kappa, loss, [x, head.weight, head.bias])
    check_value(kappa, wanted, VALUE, measure)
    wanted_gradient = reference.gradient(wanted, [x, head.weight, head.bias])
    check_gradient(got, wanted_gradient, ["x", "weight", "bias"], GRADIENT, measure)
    assert largest.numel <= 2 * y.numel() * d, f"a tensor of {largest.numel} numbers"


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("measure", reference.MEASURES)
@pytest.mark.parametrize("classes", ["few", "many"])
def test_a_sure_softmax_loses_no_digits(
    scale: float, dtype: torch.dtype, measure: str, classes: str, request: pytest.FixtureRequest
) -> None:
    """Where probabilities round to one, a difference of squares would be noise."""
    if classes == "many":
        request.getfixturevalue("many_classes")
    head = nn.Linear(6, 5).double()
    phi = scale * torch.randn(1, 6, dtype=torch.float64)
    single = head.to(dtype), phi.to(dtype)
    head, phi = head.double(), single[1].double()  # the same numbers in both precisions
    wanted = covariance_form(phi, head.weight, head.bias, 1.0, measure)
    head, phi = head.to(dtype), single[1]
    with observe(head) as layer:
        loss = F.cross_entropy(head(phi), torch.tensor([0]))
    kappa = relative_flatness(loss, layer, measure=measure)
    # A softmax turns the logits' absolute rounding into a relative one of p.
    tolerance = 100 * torch.finfo(dtype).eps * max(1.0, scale)
    error = abs(kappa.item() - wanted.item()) / max(wanted.item(), torch.finfo(dtype).tiny)
    assert error <= tolerance, f"kappa is {kappa.item():.6g}, expected {wanted.item():.6g}, error {error:.1e}"


def test_exact_refuses_what_it_cannot_do_at_a_sane_cost() -> None:
    """A wide convolution in the middle of a network: the error counts, and names the way out."""
    body = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 36, 3))
    with observe(body[0]) as layer:
        loss = F.cross_entropy(body(torch.randn(2, 16, 8, 8)), torch.tensor([0, 1]))
    # 36 positions of a sample share the weight, 64 directions each.
    with pytest.raises(RuntimeError, match=r"\b2304\b.*mode='hutchinson'"):
        relative_flatness(loss, layer)
    kappa = relative_flatness(loss, layer, mode="hutchinson")
    assert kappa.isfinite(), kappa
