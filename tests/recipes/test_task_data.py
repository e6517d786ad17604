"""Data sets are read from their publishers' own files; what is missing is one sentence with the remedy."""

from __future__ import annotations

import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision

from recipes import train
from recipes.engine.task import Source
from recipes.tasks import load_task


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
