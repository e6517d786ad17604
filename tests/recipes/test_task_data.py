"""Data sets are read from their publishers' own files; what is missing is one sentence with the remedy."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import urllib.error
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.io
import torch
import torchvision
import transformers

from recipes import train
from recipes.engine.task import Missing, Source
from recipes.tasks import load_task, text
from recipes.tasks.splitting import split


@pytest.mark.parametrize(
    "task", ["fashion-mnist-small", "cifar10", "svhn", "fashion-mnist", "skulls", "rte", "reviews"]
)
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
    for part in ("train", "test"):
        content = {"X": np.zeros((32, 32, 3, 2), dtype=np.uint8), "y": np.array([[10], [7]])}
        scipy.io.savemat(tmp_path / "svhn" / f"{part}_32x32.mat", content)
    data = load_task("svhn").data(Source(tmp_path), 0)
    for samples in (data.train, data.evaluation["test"]):
        assert samples[0][0].shape == (3, 32, 32)
        assert [samples[i][1] for i in range(2)] == [0, 7]


def test_reviews_are_read_from_pips_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content_of_file = (
        "1\t1.5\tfine film\r\n2\t0\tno opinion\r\n3\t-0.5\tdull\r\n4\t-2\tbad\r\n5\t1\tgood!\r\n"
    )
    inner, outer = io.BytesIO(), io.BytesIO()
    for archive, path, content in (
        (inner, f"study/{text.INSIDE[1]}", content_of_file.encode()),
        (outer, f"release/{text.INSIDE[0]}", None),
    ):
        data = inner.getvalue() if content is None else content
        with tarfile.open(fileobj=archive, mode="w:gz") as opened:
            member = tarfile.TarInfo(path)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    file = tmp_path / "reviews" / f"{text.RELEASE.replace('==', '-')}.tar.gz"
    file.parent.mkdir()
    file.write_bytes(outer.getvalue())
    with pytest.raises(Missing, match="is not the expected file"):
        text.load_reviews(Source(tmp_path))
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(outer.getvalue()).hexdigest())

    class Tokenizer:
        def __call__(self, sentences: list[str], **_: object) -> dict[str, torch.Tensor]:
            assert sorted(sentences) == ["bad", "dull", "fine film", "good!"]
            tokens = torch.tensor([[len(sentence), 3, 0] for sentence in sentences])
            return {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens)}

    monkeypatch.setattr(text, "minilm", lambda source: tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda folder: Tokenizer())
    (tokens, labels), (tested, of_tested) = text.load_reviews(Source(tmp_path))
    assert tokens.shape == (3, 2, 3) and tested.shape == (1, 2, 3)
    found = dict(zip(torch.cat([tokens, tested])[:, 0, 0].tolist(), [*labels, *of_tested], strict=True))
    assert {length: int(label) for length, label in found.items()} == {9: 1, 4: 0, 3: 0, 5: 1}


def test_the_test_set_is_the_same_for_every_seed_and_nobody_trains_on_it() -> None:
    tokens, labels = torch.arange(1, 2001).view(-1, 1, 1).expand(-1, 2, 1), torch.arange(2000) % 2
    others, tested = text.held_out(tokens, labels)
    first, second = (split(others, tested, (500, 300), seed) for seed in (0, 1))
    test = first.evaluation["test"][:][0]
    assert torch.equal(test, second.evaluation["test"][:][0])
    assert not torch.equal(first.train[:][0], second.train[:][0])
    used = torch.cat([first.train[:][0], first.evaluation["validation"][:][0], test])
    assert (len(first.train), len(used), len(used.unique())) == (500, 1300, 1300)
    noisy = split(others, tested, (500, 300), 0, noise=0.2)
    parts = [(data.train, data.evaluation["validation"]) for data in (first, noisy)]
    wrong = [(a[:][1] != b[:][1]).sum() for a, b in zip(*parts, strict=True)]
    assert sum(wrong) == 0.2 * 800
    assert torch.equal(noisy.evaluation["test"][:][1], first.evaluation["test"][:][1])


def tokenizer() -> transformers.BertTokenizer:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "sleeps", "no", "cat", "eats")
    return transformers.BertTokenizer(vocab={word: n for n, word in enumerate(words)}, do_lower_case=False)


def test_rte_is_read_from_the_hubs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rte").mkdir()
    for name in ("train", "validation"):
        rows = {"sentence1": ["the dog sleeps"] * 2, "sentence2": ["the dog", "a cat"], "label": [0, 1]}
        pandas.DataFrame({"idx": [7, 8], **rows}).to_parquet(tmp_path / "rte" / f"{name}-00000.parquet")
    monkeypatch.setattr(text, "from_hub", lambda *arguments: tmp_path)
    monkeypatch.setattr("transformers.BertTokenizer.from_pretrained", lambda folder: tokenizer())
    data = load_task("rte").data(Source(tmp_path), 0)
    for samples in (data.train, data.evaluation["development"]):
        tokens, labels = samples[:]
        assert tokens.shape == (2, 2, text.PAIR) and labels.tolist() == [0, 1]
        assert (tokens[0, 1] == 1).sum() == 3  # the second sentence, and the sign behind it


def test_padding_and_order_of_a_pair_reach_the_network_as_bert_wants_them() -> None:
    """The same logits as the dict that the tokenizer makes, without the padding's columns."""
    torch.manual_seed(0)
    network = text.network(Source(smoke=True), None).eval()
    pair = ["the dog sleeps", "no cat"], ["the dog", "the dog eats"]
    tokens = tokenizer()(*pair, padding="max_length", max_length=text.PAIR, return_tensors="pt")
    with torch.no_grad():
        expected = network.bert(**tokens).logits
        torch.testing.assert_close(network(text.encoded(tokenizer(), text.PAIR, *pair)), expected)
