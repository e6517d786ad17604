"""Hugging Face Trainer with the README's three lines: accumulation, losses per item, a tied model, resuming.

The real package against the plain mathematical answer (`tests.support.by_hand`).
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from fam_optim import FAM
from tests.support import (
    BATCH,
    LAM,
    SGD,
    Batch,
    Net,
    assert_close,
    assert_regularisation_matters,
    assert_same,
    by_hand,
    dataset,
    penalised,
)

transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("in_float64_and_tmp_path", "fresh_accelerate")  # Trainer uses Accelerate


class Examples(Dataset[dict[str, Tensor]]):
    """A data set as Trainer likes it."""

    def __init__(self, batches: int) -> None:
        self.data = dataset(batches)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y = self.data[i]
        return {"x": x, "labels": y}


class Classifier(nn.Module):
    """A model as Trainer likes it: the loss comes with the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net("batch norm")

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FlatTrainer(transformers.Trainer):
    """A Trainer whose `compute_loss` regularises; the batches are kept for the answer by hand."""

    def __init__(self, model: nn.Module, fam: FAM, **kwargs: Any) -> None:
        super().__init__(model, optimizers=(fam, None), **kwargs)
        self.fam = fam
        self.seen: list[dict[str, Tensor]] = []
        self.items: list[Any] = []

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.seen.append(dict(inputs))
            self.items.append(kwargs["num_items_in_batch"])
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return self.fam.regularize(loss) if model.training else loss


def arguments(path: Path, **kwargs: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(path),
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            **kwargs,
        }
    )


def huggingface(
    path: Path,
    make: Any = torch.optim.SGD,
    batches: int = 4,
    fam_kwargs: Any = None,
    eval_dataset: Any = None,
    **kwargs: Any,
) -> FlatTrainer:
    model = Classifier()
    fam = FAM(model.parameters(), make, model.net.head, LAM, **(fam_kwargs or SGD))
    args = arguments(path, **kwargs)
    return FlatTrainer(model, fam, args=args, train_dataset=Examples(batches), eval_dataset=eval_dataset)


def seen(trainer: FlatTrainer) -> list[Batch]:
    """The batches in the order in which Trainer shuffled them."""
    return [(inputs["x"], inputs["labels"]) for inputs in trainer.seen]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_trainer(accumulate: int, tmp_path: Path) -> None:
    trainer = huggingface(tmp_path, batches=8, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert len(trainer.seen) == 8 and trainer.state.global_step == 8 // accumulate
    expected = by_hand(seen(trainer), accumulate)
    assert_regularisation_matters(seen(trainer), expected, accumulate)
    assert_close(trainer.model.net, expected)


def test_trainer_with_a_last_step_of_fewer_micro_batches(tmp_path: Path) -> None:
    trainer = huggingface(tmp_path, batches=5, gradient_accumulation_steps=3)
    trainer.train()
    assert trainer.state.global_step == 2
    assert_close(trainer.model.net, by_hand(seen(trainer), 3))


def test_trainer_clips_the_regularised_gradient(tmp_path: Path) -> None:
    trainer = huggingface(tmp_path, max_grad_norm=0.1)
    trainer.train()
    assert_close(trainer.model.net, by_hand(seen(trainer), clip=0.1))


def test_trainer_evaluates_in_between(tmp_path: Path) -> None:
    trainer = huggingface(tmp_path, eval_dataset=Examples(2), eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert_close(trainer.model.net, by_hand(seen(trainer)))


def test_trainer_without_regularize_is_refused(tmp_path: Path) -> None:
    model = Classifier()
    fam = FAM(model.parameters(), torch.optim.SGD, model.net.head, LAM, **SGD)
    trainer = transformers.Trainer(
        model, args=arguments(tmp_path), train_dataset=Examples(2), optimizers=(fam, None)
    )
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(RuntimeError, match=r"let it have optimizer.regularize\(loss\)"):
        trainer.train()
    assert_same(model.parameters(), before)


class Tagger(nn.Module):
    """Tells Trainer that it takes `num_items_in_batch`: the loss is then a sum over the items of *all*
    micro-batches of a step, divided by their number, and Trainer does not divide it again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        loss = F.cross_entropy(self.head(self.body(x)).transpose(1, 2), labels, reduction="sum")
        return {"loss": loss / num_items_in_batch}


class Sentences(Examples):
    """Four tokens each, of which some have no label: micro-batches differ in their number of items."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        labels = torch.randint(0, 3, (4,), generator=generator)
        labels[1 + i % 4 :] = -100
        return {"x": torch.randn(4, 5, generator=generator), "labels": labels}


def test_trainer_with_losses_per_item(tmp_path: Path) -> None:
    model = Tagger()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    trainer = FlatTrainer(
        model, fam, args=arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=Sentences(4)
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    expected = Tagger()
    plain = torch.optim.SGD(expected.parameters(), **SGD)
    for first, second in zip(trainer.seen[::2], trainer.seen[1::2], strict=True):
        x, labels = (torch.cat([first[name], second[name]]) for name in ("x", "labels"))
        counts = [(part["labels"] != -100).sum() for part in (first, second)]
        assert counts[0] != counts[1], "with equal counts a mean of means would pass"

        def loss(x: Tensor = x, labels: Tensor = labels) -> Tensor:
            return F.cross_entropy(expected.head(expected.body(x)).transpose(1, 2), labels)

        plain.zero_grad()
        penalised(loss, expected.head).backward()
        plain.step()
    assert_close(model, expected)


def test_trainer_with_a_tied_language_model(tmp_path: Path) -> None:
    """GPT-2, its head tied to its embedding. transformers computes losses in float32, whatever the model."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False, initializer_range=0.6,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double()
    expected = copy.deepcopy(model)
    assert model.lm_head.weight is model.transformer.wte.weight

    class Texts(Examples):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            tokens = torch.randint(0, 7, (6,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": tokens, "labels": tokens}

    fam = FAM(model.parameters(), torch.optim.SGD, model.lm_head, LAM, lr=0.1)
    trainer = FlatTrainer(
        model,
        fam,
        args=arguments(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2),
        train_dataset=Texts(2),
    )
    trainer.train()
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    for first in (0, 2):
        tokens = torch.cat([part["input_ids"] for part in trainer.seen[first : first + 2]])

        def loss(tokens: Tensor = tokens, items: Tensor = trainer.items[first]) -> Tensor:
            logits = expected(input_ids=tokens).logits[:, :-1].reshape(-1, 7).float()
            # How many items a step has is Trainer's to say: it may count the first tokens too.
            return F.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="sum") / items

        plain.zero_grad()
        penalised(loss, expected.lm_head).backward()
        plain.step()
    assert_close(model, expected, tolerance=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_resumes_bit_for_bit(accumulate: int, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.set_default_dtype(dtype)
    build = partial(
        huggingface,
        make=torch.optim.Adam,
        fam_kwargs={"lr": 0.01},
        batches=8,
        gradient_accumulation_steps=accumulate,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=2,
    )
    whole = build(tmp_path / "whole")
    whole.train()
    resumed = build(tmp_path / "resumed")
    nn.init.zeros_(resumed.model.net.head.weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert len(resumed.seen) == 8 - 2 * accumulate
    assert_same(resumed.model, whole.model)
