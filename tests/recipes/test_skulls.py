"""The skulls: what is generated, one evaluation set with two defects, the loss, and when it is evaluated."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("monai")

from recipes import train
from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Missing, Source
from recipes.tasks import load_task, shells, skulls


@pytest.fixture(scope="module")
def small() -> skulls.Data:
    setting = skulls.Setting(32, (2, 4, 4, 8), train=3, evaluation=4)
    return skulls.generated(setting)


def test_one_evaluation_set_has_two_defects(small: skulls.Data) -> None:
    """The targets are the same skulls; the inputs are the skulls without something, and not the same."""
    same, other = (small.evaluation[name] for name in ("same_defect", "other_defect"))
    assert len(same) == len(other) == 4  # type: ignore[arg-type]
    for number in range(4):
        (a, complete), (b, target) = same[number], other[number]
        assert torch.equal(complete, target)
        assert not torch.equal(a, b)
        for defective in (a, b):
            assert 0.3 < defective.sum() / complete.sum() < 1
            assert torch.all(defective <= complete)


def test_training_and_evaluation_skulls_are_different(small: skulls.Data) -> None:
    trained = [small.train[number][1] for number in range(3)]
    evaluated = [small.evaluation["same_defect"][number][1] for number in range(4)]
    every = trained + evaluated
    assert all(not torch.equal(a, b) for n, a in enumerate(every) for b in every[:n])


@pytest.mark.parametrize("size", [32, 64])
def test_shells_are_always_the_same_and_scale(size: int) -> None:
    """A shell is a shape: it fills about the same part of the volume whatever the number of voxels."""
    defects = {"same": "round", "other": "window"}
    first, again = (shells.shell(np.random.default_rng((1, 7)), size, defects) for _ in range(2))
    assert first.keys() == {"complete", "same", "other"}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    reference = shells.shell(np.random.default_rng((1, 7)), 48, defects)
    for name in first:
        assert first[name].mean() == pytest.approx(reference[name].mean(), rel=0.1)


def test_the_loss_has_the_squared_denominator() -> None:
    """Milletari et al.: 1 - 2 sum p t / (sum p^2 + sum t^2)."""
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 1, 4, 4, 4), (torch.rand(1, 1, 4, 4, 4) > 0.5).float()
    p = logits.sigmoid()
    wanted = 1 - 2 * (p * targets).sum() / (p.square().sum() + targets.square().sum())
    loss = load_task("skulls").loss(logits, targets)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    plain = 1 - 2 * (p * targets).sum() / (p.sum() + targets.sum())
    assert abs(loss.item() - plain.item()) > 1e-3  # what MONAI computes without squared_pred


@pytest.mark.parametrize(("setting", "wanted"), [(skulls.PAPER, 986_874), (skulls.SMALL, 984_056)])
def test_networks_have_about_a_million_parameters_and_a_code_of_8(
    setting: skulls.Setting, wanted: int
) -> None:
    model = skulls.LatentAutoEncoder(setting)
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted
    assert model.get_submodule("from_latent").weight.shape == (64, 8)
    volumes = torch.zeros(1, 1, *(setting.size,) * 3)
    assert model(volumes).shape == volumes.shape


def test_an_empty_prediction_counts_as_the_diagonal() -> None:
    targets = torch.zeros(1, 1, 8, 8, 8)
    targets[..., 2:5, 2:5, 2:5] = 1
    metrics = skulls.overlap_and_distances(lambda inputs: inputs - 1, [(torch.zeros_like(targets), targets)])  # type: ignore[arg-type]
    assert metrics["dsc"] == [0.0]
    assert metrics["hd"] == metrics["hd95"] == [pytest.approx(8 * math.sqrt(3))]


def test_it_is_watched_on_the_way_and_evaluated_at_the_half_and_the_end(tmp_path: Path) -> None:
    """DSC as a mean at every twentieth, per skull at the two epochs of Table 2, kappa where it is watched."""
    train.main(["skulls-small", "--smoke", "--epochs", "40", "--device", "cpu", "--out", str(tmp_path)])
    records = next(RunFolder(path.parent).epochs() for path in tmp_path.rglob("config.json"))
    watched = [record["epoch"] for record in records if "kappa" in record]
    assert watched == list(range(2, 41, 2))
    assert [record["epoch"] for record in records if "same_defect_dsc" in record] == watched
    assert [record["epoch"] for record in records if "same_defect_hd" in record] == [20, 40]
    assert isinstance(records[1]["other_defect_dsc"], float)
    assert isinstance(records[-1]["other_defect_dsc"], list)


def write(folder: Path, *names: str) -> None:
    """A defective box for each name as NIfTI files, of twice the size that is read."""
    import nibabel

    for kind in (
        "train/complete",
        "train/defective",
        *(f"evaluation/{k}" for k in ("complete", *skulls.EVALUATED)),
    ):
        (folder / kind).mkdir(parents=True)
        for number, name in enumerate(names):
            volume = np.zeros((64, 64, 64), dtype=np.uint8)
            volume[8 + 2 * number : 32, 8:32, 8 : 32 if kind.endswith("complete") else 24] = 1
            image = nibabel.Nifti1Image(volume, np.eye(4))
            nibabel.save(image, folder / kind / f"{name}.nii.gz")


def test_stored_skulls_are_read_in_pairs_and_in_the_size_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "skulls", "a", "b")
    data = skulls.stored(tmp_path / "skulls", 32)
    assert set(data.evaluation) == {"same_defect", "other_defect"}
    for samples in (data.train, *data.evaluation.values()):
        for number in range(2):
            defective, complete = samples[number]
            assert defective.shape == complete.shape == (1, 32, 32, 32) and defective.dtype == torch.float32
            assert complete.sum() == (12 - number) * 12 * 12 and defective.sum() == (12 - number) * 12 * 8


def test_folders_that_do_not_match_are_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "skulls", "a", "b")
    next((tmp_path / "skulls" / "evaluation" / "other_defect").iterdir()).unlink()
    with pytest.raises(Missing, match="2 in complete, 2 in same_defect, 1 in other_defect"):
        load_task("skulls").data(Source(tmp_path), 0)


def test_gauss_newton_of_dice_is_refused(tmp_path: Path) -> None:
    """Dice is not convex in the logits: the library says which losses it knows, and nothing is begun."""
    out = tmp_path / "runs"
    with pytest.raises(SystemExit, match=r"skulls-small: .*curvature=.hessian"):
        train.main(
            ["skulls-small", "--smoke", "--curvature", "gauss_newton", "--device", "cpu", "--out", str(out)]
        )
    assert not out.exists()
