"""The study: its methods against the library, its statistics on known numbers, its runs end to end."""

import json
import math
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from fam_optim import FAM, observe, relative_flatness, weight_layers
from recipes.study import __main__ as study
from recipes.study import protocol, tables
from recipes.study.analysis import (
    best,
    differences,
    holm,
    mean_by,
    rank_correlation,
    to_try,
    with_interval,
)
from recipes.study.methods import COMPARED, LAYERS, METHODS, Method, add_noise, make_optimizer
from recipes.study.protocol import CONDITIONS
from recipes.study.tasks import SHIFTS, TASKS, samples, shifted
from recipes.study.trial import Stepper, Trial, explained, run
from recipes.tasks.models import SmallConvNet

DOUBLE = {"dtype": torch.float64}
NETWORKS = {  # a layer's number, and a network whose loss is smooth
    "linear": (1, lambda: nn.Sequential(nn.Linear(5, 4, **DOUBLE), nn.Tanh(), nn.Linear(4, 3, **DOUBLE))),
    "convolution": (
        0,
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2, stride=2, padding=1, **DOUBLE),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(27, 3, **DOUBLE),
        ),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_noise_is_a_sample_of_the_penalty(kind: str) -> None:
    number, make = NETWORKS[kind]
    torch.manual_seed(0)
    plain, x, y = make(), torch.randn(6, 5, **DOUBLE), torch.arange(6) % 3
    if kind == "convolution":
        x = torch.randn(6, 1, 4, 4, **DOUBLE)
    with observe(weight_layers(plain)[number]) as layer:
        loss = cross_entropy(plain(x), y)
    kappa = relative_flatness(loss, layer, mode="full").item()
    disturbed = {}
    lam = 1e-4
    for sign in (1, -1):  # the first order cancels
        disturbed[sign] = make()
        disturbed[sign].load_state_dict(plain.state_dict())
        add_noise(weight_layers(disturbed[sign])[number], sign * (2 * lam) ** 0.5)
    extra = []
    with torch.no_grad():
        for draw in range(4000):
            values = []
            for model in disturbed.values():
                torch.manual_seed(draw)
                values.append(cross_entropy(model(x), y).item())
            extra.append((statistics.fmean(values) - loss.item()) / lam)
    error = statistics.stdev(extra) / len(extra) ** 0.5
    assert error < 0.05 * abs(kappa)
    assert abs(statistics.fmean(extra) - kappa) < 4 * error


def test_no_noise_when_evaluated() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(6, 5)
    expected = model(x)
    add_noise(weight_layers(model)[0], 1.0)
    assert not torch.equal(model(x), expected)
    model.eval()
    assert torch.equal(model(x), expected)


def test_l2_on_hidden_layers_is_its_gradient() -> None:
    torch.manual_seed(0)
    model = TASKS["digits"].network(8, 2)
    before = [layer.weight.clone() for layer in weight_layers(model)]
    optimizer = make_optimizer(METHODS["L2, hidden layers"], 0.03, model, "sgd", 0, lr=1.0, weight_decay=0.1)
    optimizer.zero_grad()
    sum(0 * p.sum() for p in model.parameters()).backward()
    optimizer.step()
    for layer, weight, coefficient in zip(weight_layers(model), before, (0.03, 0.03, 0.0), strict=True):
        # the gradient of coefficient * ||W||^2 and of SGD's own 0.1 / 2 * ||W||^2
        torch.testing.assert_close(weight - layer.weight, (2 * coefficient + 0.1) * weight)


def test_sets_of_layers() -> None:
    model = SmallConvNet(channels=(2, 3))
    names = {module: name for name, module in model.named_modules()}
    found = {key: [names[x] for x in choose(weight_layers(model))] for key, choose in LAYERS.items()}
    assert found == {
        "last": ["head"],
        "last but one": ["features.9"],
        "first": ["features.0"],
        "hidden": ["features.0", "features.4", "features.9"],
        "all": ["features.0", "features.4", "features.9", "head"],
        "last convolution": ["features.4"],
        "convolutions": ["features.0", "features.4"],
    }


def test_a_grid_grows_until_its_best_is_inside() -> None:
    values = (0.0, 1.0, 2.0, 4.0, 8.0)
    assert to_try(values, (1, 2), {}) == [1, 2]
    assert to_try(values, (1, 2), {2: 5}) == [1, 2]  # not all that were to be tried first
    assert to_try(values, (1, 2), {1: 1, 2: 5}) == [1, 2, 4]
    assert to_try(values, (1, 2), {1: 5, 2: 1}) == [0, 1, 2]
    assert to_try(values, (1, 2), {1: 1, 2: 5, 4: 3}) == [1, 2, 4]
    assert to_try(values, (1, 2), {1: 1, 2: 5, 4: 6, 8: 7}) == [1, 2, 4, 8]  # no more to try


def test_of_equally_good_values_the_middle_one_is_best() -> None:
    assert best({1: 5.0, 2: 7.0, 3: 7.0, 4: 7.0, 5: 6.0}) == 3


def test_every_grid_has_three_values_inside() -> None:
    for method in COMPARED.values():
        if method.kind != "sgd":
            assert len(method.start) == 3
            assert min(method.values) < min(method.start)
            assert max(method.start) < max(method.values)
            assert set(method.start) <= set(method.values)


def row(**fields: Any) -> dict[str, Any]:
    return {"seed": 0, "value": 1, "validation": 0.0, **fields}


def test_a_score_that_is_not_finite_is_the_worst() -> None:
    results = [row(validation=50.0), row(validation=60.0, seed=1), row(value=2, validation=None)]
    assert mean_by(results, "value") == {1: 55, 2: -math.inf}


def test_paired_difference_has_students_interval() -> None:
    ours = [row(seed=seed, x=x) for seed, x in enumerate((3.0, 5.0, 7.0))]
    theirs = [row(seed=seed, x=x) for seed, x in reversed(list(enumerate((2.0, 2.0, 2.0, 9.0))))]
    mean, half = with_interval(differences(ours, theirs, "x"))
    assert mean == 3
    assert half == pytest.approx(4.302653 * 2 / 3**0.5, rel=1e-5)  # t(0.975, 2) * s / sqrt(3)


def test_holm() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_rank_correlation_within_cells() -> None:
    results = [{"cell": cell, "x": x, "gap": x - 10 * cell} for cell in (0, 1) for x in range(4)]
    for r in results:
        r["x"] += 10 * r["cell"]  # over all, the cell hides the relation
    over_all, _, _ = rank_correlation(results, lambda r: r["x"], lambda r: r["gap"])
    within, p, cells = rank_correlation(results, lambda r: r["x"], lambda r: r["gap"], ("cell",))
    assert (within, cells) == (1, 2)
    assert over_all < 0
    assert p < 0.05


def test_explained_variance() -> None:
    targets = torch.tensor([[0.0], [2.0]])
    assert explained(targets, targets) == 100
    assert explained(torch.ones(2, 1), targets) == 0


def test_noise_never_hits_the_test_labels() -> None:
    clean, noisy = (samples("digits", noise, 0) for noise in (0.0, 0.4))
    assert torch.equal(clean.evaluation["test"][:][1], noisy.evaluation["test"][:][1])
    wrong = (clean.train[:][1] != noisy.train[:][1]).sum() + (
        clean.evaluation["validation"][:][1] != noisy.evaluation["validation"][:][1]
    ).sum()
    assert wrong == round(0.4 * 1200)
    assert torch.equal(clean.train[:][0], noisy.train[:][0])


@pytest.mark.parametrize("task", TASKS)
def test_a_network_fits_its_samples(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if task.startswith("finetune"):
        monkeypatch.setattr("recipes.study.networks.PRETRAINING_EPOCHS", 1)
    data, own = samples(task, 0.0, 0), TASKS[task]
    assert (len(data.train), len(data.evaluation["validation"])) == own.sizes
    outputs = own.network(16, 2)(data.train[:4][0])
    assert outputs.shape == ((4, 1) if own.predicts == "numbers" else (4, 10))


@pytest.mark.parametrize("kind", SHIFTS)
def test_shifts_grow_and_repeat(kind: str) -> None:
    images = samples("fashion", 0.0, 0).train[:8][0]
    moved = [shifted(images, kind, strength) for strength in SHIFTS[kind]]
    distances = [(m - images).norm().item() for m in moved]
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert torch.equal(shifted(images, kind, SHIFTS[kind][0]), moved[0])


def test_a_trial_repeats_bit_for_bit() -> None:
    trial = Trial("digits", 0.4, "FAM, hidden", 0.003, 0, 2, 0.05, 5e-4, tested=True)
    first, second = (run(trial) for _ in range(2))
    assert first.pop("seconds") > 0 < second.pop("seconds")
    assert first == second
    assert {"test_score", "test_ece", "kappas", "norms", "best_test_score"} <= first.keys()


def test_test_data_stay_out_of_tuning() -> None:
    result = run(Trial("digits", 0.0, "SGD", 0.05, 0, 1, 0.05, 5e-4))
    assert not [name for name in result if "test" in name and name != "tested"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method: str) -> None:
    torch.manual_seed(0)
    condition = protocol.of("fashion", 0.4) if "convolution" in method else protocol.of("digits", 0.4)
    value = (METHODS[method].start or (0.05,))[0]
    stepper = Stepper(protocol.trial(condition, method, value, 0, lr=0.05))
    before = [p.clone() for p in stepper.evaluated.parameters()]
    inputs = torch.rand(8, 1, 28, 28) if condition.task == "fashion" else torch.rand(8, 64)
    stepper.step(inputs, torch.arange(8))
    assert any(not torch.equal(a, b) for a, b in zip(before, stepper.evaluated.parameters(), strict=True))
    if isinstance(stepper.optimizer, FAM):
        assert stepper.optimizer.last_kappa is not None


class Bowl:
    """Stands for the trainings: the validation score falls with the distance to a best value."""

    best: ClassVar = {"SGD": 0.4, "SAM": 0.8, "label smoothing": 0.01}  # beyond what is tried first
    decay: ClassVar = {"dropout": 5e-4}  # not SGD's
    rate: ClassVar = {"dropout": 0.1}  # two steps from SGD's

    def __call__(self, trial: Trial) -> dict[str, Any]:
        fields = {name: getattr(trial, name) for name in Trial.__dataclass_fields__}
        value = trial.lr if trial.method.startswith("SGD") else trial.value
        method = METHODS[trial.method]
        best_value = self.best.get(trial.method, (method.start or (0.05,))[-1])
        distances = (
            math.log(value / best_value),
            math.log(trial.lr / self.rate.get(trial.method, trial.lr)),
            trial.weight_decay - self.decay.get(trial.method, 0.0),
        )
        return {**fields, "validation": -sum(abs(distance) for distance in distances)}


def test_a_condition_is_compared_only_when_it_is_tuned() -> None:
    condition, train = CONDITIONS[0], Bowl()
    results: list[dict[str, Any]] = []
    rounds = 0
    while trials := [
        t
        for stage in (protocol.sgd, protocol.tuning)
        for t in protocol.missing(results, stage(results))
        if (t.task, t.noise) == (condition.task, condition.noise)
    ]:
        assert not [t for t in protocol.comparison(results) if t.task == condition.task]
        results += [train(t) for t in trials]
        rounds += 1
        assert rounds < 20
    assert protocol.base(results, condition) == {"lr": 0.4, "weight_decay": 0.0}
    compared = list(protocol.comparison(results))
    assert {t.method for t in compared} == set(COMPARED)
    assert all(t.tested for t in compared)
    assert {t.value for t in compared if t.method == "SAM"} == {0.8}
    assert {t.value for t in compared if t.method == "label smoothing"} == {0.01}
    assert {(t.lr, t.weight_decay) for t in compared if t.method == "SAM"} == {(0.4, 0.0)}
    assert {(t.lr, t.weight_decay) for t in compared if t.method == "dropout"} == {(0.1, 5e-4)}
    assert len(compared) == len(COMPARED) * len(protocol.SEEDS)


def test_at_the_usual_rate_all_are_tuned_there_and_tested_beside_sgds_best() -> None:
    condition, train = protocol.of("fashion-nobatchnorm", 0.2), Bowl()
    results: list[dict[str, Any]] = []
    stages = (protocol.sgd, protocol.usual_rate)
    while trials := [
        t
        for stage in stages
        for t in protocol.missing(results, stage(results))
        if t.task == condition.task and not t.tested
    ]:
        results += [train(t) for t in trials]
    assert protocol.base(results, condition) == {"lr": 0.4, "weight_decay": 0.0}
    tested = [t for t in protocol.usual_rate(results) if t.tested]
    by_method = {(t.method, t.lr, t.value) for t in tested if t.method in ("SGD", "SAM")}
    assert by_method == {("SGD", 0.4, 0.4), ("SGD", 0.05, 0.05), ("SAM", 0.05, 0.8)}
    assert len(tested) == (1 + len(protocol.SHORTLIST)) * len(protocol.LATER_SEEDS)
    assert {t.seed for t in tested}.isdisjoint({*protocol.SEEDS, *protocol.MORE_SEEDS})
    assert not protocol.tuned(results, condition, "SAM")  # the comparison knows nothing of it


def test_results_of_an_earlier_choice_are_left_out() -> None:
    trial = protocol.trial(CONDITIONS[0], "SAM", 0.1, 0, lr=0.1)
    results = [row(**{**asdict(trial), "value": value}) for value in (0.1, 0.2)]
    assert protocol.measured(results, [trial]) == results[:1]
    assert protocol.missing(results, [trial, replace(trial, value=0.3)]) == [replace(trial, value=0.3)]


def test_a_clipped_step_is_no_longer_than_its_norm() -> None:
    trial = protocol.trial(protocol.of("digits", 0.0), "FAM, hidden", 1.0, 0, lr=1.0, weight_decay=0.0)
    lengths = []
    for clip in (0.0, 0.1):
        torch.manual_seed(0)
        stepper = Stepper(replace(trial, clip=clip))
        before = parameters_to_vector(stepper.model.parameters()).detach()
        stepper.step(torch.rand(8, 64), torch.arange(8))
        lengths.append((parameters_to_vector(stepper.model.parameters()) - before).norm().item())
    assert lengths[0] > 1
    assert lengths[1] == pytest.approx(0.1, rel=1e-3)


def test_one_lam_loses_against_the_best_clipped_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    method, condition = "FAM, hidden", CONDITIONS[0]
    free = {lam: score for lam, score in zip(protocol.LAMS, (50.0, 60.0, 55.0, 50.0, 10.0), strict=True)}
    monkeypatch.setattr(tables, "lam_scores", lambda *_: {condition.name: (58.0, free)})
    of_condition = {"task": condition.task, "noise": condition.noise, "variant": "clipped"}
    results = [row(**of_condition, method=method, value=lam, validation=61.0) for lam in protocol.LAMS]
    results.append(row(**of_condition, method="SGD", value=0.1, validation=59.0))
    other = {**of_condition, "task": CONDITIONS[2].task, "noise": CONDITIONS[2].noise}  # not known unclipped
    results += [row(**other, method=name, value=0.1, validation=59.0) for name in ("SGD", method)]

    def lost(clipped: bool) -> list[str]:
        table = tables.one_lam(results, method, clipped=clipped)
        return [next(iter(column.cells)) for column in table.columns][1:]

    assert lost(clipped=False) == ["2.0", "10.0", "0.0", "5.0", "10.0", "50.0"]
    assert lost(clipped=True) == ["3.0", "2.0", "0.0", "0.0", "0.0", "0.0", "0.0"]


def test_what_no_search_gives_is_compared_seed_by_seed() -> None:
    condition = CONDITIONS[0]
    of_condition = {"task": condition.task, "noise": condition.noise}
    scores = {("SGD", ""): (50.0, 51.0), ("SGD", "untuned"): (48.0, 50.0)}
    scores |= {(method, "untuned"): (51.0, 53.0) for method in protocol.WITH_ONE_LAM}
    results = [
        row(**of_condition, method=method, variant=variant, seed=seed, test_score=by_seed[seed])
        for (method, variant), by_seed in scores.items()
        for seed in (1, 0)
    ]
    cells = [next(iter(column.cells)) for column in tables.untuned(results).columns]
    assert cells == [condition.name, "50.5 ± 0.7", "-1.5 ± 6.4", "+1.5 ± 6.4", "+1.5 ± 6.4"]


@pytest.mark.slow
def test_the_study_runs_goes_on_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    condition = protocol.of("digits", 0.4)
    monkeypatch.setattr(protocol, "CONDITIONS", (condition,))
    monkeypatch.setattr(protocol, "SEEDS", (0, 1))
    monkeypatch.setattr(protocol, "SHORTLIST", ("SGD", "FAM, hidden, detached"))
    quick = Method((1e-3, 1e-2), (1e-3,), "fam", "hidden", METHODS["FAM, hidden, detached"].options)
    monkeypatch.setattr(protocol, "COMPARED", {"SGD": COMPARED["SGD"], "FAM, hidden, detached": quick})
    monkeypatch.setattr(protocol, "METHODS", {**METHODS, "FAM, hidden, detached": quick})
    monkeypatch.setattr(protocol, "RATES", (0.05,))
    monkeypatch.setattr(protocol, "DECAYS", (5e-4,))
    monkeypatch.setattr(protocol, "LEARNING_RATES", (0.05,))
    monkeypatch.setattr(protocol, "WEIGHT_DECAYS", (0.0, 5e-4))
    for stage in ("longer", "networks", "lam", "layers", "usual_rate", "clipped", "untuned"):
        monkeypatch.setitem(protocol.STAGES, stage, lambda results: iter(()))
    task = TASKS["digits"]
    monkeypatch.setitem(protocol.TASKS, "digits", type(task)(task.load, task.sizes, task.network, epochs=1))
    stages = ["sgd", "tuning", "comparison"]
    command = ["--workers", "1", "--out", str(tmp_path), "--tasks", "digits", "--stages", *stages]
    study.main(command)
    path = tmp_path / "comparison.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines].count("FAM, hidden, detached") == 2
    path.write_text("\n".join([*lines[1:], lines[0][:30]]))  # one trial lost, half a line left behind
    study.main(command)
    assert sorted(json.loads(line)["seed"] for line in path.read_text().splitlines()) == [0, 0, 1, 1]
    study.main(["--report", str(tmp_path)])
    assert "FAM, hidden, detached" in (tmp_path / "tables.md").read_text()
    assert "more_seeds: digits" in capsys.readouterr().out
