"""The paper's settings in the tasks: their values, their marks, and the layers and curvature to ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from recipes import train
from recipes.engine import marks
from recipes.engine.layers import select
from recipes.engine.optimizers import settings
from recipes.engine.schedules import Steps
from recipes.engine.task import Source, Task
from recipes.tasks import TASKS, load_task
from recipes.tasks.augment import Cutout
from recipes.tasks.models import SmallConvNet, WideResNet

# What the paper's section 4 states, by the names of `marks.settings_of`
PAPER = {
    "cifar10": {
        **{"epochs": "250", "batch size": "64", "optimizer": "sgd", "lr": "0.03", "momentum": "0.9"},
        **{"weight_decay": "0.0005", "schedule": "cosine", "fam lam": "0.1", "fam measure": "neuronwise"},
        "sam lr": "0.01",
    },
    "cifar100": {"batch size": "32", "optimizer": "adam", "fam measure": "neuronwise"},
    "svhn": {
        **{"epochs": "100", "batch size": "128", "optimizer": "nesterov", "lr": "0.1", "momentum": "0.9"},
        **{"weight_decay": "0.0005", "schedule": "x 0.2 after 0.3, 0.6, 0.8", "fam lam": "0.1"},
        "fam measure": "neuronwise",
    },
    "fashion-mnist": {
        **{"epochs": "200", "batch size": "64", "optimizer": "nesterov", "lr": "0.01", "momentum": "0.9"},
        **{"weight_decay": "0.0005", "schedule": "x 0.2 after 0.3, 0.6, 0.8", "fam measure": "neuronwise"},
    },
    "skulls": {
        **{"epochs": "200", "optimizer": "adam", "lr": "0.0001", "schedule": "constant"},
        **{"fam measure": "layerwise", "fam mode": "hutchinson"},
    },
    "rte": {"epochs": "20", "batch size": "32", "lr": "2e-05", "fam lam": "3000000.0"},
}
OPEN = {  # what the paper does not say, and must not be called the paper's
    "cifar10": ("seeds", "sam rho", "sam weight_decay", "fam normalize"),
    "cifar100": ("lr", "weight_decay", "epochs", "fam lam", "head", "augmentation", "schedule", "seeds"),
    "svhn": ("seeds", "sam rho", "dropout", "fam normalize"),
    "fashion-mnist": ("seeds", "fam lam", "fam normalize"),
    "skulls": ("batch size", "fam n_samples", "seeds", "normalisation"),
    "skulls-small": ("network", "samples", "input", "epochs"),
    "rte": ("case", "optimizer", "weight decay", "fam measure", "fam normalize"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings_have_the_papers_values_and_its_mark(name: str) -> None:
    task = load_task(name)
    found = marks.settings_of(task)
    assert {setting: found[setting] for setting in PAPER[name]} == PAPER[name]
    assert all(marks.mark(task, setting) == marks.PAPER for setting in PAPER[name])


@pytest.mark.parametrize("name", OPEN)
def test_what_the_paper_leaves_open_is_not_called_the_papers(name: str) -> None:
    task = load_task(name)
    assert set(OPEN[name]) <= set(marks.settings_of(task))
    assert all(marks.mark(task, setting) != marks.PAPER for setting in OPEN[name])


@pytest.mark.parametrize("name", TASKS)
def test_every_mark_names_a_setting_once(name: str) -> None:
    task = load_task(name)
    marked = (*task.paper, *task.code)
    assert len(set(marked)) == len(marked)
    assert set(marked) <= set(marks.settings_of(task))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion-mnist", "skulls", "rte"])
def test_the_papers_fam_does_not_follow_the_librarys_defaults(name: str) -> None:
    fam = settings(load_task(name), "fam", {})
    assert {"measure", "mode", "curvature", "detach_hessian"} <= fam.keys()
    assert fam["curvature"] == "hessian" and fam["detach_hessian"] is False


def test_sam_of_cifar100_is_over_nesterov() -> None:
    sam = settings(load_task("cifar100"), "sam", {})
    assert (sam["base"], sam["nesterov"], sam["lr"], sam["rho"]) == ("nesterov", True, 1e-5, 0.05)
    assert settings(load_task("cifar100"), "fam", {})["base"] == "adam"


@pytest.mark.parametrize("name", ["svhn", "fashion-mnist"])
def test_w_of_wide_resnet_is_the_outputs_matrix(name: str) -> None:
    task = load_task(name)
    (layer,) = select(task.model(Source(smoke=True)), task.layers)
    assert layer.weight.shape == (10, 64)


def test_steps() -> None:
    schedule = Steps(0.3, 0.6, 0.8, factor=0.2)
    assert [schedule(progress) for progress in (0, 0.29, 0.3, 0.6, 0.8)] == pytest.approx(
        [1, 1, 0.2, 0.04, 0.008]
    )


def test_cutout_hangs_over_the_border_and_covers_196_pixels_on_average() -> None:
    torch.manual_seed(0)
    image = torch.ones(3, 32, 32)
    covered = [Cutout(16)(image) for _ in range(3000)]
    assert all(torch.equal(a[0], a[1]) and torch.equal(a[0], a[2]) for a in covered)
    areas = torch.tensor([(a[0] == 0).sum().item() for a in covered])
    assert areas.max() == 256 and areas.min() >= 64
    assert abs(areas.float().mean() - 196) < 5 * areas.float().std() / len(areas) ** 0.5
    assert torch.equal(image, torch.ones(3, 32, 32))  # the image itself stays


@pytest.mark.parametrize("name", ["svhn", "fashion-mnist"])
def test_cutout_fills_after_the_normalisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A black image becomes negative everywhere but in the square, which is 0."""
    captured = {}
    monkeypatch.setattr("recipes.tasks.vision.both", lambda *arguments: captured.update(train=arguments[3]))
    load_task(name).data(Source(Path("nowhere")), 0)
    torch.manual_seed(0)
    black = torch.zeros(1 if name == "fashion-mnist" else 3, 32, 32, dtype=torch.uint8)
    steps = captured["train"].transforms
    images = [(steps[-1] if name == "svhn" else captured["train"])(black) for _ in range(5)]
    for image in images:
        square = image == 0
        assert 64 <= square[0].sum() <= 256
        assert torch.all(image[~square] < -0.9)


def names_of(model: torch.nn.Module, *names: str) -> list[str]:
    """The module names of the chosen layers."""
    chosen = select(model, names)
    return [name for module in chosen for name, other in model.named_modules() if other is module]


def test_layers_by_name_and_by_group() -> None:
    model = SmallConvNet()
    every = ["features.0", "features.4", "features.9", "head"]
    assert names_of(model, "all") == every
    assert names_of(model, "hidden") == every[:-1]
    assert names_of(model, "last") == ["head"]
    assert names_of(model, "features.9", "head") == every[2:]
    assert names_of(model, "last", "all") == ["head", *every[:-1]]  # each once
    assert names_of(WideResNet(10, 1), "penultimate") == ["penultimate"]


def test_an_unknown_layer_is_one_sentence_with_the_names(tmp_path: Path) -> None:
    wanted = (
        r"--layer to name layers of this network, got 'foo': it takes features.0, .*head, all, hidden, last"
    )
    with pytest.raises(SystemExit, match=wanted):
        train.main(["quickstart", "--smoke", "--layer", "foo", "--out", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_what_kappa_cannot_do_is_said_before_a_run_is_begun(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"quickstart: exact kappa of `layer` Conv2d.*mode='hutchinson'"):
        arguments = ["--smoke", "--optimizer", "sgd", "--layer", "all", "--out", str(tmp_path / "runs")]
        train.main(["quickstart", *arguments])
    assert not (tmp_path / "runs").exists()


def test_layers_and_curvature_reach_the_optimizer_and_what_is_measured(tmp_path: Path) -> None:
    """Gauss-Newton of all layers, of FAM's run and the plain one: positive, and more than the head's."""
    flags = ["--smoke", "--optimizer", "sgd", "fam", "--curvature", "gauss_newton", "--mode", "hutchinson"]
    kappas = {}
    for layers in (("head",), ("all",)):
        train.main(["quickstart", *flags, "--layer", *layers, "--device", "cpu", "--out", str(tmp_path)])
    for path in tmp_path.rglob("config.json"):
        config = json.loads(path.read_text())
        assert config["kappa"] == {"mode": "hutchinson", "curvature": "gauss_newton"}
        assert config["settings"].get("curvature", "gauss_newton") == "gauss_newton"
        record = json.loads((path.parent / "epochs.jsonl").read_text())
        kappas[config["settings"]["optimizer"], *config["layers"]] = record["kappa"]
    assert len(kappas) == 4
    for optimizer in ("sgd", "fam"):
        assert 0 < kappas[optimizer, "head"] < kappas[optimizer, "all"]


@pytest.mark.parametrize("task", ["svhn", "fashion-mnist", "rte", "quickstart"])
def test_every_task_takes_layers_and_curvature(task: str, tmp_path: Path) -> None:
    if task == "rte":
        pytest.importorskip("transformers")
    layers = ["bert.bert.pooler.dense", "last"] if task == "rte" else ["hidden"]
    flags = ["--curvature", "gauss_newton", "--mode", "hutchinson", "--layer", *layers]
    train.main([task, "--smoke", *flags, "--lam", "0.001", "--device", "cpu", "--out", str(tmp_path)])
    (path,) = tmp_path.rglob("epochs.jsonl")
    assert json.loads(path.read_text())["kappa"] > 0


def test_the_marks_are_printed_and_what_the_user_gave_is_nobodys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["fashion-mnist", "--smoke", "--lr", "0.05", "--device", "cpu", "--out", str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "paper: network WideResNet-28-10" in printed
    assert "released code: dropout 0.3" in printed
    assert "ours: seeds any" in printed
    assert "lr 0.01" not in printed and "momentum 0.9" in printed


def test_a_table_of_settings_has_the_letter_of_each_mark() -> None:
    tasks: list[Task] = [load_task(name) for name in ("cifar10", "cifar100")]
    table = marks.table(tasks)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    cells = {name: values for name, *values in rows}
    assert cells["lr"] == ["0.03 (P)", "1e-06 (C)"]
    assert cells["seeds"] == ["any (--seeds) (O)"] * 2
    assert cells["head"][0] == "-"
