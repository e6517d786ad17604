"""The paper's settings in the tasks: their values, their marks, and the layers and curvature to ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from recipes import train
from recipes.engine.layers import select
from recipes.engine.optimizers import WRAPPERS, settings
from recipes.engine.schedules import steps
from recipes.engine.task import Source
from recipes.tasks import load_task
from recipes.tasks.models import SmallConvNet, wide_resnet
from recipes.tasks.vision import cutout

# What the paper's section 4 states, by the names of the page of settings
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
    "rte": ("case", "optimizer", "weight decay", "fam measure", "fam normalize"),
}
WORDS = {  # settings that are no numbers of a task
    *("network", "stem", "input", "loss", "seeds", "head", "augmentation", "normalisation", "dropout"),
    *("samples", "case", "weight decay", "schedule"),
}
PAGE = Path(train.__file__).parent / "paper" / "settings.md"


def page() -> dict[str, dict[str, tuple[str, str]]]:
    """Of the page's table, by task and setting: the value and its mark."""
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    (_, *names), _, *rows = lines
    found: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in names}
    for setting, *cells in rows:
        for name, cell in zip(names, cells, strict=True):
            if cell != "-":
                found[name][setting] = (cell[:-4], cell[-2])
    return found


def settings_of(name: str) -> dict[str, str]:
    """Every number of a task by its name on the page."""
    task = load_task(name)
    values = {"epochs": task.epochs, "batch size": task.batch_size, "layer": ", ".join(task.layers)}
    values |= settings(task, task.base, {}) | {"optimizer": task.base}
    for wrapper in ("fam", "sam"):
        own = {**WRAPPERS[wrapper], **task.methods.get(wrapper, {})}
        values |= {f"{wrapper} {key}": value for key, value in own.items()}
    return {key: str(value) for key, value in values.items() if key not in ("base", "nesterov")}


@pytest.mark.parametrize("name", PAPER)
def test_the_page_has_the_tasks_settings_and_their_marks(name: str) -> None:
    found, own = page()[name], settings_of(name)
    assert {mark for _, mark in found.values()} <= set("PCO")
    assert {key: value for key, (value, _) in found.items() if key not in WORDS} == {
        key: value for key, value in own.items() if (name, key) != ("skulls", "fam normalize")
    }
    assert {key: found[key][0] for key in PAPER[name]} == PAPER[name]
    assert all(found[key][1] == "P" for key in PAPER[name])
    assert all(found[key][1] != "P" for key in OPEN[name])


SCHEDULES = {
    "cosine": [1, 0.8536, 0.5, 0.1464],
    "constant": [1, 1, 1, 1],
    "linear": [1, 0.75, 0.5, 0.25],
    "x 0.2 after 0.3, 0.6, 0.8": [1, 1, 0.2, 0.04],
}


@pytest.mark.parametrize("name", PAPER)
def test_the_schedule_is_the_pages(name: str) -> None:
    schedule = load_task(name).schedule
    wanted = SCHEDULES[page()[name]["schedule"][0]]
    assert [schedule(progress) for progress in (0, 0.25, 0.5, 0.75)] == pytest.approx(wanted, abs=1e-4)


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
    schedule = steps(0.3, 0.6, 0.8, factor=0.2)
    assert [schedule(progress) for progress in (0, 0.29, 0.3, 0.6, 0.8)] == pytest.approx(
        [1, 1, 0.2, 0.04, 0.008]
    )


def test_cutout_hangs_over_the_border_and_covers_196_pixels_on_average() -> None:
    torch.manual_seed(0)
    image = torch.ones(3, 32, 32)
    covered = [cutout(image) for _ in range(3000)]
    assert all(torch.equal(a[0], a[1]) and torch.equal(a[0], a[2]) for a in covered)
    areas = torch.tensor([(a[0] == 0).sum().item() for a in covered])
    assert areas.max() == 256 and areas.min() >= 64
    assert abs(areas.float().mean() - 196) < 5 * areas.float().std() / len(areas) ** 0.5
    assert torch.equal(image, torch.ones(3, 32, 32))  # the image itself stays


@pytest.mark.parametrize("name", ["svhn", "fashion-mnist"])
def test_cutout_fills_after_the_normalisation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A black image becomes negative everywhere but in the square, which is 0."""
    captured = {}
    monkeypatch.setattr("recipes.tasks.vision.images", lambda *arguments: captured.update(train=arguments[2]))
    load_task(name)
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
    assert names_of(wide_resnet(10, 1), "penultimate") == ["penultimate"]


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
        kappas[(config["settings"]["optimizer"], *config["layers"])] = record["kappa"]
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


def test_a_task_of_the_paper_says_where_its_settings_are_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["fashion-mnist", "--smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert PAGE.relative_to(PAGE.parents[2]).as_posix() in capsys.readouterr().out
