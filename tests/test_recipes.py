"""Every recipe runs its real code path in seconds and writes what it promises."""

from __future__ import annotations

import dataclasses
import json
import pickle
import urllib.error
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from fam_optim import observe, relative_flatness
from recipes import quickstart, report, train
from recipes.benchmark import __main__ as benchmark
from recipes.benchmark import counts, estimators, scaling
from recipes.benchmark.candidates import CANDIDATES, chosen
from recipes.benchmark.cases import TASKS as BENCHMARK
from recipes.benchmark.cases import Head
from recipes.benchmark.cases import Task as BenchmarkTask
from recipes.benchmark.estimators_extra import ESTIMATORS, Forward
from recipes.engine import training
from recipes.engine.optimizers import OPTIMIZERS
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Source
from recipes.paper import flatness_picture, hessian_time, reparametrisation, trace_time
from recipes.tasks import TASKS, load_task

RECIPES: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "quickstart": (quickstart.main, ["quickstart.json", "quickstart.md", "quickstart-curves.png", "runs"]),
    "benchmark": (benchmark.main, ["benchmark.json", "benchmark.png"]),
    "benchmark_counts": (counts.main, ["benchmark_counts.json"]),
    "estimator_spread": (estimators.main, ["estimator_spread.json", "estimator_spread.png"]),
    "hessian_time": (hessian_time.main, ["hessian_time.json", "hessian_time.png"]),
    "scaling": (scaling.main, ["scaling.json", "scaling.png"]),
    "trace_time": (trace_time.main, ["trace_time.json", "trace_time.png"]),
    "reparametrisation": (reparametrisation.main, ["reparametrisation.json", "reparametrisation.png"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name: str, tmp_path: Path) -> None:
    main, files = RECIPES[name]
    main(["--smoke", "--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    results = json.loads((tmp_path / files[0]).read_text())
    assert results["runs"] and results["environment"]["torch"]


def head(classes: int, features: int, rows: int) -> BenchmarkTask:
    model = Head(classes, features, rows)
    return BenchmarkTask(model, model.head, torch.zeros(()), torch.randint(0, classes, (rows,)))


def test_a_wrong_number_ends_the_benchmark() -> None:
    task = BENCHMARK["tiny 16x16"]()
    candidates = chosen(["FAM exact", "FAM full", "vectorised Hessian"], "tiny 16x16")
    checked = benchmark.check(task, candidates, 8)
    assert isinstance(checked, dict) and checked["FAM full"]["mean"] == pytest.approx(checked["kappa"], 1e-4)
    wrong = dataclasses.replace(CANDIDATES["FAM exact"], draws=lambda task, probes: [1.01 * checked["kappa"]])
    with pytest.raises(AssertionError, match="SAM: expected"):
        benchmark.check(task, {"SAM": wrong}, 8)


def test_a_check_leaves_the_model_as_it_was() -> None:
    task = BENCHMARK["tiny 16x16"]()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    benchmark.check(task, chosen(list(CANDIDATES), "tiny 16x16"), 2)
    assert same(before, dict(task.model.state_dict()))
    assert task.model.training and all(p.requires_grad and p.grad is None for p in task.model.parameters())


def test_counts_of_a_head() -> None:
    """Many classes: the head takes three products, SAM six, FAM three more, a probe two more."""
    task = head(classes=40, features=16, rows=8)
    labels = ("plain", "SAM", "FAM exact", "FAM exact, detached", "FAM hutchinson")
    found = {label: counts.step_flops(task, label) for label in labels}
    product = 2 * 40 * 16 * 8
    assert found == dict(zip(labels, (n * product for n in (3, 6, 6, 5, 5)), strict=True))


def test_counts_of_a_perceptron() -> None:
    """Gauss-Newton of all layers: a product more for the derivatives at the layers' outputs, and for each of
    the weight's and of the output's derivative of that; with a constant curvature only for the weight's."""
    widths = (6, 5, 7, 3)
    layers: list[torch.nn.Module] = [torch.nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])
    task = BenchmarkTask(model, layers, torch.randn(4, 6), torch.randint(0, 3, (4,)))
    labels = ("plain", "FAM Gauss-Newton", "FAM Gauss-Newton, detached")
    plain, whole, detached = (counts.step_flops(task, label) for label in labels)
    first, others = 2 * 4 * 6 * 5, 2 * 4 * (5 * 7 + 7 * 3)
    assert plain == 2 * first + 3 * others  # nothing below the first layer asks for its input's derivative
    assert detached == plain + 2 * (first + others)
    assert whole == plain + 3 * (first + others)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_unbiased(name: str) -> None:
    """Value, and gradient along the exact gradient and along random directions."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 4)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), layer, torch.nn.Tanh(), torch.nn.Linear(4, 3)
    )
    phi = model[:2](torch.randn(16, 6))
    with observe(layer) as observed:
        z = layer(phi)
        loss = torch.nn.functional.cross_entropy(model[3:](z), torch.randint(0, 3, (16,)))
    exact = relative_flatness(loss, observed)
    exact_gradient = estimators.gradient(exact, model)
    directions = torch.cat([exact_gradient[None], torch.randn(4, len(exact_gradient))])
    forward = Forward(loss, phi, z, layer.weight)
    for n in (1, 4):
        estimator = ESTIMATORS[name]
        if not estimator.possible(forward, n):
            continue
        draws = []
        for _ in range(300):
            value = estimator.run(forward, n)
            along = directions @ estimators.gradient(value, model)
            draws.append(torch.cat([value.detach()[None], along]))
        samples = torch.stack(draws)
        wanted = torch.cat([exact.detach()[None], directions @ exact_gradient])
        error = samples.std(0) / len(samples) ** 0.5
        assert error[0] > 0
        assert torch.all((samples.mean(0) - wanted).abs() <= 5 * error + 1e-5 * wanted.abs()), (n, error)


class Stopped(Exception):
    """Stands for a power cut."""


def run(path: Path, *arguments: str) -> None:
    train.main([*arguments, "--smoke", "--device", "cpu", "--out", str(path)])


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Fail at the first step of an epoch."""
    batches = training.epoch_batches

    def failing(data: object, conditions: object, number: int) -> object:
        if number == epoch:
            raise Stopped
        return batches(data, conditions, number)

    monkeypatch.setattr("recipes.engine.training.epoch_batches", failing)


def same(a: object, b: object) -> bool:
    """Equality of nested containers of tensors, bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


HEAVY = {"cifar100"}  # EfficientNet-B7 is as large in a smoke test


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["quickstart-noise40"])
def test_a_stopped_run_continues_bit_for_bit(
    task: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resume(task, optimizer, tmp_path, monkeypatch)


@pytest.mark.parametrize("task", [name for name in TASKS if name not in HEAVY])
def test_every_task_trains_stops_and_continues(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_resume(task, "fam", tmp_path, monkeypatch)


def check_resume(task: str, optimizer: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (task, "--optimizer", optimizer, "--epochs", "3", "--seeds", "5")
    run(path / "whole", *arguments)
    with monkeypatch.context() as context:
        stop_in_epoch(context, 3)
        with pytest.raises(Stopped):
            run(path / "parts", *arguments)
    run(path / "parts", *arguments, "--resume")
    folders = [RunFolder(path / part / task / optimizer / "seed5") for part in ("whole", "parts")]
    assert len(folders[0].epochs()) == 3
    assert folders[0].epochs() == folders[1].epochs()
    states = [folder.load(torch.device("cpu")) for folder in folders]
    assert states[0] and same(states[0], states[1])
    assert not same(states[0]["model"], {name: 2 * value for name, value in states[0]["model"].items()})


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(HEAVY))
def test_heavy_task(task: str, tmp_path: Path) -> None:
    run(tmp_path, task, "--optimizer", "fam")
    (record,) = RunFolder(tmp_path / task / "fam" / "seed0").epochs()
    assert record["kappa"] > 0


def test_report_of_several_optimizers_and_seeds(tmp_path: Path) -> None:
    arguments = ("quickstart", "--seeds", "0", "1", "--epochs", "2")
    run(tmp_path, *arguments, "--optimizer", "sgd")
    run(tmp_path, *arguments, "--optimizer", "fam", "--lam", "0.001", "0.01")
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report.json").read_text())
    assert [(run["label"], run["seed"]) for run in results["runs"]] == [
        (label, seed) for label in ("sgd", "fam-lam=0.001", "fam-lam=0.01") for seed in (0, 1)
    ]
    first = (tmp_path / "report.md").read_text()
    mean = sum(run["history"]["test_accuracy"][-1] for run in results["runs"][:2]) / 2
    assert f"| {mean:.4g} ±" in first
    (tmp_path / "report.md").unlink()
    report.main([str(tmp_path / "report.json")])  # from the JSON alone
    assert (tmp_path / "report.md").read_text() == first


def test_flatness_picture_lies_on_the_parabola(tmp_path: Path) -> None:
    run(tmp_path, "quickstart", "--optimizer", "sgd", "fam")
    folders = [str(tmp_path / "quickstart" / label / "seed0") for label in ("sgd", "fam")]
    flatness_picture.main([*folders, "--out", str(tmp_path), "--draws", "2"])
    assert (tmp_path / "flatness_picture.png").exists()
    results = json.loads((tmp_path / "flatness_picture.json").read_text())
    strengths = results["configuration"]["strengths"]
    for curve in results["runs"]:
        extra, predicted = curve["extra_loss"][2], strengths[2] ** 2 / 2 * curve["kappa"]
        assert abs(extra - predicted) < 10 * curve["standard_error"][2] + 0.01 * predicted


def test_measure_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "quickstart", "--optimizer", "fam")
    capsys.readouterr()
    run(tmp_path, "quickstart", "--optimizer", "fam", "--measure-only", "--float64")
    output = capsys.readouterr().out
    (record,) = RunFolder(tmp_path / "quickstart" / "fam" / "seed0").epochs()
    assert f"{record['kappa']:.4g}"[:4] in output  # the same samples here: the smoke test has 256


MISUSE = {
    "a run that is there already": (["quickstart"], "holds a run already.*--resume"),
    "other settings": (["quickstart", "--resume", "--epochs", "7"], "begun with another.*epochs: 1 there, 7"),
    "an option that nobody takes": (["quickstart", "--rho", "0.1"], r"--rho: none of.*\(fam\) takes it"),
    "nothing to measure": (["quickstart", "--measure-only", "--seeds", "3"], "no checkpoint: train first"),
}


@pytest.mark.parametrize(("arguments", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    run(tmp_path, "quickstart")
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, *arguments)


@pytest.mark.parametrize("task", ["fashion-mnist-small", "cifar10", "svhn", "fashion-mnist", "skulls", "rte"])
def test_missing_data_is_one_sentence_with_the_remedy(task: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=rf"^{task}: .*--download"):
        train.main([task, "--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", ["fashion-mnist-small", "cifar10", "cifar100", "svhn", "fashion-mnist"])
def test_a_download_that_fails_is_one_sentence(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SystemExit, match=rf"^{task}: .*could not be downloaded.*check the connection"):
        train.main([task, "--download", "--data", str(tmp_path), "--out", str(tmp_path / "runs")])


@pytest.mark.parametrize("task", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_own_files(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a smoke test cannot show, whose images are generated: that the real loader is called right."""
    cifar = getattr(torchvision.datasets, task.upper())
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    folder = tmp_path / task / cifar.base_folder
    folder.mkdir(parents=True)
    images = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    for name, _ in (*cifar.train_list, *cifar.test_list):
        key = "labels" if task == "cifar10" else "fine_labels"
        (folder / name).write_bytes(pickle.dumps({"data": images, key: [3, 5]}))
    (folder / cifar.meta["filename"]).write_bytes(
        pickle.dumps({cifar.meta["key"]: [str(i) for i in range(9)]})
    )
    data = load_task(task).data(Source(tmp_path), 0)
    for samples in (data.train, data.evaluation["test"]):
        inputs, target = samples[1]
        assert inputs.shape == (3, *([32, 32] if task == "cifar10" else [224, 224]))
        assert inputs.dtype == torch.float32 and target == 5


def test_svhn_is_read_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *arguments: True)
    (tmp_path / "svhn").mkdir()
    for split in ("train", "test"):
        content = {"X": np.zeros((32, 32, 3, 2), dtype=np.uint8), "y": np.array([[10], [7]])}
        scipy.io.savemat(tmp_path / "svhn" / f"{split}_32x32.mat", content)
    data = load_task("svhn").data(Source(tmp_path), 0)
    for samples in (data.train, data.evaluation["test"]):
        assert samples[0][0].shape == (3, 32, 32)
        assert [samples[i][1] for i in range(2)] == [0, 7]


def test_stopping_by_hand_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    with pytest.raises(SystemExit, match="--resume goes on"):
        run(tmp_path, "quickstart")
