"""The study: its methods against the library, its statistics on known numbers, its runs end to end."""

import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import FAM, observe, relative_flatness, weight_layers
from recipes.engine.layers import GROUPS, select
from recipes.engine.task import Source, regression
from recipes.study import __main__ as study
from recipes.study import conditions, defaults, search, tables
from recipes.study.ablations import FORMS
from recipes.study.analysis import best, differences, holm, mean_by, to_try, with_interval
from recipes.study.conditions import CONDITIONS
from recipes.study.methods import COMPARED, METHODS, Method, add_control, add_noise
from recipes.study.stages import STAGES
from recipes.study.trial import Trial, filled, loop_of, measured, missing, run, shortened
from recipes.tasks import load_task
from recipes.tasks.models import SmallConvNet

DOUBLE = {"dtype": torch.float64}
NETWORKS = {  # a layer's number, how many normal numbers its noise takes, and a network with a smooth loss
    "linear": (1, 24, lambda: nn.Sequential(nn.Linear(5, 4, **DOUBLE), nn.Tanh(), nn.Linear(4, 3, **DOUBLE))),
    "convolution": (
        0,
        16,
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2, stride=2, padding=1, **DOUBLE),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(27, 3, **DOUBLE),
        ),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_noise_is_a_sample_of_the_penalty(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On average over the unit vectors times sqrt(n), whose second moments are those of n normal numbers."""
    number, n, make = NETWORKS[kind]
    plain, x, y = make(), torch.randn(6, 5, **DOUBLE), torch.arange(6) % 3
    if kind == "convolution":
        x = torch.randn(6, 1, 4, 4, **DOUBLE)
    with observe(weight_layers(plain)[number]) as layer:
        loss = cross_entropy(plain(x), y)
    kappa = relative_flatness(loss, layer, mode="full").item()
    disturbed = {}
    lam = 1e-6
    for sign in (1, -1):  # the first order cancels
        disturbed[sign] = make()
        disturbed[sign].load_state_dict(plain.state_dict())
        add_noise(weight_layers(disturbed[sign])[number], sign * (2 * lam) ** 0.5)
    extra = []
    for unit in n**0.5 * torch.eye(n, **DOUBLE):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch, "randn", lambda *shape, dtype, unit=unit: unit.view(shape))
            patch.setattr(torch, "randn_like", lambda like, unit=unit: unit.view_as(like))
            values = [cross_entropy(model(x), y).item() for model in disturbed.values()]
        extra.append((statistics.fmean(values) - loss.item()) / lam)
    assert statistics.fmean(extra) == pytest.approx(kappa, rel=1e-4)


def test_no_noise_when_evaluated() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(6, 5)
    expected = model(x)
    add_noise(weight_layers(model)[0], 1.0)
    assert not torch.equal(model(x), expected)
    model.eval()
    assert torch.equal(model(x), expected)


def test_sets_of_layers() -> None:
    model = SmallConvNet(channels=(2, 3))
    names = {module: name for name, module in model.named_modules()}
    found = {key: [names[layer] for layer in select(model, [key])] for key in GROUPS}
    assert found == {
        "last": ["head"],
        "last but one": ["features.9"],
        "first": ["features.0"],
        "hidden": ["features.0", "features.4", "features.9"],
        "all": ["features.0", "features.4", "features.9", "head"],
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


def test_explained_variance() -> None:
    targets = torch.tensor([[0.0], [2.0]])
    assert regression(nn.Identity(), [(targets, targets)]) == {"explained": 100, "mse": 0}
    assert regression(nn.Identity(), [(torch.ones(2, 1), targets)]) == {"explained": 0, "mse": 1}


def test_noise_never_hits_the_test_labels() -> None:
    clean, noisy = (load_task("digits", noise=noise).data(Source(), 0) for noise in (0.0, 0.4))
    assert torch.equal(clean.evaluation["test"][:][1], noisy.evaluation["test"][:][1])
    wrong = (clean.train[:][1] != noisy.train[:][1]).sum() + (
        clean.evaluation["validation"][:][1] != noisy.evaluation["validation"][:][1]
    ).sum()
    assert wrong == round(0.4 * 1200)
    assert torch.equal(clean.train[:][0], noisy.train[:][0])


SIZES = {"mnist1d": (2000, 1000), "digits": (800, 400), "diabetes": (200, 100), "fashion": (2000, 1000)}
SIZES |= {"finetune-200": (200, 200), "finetune-1000": (1000, 200)}


@pytest.mark.parametrize("task", sorted({condition.task for condition in CONDITIONS}))
def test_a_network_fits_its_samples(task: str) -> None:
    own = load_task(task, width=16, depth=2)
    data = own.data(Source(), 0)
    assert (len(data.train), len(data.evaluation["validation"])) == SIZES.get(
        task, SIZES.get(task.partition("-")[0])
    )
    outputs = own.model(Source(smoke=True))(data.train[:4][0])  # not pretrained
    assert outputs.shape == ((4, 10) if conditions.classifies(task) else (4, 1))


def test_a_trial_repeats_bit_for_bit() -> None:
    trial = Trial("digits", 0.4, "FAM, hidden", 0.003, 0, 2, 0.05, 5e-4, tested=True)
    first, second = (run(trial) for _ in range(2))
    assert first.pop("seconds") > 0 < second.pop("seconds")
    assert first == second
    assert {"validation", "train_score", "test_score", "test_loss", "test_ece"} <= first.keys()


def test_test_data_stay_out_of_tuning() -> None:
    result = run(Trial("digits", 0.0, "SGD", 0.05, 0, 1, 0.05, 5e-4))
    assert not [name for name in result if "test" in name and name != "tested"]


class Bowl:
    """Stands for the trainings: the validation score falls with the distance to a best value."""

    best: ClassVar = {"SGD": 0.4, "SAM": 0.8, "label smoothing": 0.01}  # beyond what is tried first
    decay: ClassVar = {"dropout": 5e-4}  # not SGD's
    rate: ClassVar = {"dropout": 0.1}  # two steps from SGD's

    def __call__(self, trial: Trial) -> dict[str, Any]:
        value = trial.lr if trial.method.startswith("SGD") else trial.value
        method = METHODS[trial.method]
        best_value = self.best.get(trial.method, (method.start or (0.05,))[-1])
        distances = (
            math.log(value / best_value),
            math.log(trial.lr / self.rate.get(trial.method, trial.lr)),
            trial.weight_decay - self.decay.get(trial.method, 0.0),
        )
        return {**asdict(trial), "validation": -sum(abs(distance) for distance in distances)}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method: str) -> None:
    torch.manual_seed(0)
    value = (METHODS[method].start or (0.05,))[0]
    stepper = loop_of(conditions.trial(conditions.of("digits", 0.4), method, value, 0, lr=0.05, every=1))
    before = [p.clone() for p in stepper.model.parameters()]
    stepper.step(torch.rand(8, 64), torch.arange(8))
    assert any(not torch.equal(a, b) for a, b in zip(before, stepper.model.parameters(), strict=True))
    if METHODS[method].kind in ("fam", "proximal"):
        assert isinstance(stepper.optimizer, FAM)
        assert stepper.optimizer.last_kappa is not None


def test_the_control_is_the_step_with_t_the_identity() -> None:
    weight, other = (nn.Parameter(torch.arange(1.0, 7.0, **DOUBLE).view(2, 3)) for _ in range(2))
    optimizer = torch.optim.SGD([weight, other], lr=0.1)
    add_control(optimizer, [weight], lam=0.3, every=3)
    for number in range(1, 7):
        before = weight.detach().clone()
        for p in (weight, other):
            p.grad = torch.full_like(p, number)
        optimizer.step()
        moved = before - 0.1 * number
        if number % 3 == 0:
            c = 0.3 * 3 * (moved - before).norm() / (2 * moved).norm()
            moved = torch.linalg.solve((1 + 2 * c) * torch.eye(2, **DOUBLE), moved)
        torch.testing.assert_close(weight.detach(), moved, rtol=1e-14, atol=0)
    torch.testing.assert_close(other.detach(), torch.arange(1.0, 7.0, **DOUBLE).view(2, 3) - 2.1)


def test_looksam_takes_sams_second_gradient_every_fifth_step() -> None:
    stepper = loop_of(conditions.trial(conditions.of("digits", 0.4), "LookSAM, k = 5", 0.1, 0, lr=0.05))
    forwards: list[int] = []
    stepper.model.register_forward_hook(lambda *_: forwards.append(1))
    counts = []
    for _ in range(10):
        forwards.clear()
        stepper.step(torch.rand(8, 64), torch.arange(8))
        counts.append(len(forwards))
    assert counts == [2, 1, 1, 1, 1] * 2


def final_weights(method: str, epochs: int = 2) -> list[Tensor]:
    trial = conditions.trial(conditions.of("digits", 0.4), method, 1.0, 0, lr=0.05)
    stepper = loop_of(trial)
    for epoch in range(epochs):
        for inputs, targets in stepper.batches(epoch):
            stepper.step(inputs, targets)
    return [layer.weight.detach() for layer in weight_layers(stepper.model)]


def test_the_usual_form_of_the_step_is_the_librarys() -> None:
    ours, theirs = final_weights("as it is"), final_weights("FAM, proximal")
    for form, own in zip(ours, theirs, strict=True):
        torch.testing.assert_close(form, own, rtol=1e-4, atol=1e-6)
    last = [final_weights(name)[-1] for name in ("as it is", "all layers")]
    assert not torch.allclose(*last)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "as it is"])
def test_every_form_of_the_step_is_another(form: str) -> None:
    pairs = zip(final_weights(form), final_weights("as it is"), strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)


def test_a_method_is_tested_only_when_it_is_tuned() -> None:
    condition, train = CONDITIONS[0], Bowl()
    results: list[dict[str, Any]] = []
    rounds = 0
    while trials := [
        t
        for stage in (search.sgd, search.tuning)
        for t in missing(results, stage(results))
        if (t.task, t.noise) == (condition.task, condition.noise)
    ]:
        tested = {t.method for t in search.comparison(results) if t.task == condition.task}
        assert not tested & {t.method for t in trials}
        results += [train(t) for t in trials]
        rounds += 1
        assert rounds < 20
    assert search.base(results, condition) == {"lr": 0.4, "weight_decay": 0.0}
    compared = list(search.comparison(results))
    assert {t.method for t in compared} == set(COMPARED)
    assert all(t.tested for t in compared)
    assert {t.value for t in compared if t.method == "SAM"} == {0.8}
    assert {t.value for t in compared if t.method == "label smoothing"} == {0.01}
    assert {(t.lr, t.weight_decay) for t in compared if t.method == "SAM"} == {(0.4, 0.0)}
    assert {(t.lr, t.weight_decay) for t in compared if t.method == "dropout"} == {(0.1, 5e-4)}
    assert len(compared) == len(COMPARED) * len(conditions.SEEDS)


def test_results_of_an_earlier_choice_are_left_out() -> None:
    trial = conditions.trial(CONDITIONS[0], "SAM", 0.1, 0, lr=0.1)
    results = [row(**{**asdict(trial), "value": value}) for value in (0.1, 0.2)]
    assert measured(results, [trial]) == results[:1]
    assert missing(results, [trial, replace(trial, value=0.3)]) == [replace(trial, value=0.3)]


def test_a_saved_result_leaves_out_what_is_usual() -> None:
    trial = conditions.trial(CONDITIONS[0], "SAM", 0.1, 0, lr=0.1, width=32)
    assert "depth" not in shortened(asdict(trial))
    assert shortened(asdict(trial))["width"] == 32
    assert filled(shortened(asdict(trial))) == asdict(trial)


def searched(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of SGD's search in every condition."""
    while trials := missing(results, search.sgd(results)):
        results = [*results, *map(Bowl(), trials)]
    return results


def test_seeds_that_chose_something_test_nothing() -> None:
    results = searched([])
    chosen_by = {*conditions.TUNING_SEEDS, *range(5), *range(20, 25)}
    for name in ("defaults", "other_rates", "bar", "confirmation", "reviews"):
        trials = list(STAGES[name](results))
        assert trials, name
        assert all(trial.tested for trial in trials), name
        assert not {trial.seed for trial in trials} & chosen_by, name
    assert {trial.seed for trial in STAGES["step"](results)} == set(conditions.TUNING_SEEDS)
    assert not any(trial.tested for trial in STAGES["step"](results))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_waits_for_the_learning_rates(stage: str) -> None:
    for trial in STAGES[stage]([]):
        assert trial.lr > 0
        if trial.variant in ("defaults", "step") and trial.base == "sgd":
            assert trial.task in defaults.NOT_SEARCHED


def test_without_a_search_the_front_pages_methods_come_first_and_seed_by_seed() -> None:
    trials, front = list(defaults.defaults(searched([]))), {"base", *defaults.KEY}
    first = [t for t in trials if t.seed in conditions.LATER_SEEDS and t.method in front]
    assert trials[: len(first)] == first
    seeds = [trial.seed for trial in first]
    assert seeds == sorted(seeds) and {*seeds} == {*conditions.LATER_SEEDS}
    assert {(t.task, t.noise) for t in first} == {(c.task, c.noise) for c in CONDITIONS}
    assert {t.method for t in first} == front and {t.method for t in trials} == set(defaults.DEFAULTS)
    assert {t.seed for t in trials} == set(defaults.DEFAULT_SEEDS)
    assert {t.lr for t in trials if t.task in defaults.NOT_SEARCHED and t.base == "sgd"} == {0.05}


def scored(method: str, seed: int, score: float, condition: conditions.Condition) -> dict[str, Any]:
    return row(task=condition.task, noise=condition.noise, method=method, seed=seed, test_score=score)


def test_gains_are_paired_by_seed() -> None:
    alone = [scored("base", seed, 50.0 + seed, CONDITIONS[0]) for seed in range(3)]
    ours = [scored("SAM", seed, 52.0 + 2 * seed, CONDITIONS[0]) for seed in reversed(range(2))]
    found = tables.gains(ours, alone)
    assert found == {CONDITIONS[0]: [3.0, 2.0]}
    worse = {CONDITIONS[1]: [-2.0, -4.0]}
    cells = [next(iter(column.cells)) for column in tables.summary({"SAM": found | worse}).columns]
    assert cells == ["SAM", "-0.2 ± 34.9", "+2.5", "-3.0", "0 of 2", "0", "1", "-3.0"]


def test_points_lost_to_the_best_lam() -> None:
    trial = conditions.trial(CONDITIONS[0], "FAM, proximal", 1.0, 0, lr=0.1, depth=1)
    scores = {(1.0, 10): 60.0, (0.5, 10): 57.0, (1.0, 20): 59.5}
    results = [
        {**asdict(replace(trial, value=lam, every=every, seed=seed)), "validation": score + seed}
        for (lam, every), score in scores.items()
        for seed in range(2)
    ]
    lost = tables.lost(results, "validation")
    assert lost == {f"{CONDITIONS[0].name}, 1 hidden layer": {(1.0, 10): 0.0, (0.5, 10): 3.0, (1.0, 20): 0.5}}


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_nothing_to_report_is_one_sentence(folder: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match=r"expected a folder with the study's results"):
        study.main(["--report", str(tmp_path / folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_help_names_stages_and_conditions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "stage defaults Every method at its default" in shown
    assert "task fashion-vit Fashion-MNIST, transformer, 20 % wrong" in shown


@pytest.mark.slow
def test_the_study_runs_goes_on_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CONDITIONS", (conditions.of("digits", 0.4),))
    monkeypatch.setattr(search, "SEEDS", (0, 1))
    quick = Method((1e-3, 1e-2), (1e-3,), "fam", "hidden", METHODS["FAM, hidden, detached"].options)
    monkeypatch.setattr(search, "COMPARED", {"SGD": COMPARED["SGD"], "FAM, hidden, detached": quick})
    monkeypatch.setattr(search, "METHODS", {**METHODS, "FAM, hidden, detached": quick})
    monkeypatch.setattr(search, "RATES", (0.05,))
    monkeypatch.setattr(search, "DECAYS", (5e-4,))
    monkeypatch.setattr(search, "LEARNING_RATES", (0.05,))
    monkeypatch.setattr(search, "WEIGHT_DECAYS", (0.0, 5e-4))
    short = replace(conditions.usual("digits"), epochs=1)
    monkeypatch.setattr(conditions, "usual", lambda task: short)
    stages = ["sgd", "tuning", "comparison"]
    command = ["--workers", "1", "--out", str(tmp_path), "--tasks", "digits", "--stages", *stages]
    with monkeypatch.context() as patch:  # a process for every stage would take most of the time
        patch.setattr(
            study, "ProcessPoolExecutor", lambda workers, **of_processes: ThreadPoolExecutor(workers)
        )
        study.main(command)
    path = tmp_path / "comparison.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines].count("FAM, hidden, detached") == 2
    path.write_text("\n".join([*lines[1:], lines[0][:30]]))  # one trial lost, half a line left behind
    study.main(command)
    assert sorted(json.loads(line)["seed"] for line in path.read_text().splitlines()) == [0, 0, 1, 1]
    assert "FAM, hidden, detached" in (tmp_path / "tables.md").read_text()
