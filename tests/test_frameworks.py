"""FAM in the loops people have: Lightning, Hugging Face Trainer, Accelerate, Fabric, loops written for SAM.

Each with the real package, against the plain mathematical answer: kappa by the definition
(`tests.reference`), its gradient by autograd, and the base optimizer stepping on them by hand.
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import lightning
import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
import transformers
from lightning.fabric import Fabric
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fam_optim import FAM, observe, relative_flatness
from tests import reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

LAM = 0.05
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
BATCH = 6
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Double precision; no messages; whatever is written goes to tmp_path."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.chdir(tmp_path)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*|torch\.utils\.data.*")
        yield
    torch.set_default_dtype(default)


class Net(nn.Module):
    """A classifier with BatchNorm in its body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def data(batches: int) -> TensorDataset:
    """The first of always the same batches."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    return TensorDataset(x[: BATCH * batches], y[: BATCH * batches])


def loader(batches: int = 4) -> DataLoader[Any]:
    return DataLoader(data(batches), batch_size=BATCH)


def groups(batches: Iterable[Batch], size: int) -> list[list[Batch]]:
    """The micro-batches of each optimizer step."""
    listed = list(batches)
    return [listed[i : i + size] for i in range(0, len(listed), size)]


def penalised(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """loss + lam * kappa of model.head, by the definition, from one forward."""
    values = []

    def kept() -> Tensor:
        values.append(loss())
        return values[0]

    curvatures = reference.curvatures(kept, [model.head], create_graph=True)
    return values[0] + LAM * reference.sum_of_kappas(curvatures, "neuronwise")


def by_hand(
    batches: Iterable[Batch],
    accumulate: int = 1,
    clip: float | None = None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    schedule: Callable[..., Any] | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The plain mathematical answer."""
    model = Net()
    loss_of = loss_of or (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    optimizer = make(model.parameters(), **(kwargs or SGD))
    scheduler = schedule(optimizer) if schedule else None
    for group in groups(batches, accumulate):
        optimizer.zero_grad()
        for batch in group:
            (penalised(model, partial(loss_of, model, batch)) / len(group)).backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > 1.5 * clip, "clipping that does not clip proves nothing"
        optimizer.step()
        if scheduler:
            scheduler.step()
    return model


def assert_close(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, a), e in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        error = ((a - e).double().norm() / e.double().norm().clamp_min(1e-300)).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    for (name, a), e in zip(actual.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, e), f"{name}: differs by {(a - e).abs().max():.1e}"


def assert_regularisation_matters(batches: Iterable[Batch], model: nn.Module, accumulate: int = 1) -> None:
    """That the plain answer differs from a run without penalty by far more than the tolerance."""
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    for group in groups(batches, accumulate):
        optimizer.zero_grad()
        for x, y in group:
            (F.cross_entropy(plain(x), y) / len(group)).backward()
        optimizer.step()
    assert (plain.head.weight - model.head.weight).norm() > 1e-3 * model.head.weight.norm()


# ------------------------------------------------------------------------------------------- Lightning


class Lit(lightning.LightningModule):
    """A LightningModule as anyone writes it; only `configure_optimizers` knows of FAM."""

    def __init__(self, make: Any = torch.optim.SGD, **kwargs: Any) -> None:
        super().__init__()
        self.net = Net()
        self.make, self.kwargs = make, kwargs or SGD
        self.kappas: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return FAM(self.parameters(), self.make, self.net.head, LAM, **self.kwargs)


class Regularizing(Lit):
    """The form for accumulation and for float16: training_step returns the regularised loss."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.optimizers().regularize(super().training_step(batch, batch_idx))


class Manual(Lit):
    """Manual optimisation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(optimizer.regularize(super().training_step(batch, batch_idx)))
        optimizer.step()


class ManualClosure(Manual):
    """Manual optimisation with a closure, which needs no regularize."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = super(Manual, self).training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class Forgetful(Manual):
    """Manual optimisation that forgets to regularise."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.manual_backward(Lit.training_step(self, batch, batch_idx))
        self.optimizers().step()


def fit(module: Lit, batches: int = 4, ckpt_path: Path | None = None, **kwargs: Any) -> Any:
    trainer = lightning.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **kwargs,
        }
    )
    trainer.fit(module, loader(batches), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("module", [Lit, Regularizing, Manual, ManualClosure])
def test_lightning(module: type[Lit]) -> None:
    model = module()
    fit(model)
    expected = by_hand(loader())
    assert_regularisation_matters(loader(), expected)
    assert_close(model.net, expected)


def test_lightning_with_adam_and_a_scheduler() -> None:
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)

    class Scheduled(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": decay(optimizer), "interval": "step"}]

    # BatchNorm takes the first bias out of the loss: its gradient is rounding, which Adam's usual eps of 1e-8
    # would make a step of.
    settings = {"lr": 0.01, "eps": 1e-5}
    model = Scheduled(torch.optim.Adam, **settings)
    fit(model)
    assert_close(model.net, by_hand(loader(), make=torch.optim.Adam, schedule=decay, **settings))


@pytest.mark.parametrize("module", [Lit, Regularizing])
def test_lightning_clips_the_regularised_gradient(module: type[Lit]) -> None:
    model = module()
    fit(model, gradient_clip_val=0.1)
    assert_close(model.net, by_hand(loader(), clip=0.1))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_lightning_accumulates_what_regularize_returns(accumulate: int) -> None:
    model = Regularizing()
    fit(model, batches=8, accumulate_grad_batches=accumulate)
    expected = by_hand(loader(8), accumulate)
    assert_regularisation_matters(loader(8), expected, accumulate)
    assert_close(model.net, expected)


@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen head"])
def test_lightning_accumulation_without_regularize_is_refused(freeze: bool) -> None:
    """Only the last micro-batch goes through the optimizer's closure: the others' kappa would be missing."""
    model = Lit()
    model.net.head.requires_grad_(not freeze)
    before = copy.deepcopy(list(model.net.parameters()))
    with pytest.raises(
        RuntimeError, match=r"gradients that are there already.*return self.optimizers\(\).regularize\(loss\)"
    ):
        fit(model, accumulate_grad_batches=2)
    for p, b in zip(model.net.parameters(), before, strict=True):
        assert torch.equal(p, b)


def test_lightning_accumulation_without_penalty_is_not() -> None:
    class Unpenalised(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.lam = 0.0
            return optimizer

    model = Unpenalised()
    fit(model, accumulate_grad_batches=2)
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    for group in groups(loader(), 2):
        optimizer.zero_grad()
        for x, y in group:
            (F.cross_entropy(plain(x), y) / 2).backward()
        optimizer.step()
    assert_same(model.net, plain)


def test_lightning_manual_optimisation_without_regularize_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"self.manual_backward\(optimizer.regularize\(loss\)\)"):
        fit(Forgetful())


def test_lam_and_last_kappa_through_lightnings_wrapper() -> None:
    """`self.optimizers()` inherits from FAM, with attributes of its own: none of FAM's may hide there."""

    class Watching(Lit):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            wrapper = self.optimizers()
            assert isinstance(wrapper, FAM) and wrapper is not wrapper.optimizer
            assert wrapper.last_kappa is wrapper.optimizer.last_kappa
            wrapper.lam = 0.01 * (batch_idx + 1)
            assert wrapper.optimizer.lam == wrapper.lam == 0.01 * (batch_idx + 1)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *args: Any) -> None:
            self.kappas.append(self.optimizers().last_kappa)

    model = Watching()
    fit(model)
    assert len({kappa.item() for kappa in model.kappas}) == 4


def test_lightning_evaluates_in_between() -> None:
    class Validated(Lit):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.log("loss", Lit.training_step(self, batch, batch_idx))

        def val_dataloader(self) -> Any:
            return loader(2)

    model = Validated()
    fit(model, val_check_interval=1)
    assert_close(model.net, by_hand(loader()))


def test_lightning_runs_lbfgs() -> None:
    settings: dict[str, Any] = {"lr": 0.5, "max_iter": 3}
    model = Lit(torch.optim.LBFGS, **settings)
    model.net.body[1].eval()  # a batch that is evaluated twice must be the same function
    model.net.body[1].train = lambda mode=True: model.net.body[1]
    fit(model, batches=2)
    expected = Net()
    expected.body[1].eval()
    plain = torch.optim.LBFGS(expected.parameters(), **settings)
    for x, y in loader(2):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            plain.zero_grad()
            objective = penalised(expected, lambda: F.cross_entropy(expected(x), y))
            objective.backward()
            return objective

        plain.step(closure)
    assert_close(model.net, expected, 1e-8)


@pytest.mark.parametrize("module", [Lit, Regularizing])
def test_lightning_in_bfloat16(module: type[Lit]) -> None:
    """bf16-mixed is the plain loop under autocast, bit for bit; kappa that of the float32 weights to the
    precision of bfloat16."""
    torch.set_default_dtype(torch.float32)
    model = module()
    fit(model, precision="bf16-mixed")
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    for x, y in loader():
        with observe(plain.head) as layer, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            z = plain(x)
            loss = F.cross_entropy(z, y)
        assert z.dtype == torch.bfloat16
        kappa = relative_flatness(loss, layer)
        wide = copy.deepcopy(plain).double()
        curvatures = reference.curvatures(
            partial(lambda m, x, y: F.cross_entropy(m(x), y), wide, x.double(), y), [wide.head]
        )
        wanted = reference.sum_of_kappas(curvatures, "neuronwise")
        error = ((kappa - wanted) / wanted).abs()
        assert error <= torch.finfo(torch.bfloat16).eps, f"kappa is {kappa}, expected {wanted}"
        optimizer.zero_grad()
        (loss + LAM * kappa).backward()
        optimizer.step()
    assert_same(model.net, plain)


FLOAT16 = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def in_float16(device: str) -> dict[str, Any]:
    """On the CPU Lightning takes bf16 for "16-mixed", unless handed the plugin itself."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    return {"accelerator": device, "plugins": [MixedPrecision("16-mixed", device, scaler)]}


@pytest.mark.parametrize("where", FLOAT16)
def test_lightning_in_float16_scales_the_penalty_with_the_loss(where: str) -> None:
    torch.set_default_dtype(torch.float32)
    model = Regularizing()
    fit(model, **in_float16(where))
    plain = Net().to(where)
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    scaler = torch.amp.GradScaler(where, init_scale=2.0**10)
    for x, y in loader():
        with observe(plain.head) as layer, torch.autocast(where, torch.float16, cache_enabled=False):
            loss = F.cross_entropy(plain(x.to(where)), y.to(where))
        optimizer.zero_grad()
        scaler.scale(loss + LAM * relative_flatness(loss, layer)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(model.net.to(where), plain)
    single = by_hand(loader())
    assert_close(model.net.cpu(), single, torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("where", FLOAT16)
def test_lightning_in_float16_without_regularize_is_refused(where: str) -> None:
    """The scaler must see the gradients before the step, so the closure runs outside of it."""
    torch.set_default_dtype(torch.float32)
    with pytest.raises(RuntimeError, match=r"let it have optimizer.regularize\(loss\)"):
        fit(Lit(), **in_float16(where))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("module", "accumulate"), [(Lit, 1), (Regularizing, 2)], ids=["unmodified", "accumulating"]
)
def test_lightning_resumes_bit_for_bit(
    module: type[Lit], accumulate: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.set_default_dtype(dtype)
    build = partial(module, torch.optim.Adam, lr=0.01)
    whole = build()
    fit(whole, max_epochs=2, accumulate_grad_batches=accumulate)
    half = build()
    trainer = fit(half, max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["fam"]["lam"] == LAM
    resumed = build()
    nn.init.zeros_(resumed.net.head.weight)
    fit(resumed, max_epochs=2, accumulate_grad_batches=accumulate, ckpt_path=tmp_path / "half.ckpt")
    assert_same(resumed.net, whole.net)
    assert not torch.equal(half.net.head.weight, whole.net.head.weight)


# ---------------------------------------------------------------------------------- Hugging Face Trainer


class Examples(Dataset[dict[str, Tensor]]):
    """A data set as Trainer likes it."""

    def __init__(self, batches: int) -> None:
        self.data = data(batches)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y = self.data[i]
        return {"x": x, "labels": y}


class Classifier(nn.Module):
    """A model as Trainer likes it: the loss comes with the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

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
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)


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
        penalised(expected, loss).backward()
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
    expected.head = expected.lm_head  # where `penalised` looks for the layer
    for first in (0, 2):
        tokens = torch.cat([part["input_ids"] for part in trainer.seen[first : first + 2]])

        def loss(tokens: Tensor = tokens, items: Tensor = trainer.items[first]) -> Tensor:
            logits = expected(input_ids=tokens).logits[:, :-1].reshape(-1, 7).float()
            # How many items a step has is Trainer's to say: it may count the first tokens too.
            return F.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="sum") / items

        plain.zero_grad()
        penalised(expected, loss).backward()
        plain.step()
    del expected.head
    assert_close(model, expected, 1e-5)
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


# -------------------------------------------------------------------------------------------- Accelerate


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    """Accelerate keeps the settings of its first Accelerator for the whole process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated(
    batches: int = 4, accumulate: int = 1, clip: float | None = None, closure: bool = False, **kwargs: Any
) -> nn.Module:
    """The loop of the README."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **kwargs)
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    model, optimizer, batches_of = accelerator.prepare(model, fam, loader(batches))
    for x, y in batches_of:
        with accelerator.accumulate(model):

            def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            if closure:
                optimizer.step(evaluate)
                continue
            accelerator.backward(fam.regularize(F.cross_entropy(model(x), y)))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accelerate(accumulate: int, clip: float | None) -> None:
    model = accelerated(8, accumulate, clip)
    assert_close(model, by_hand(loader(8), accumulate, clip))


def test_accelerate_with_a_closure() -> None:
    assert_close(accelerated(closure=True), by_hand(loader()))


def test_accelerate_in_bfloat16() -> None:
    torch.set_default_dtype(torch.float32)
    model = accelerated(mixed_precision="bf16")
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    for x, y in loader():
        with observe(plain.head) as layer:
            with torch.autocast("cpu", torch.bfloat16):
                z = plain(x)
            loss = F.cross_entropy(z.float(), y)
        optimizer.zero_grad()
        (loss + LAM * relative_flatness(loss, layer)).backward()
        optimizer.step()
    assert z.dtype == torch.bfloat16
    assert_same(model, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_accelerate_in_float16() -> None:
    torch.set_default_dtype(torch.float32)
    accelerator = accelerate.Accelerator(mixed_precision="fp16")
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    model, optimizer, batches = accelerator.prepare(model, fam, loader())
    for x, y in batches:
        accelerator.backward(fam.regularize(F.cross_entropy(model(x), y)))
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.step_was_skipped
    assert_close(accelerator.unwrap_model(model).cpu(), by_hand(loader()), torch.finfo(torch.float16).eps)


def test_accelerate_without_regularize_is_refused() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    model, optimizer, batches = accelerator.prepare(model, fam, loader())
    x, y = next(iter(batches))
    accelerator.backward(F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match=r"regularize\(\) was not called since the last step"):
        optimizer.step()


def test_accelerate_resumes_bit_for_bit(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)

    generators: list[torch.Generator] = []

    def build() -> tuple[Any, Any, FAM]:
        model = Net()
        generators.append(torch.Generator().manual_seed(3))
        probes: dict[str, Any] = {"mode": "hutchinson", "generator": generators[-1]}
        fam = FAM(model.parameters(), torch.optim.Adam, model.head, LAM, **probes, lr=0.01)
        return *accelerator.prepare(model, fam), fam

    def train(model: Any, optimizer: Any, fam: FAM, batches: Iterable[Batch]) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(fam.regularize(F.cross_entropy(model(x), y)))
            optimizer.step()

    whole = build()
    train(*whole, itertools.islice(loader(), 2))
    accelerator.save_state(str(tmp_path / "state"))
    train(*whole, itertools.islice(loader(), 2, 4))
    accelerator.free_memory()
    resumed = build()
    nn.init.zeros_(resumed[0].head.weight)
    generators[1].manual_seed(5)
    accelerator.load_state(str(tmp_path / "state"))
    train(*resumed, itertools.islice(loader(), 2, 4))
    assert_same(resumed[0], whole[0])


# ------------------------------------------------------------------------------------------------ Fabric


@pytest.mark.parametrize("closure", [False, True], ids=["regularize", "closure"])
def test_fabric(closure: bool) -> None:
    """Fabric wraps the optimizer in a class that inherits from FAM, as Lightning does."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, 0.7, **SGD)
    wrapped, optimizer = fabric.setup(model, fam)
    optimizer.lam = LAM
    for x, y in loader():
        optimizer.zero_grad()

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(wrapped(x), y)
            fabric.backward(loss)
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            fabric.backward(optimizer.regularize(F.cross_entropy(wrapped(x), y)))
            optimizer.step()
    assert_close(model, by_hand(loader()))


# --------------------------------------------------------------------------------- loops written for SAM


def sam_loop(model: nn.Module, optimizer: Any, zero_in_closure: bool, first_backward: bool = True) -> None:
    """One forward and backward before the step, one in its closure: how SAM wants to be called."""
    for x, y in loader():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            if zero_in_closure:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if first_backward:
            closure()
        optimizer.step(closure)
        optimizer.zero_grad()


def test_sam_loop_with_one_line_changed() -> None:
    """The closure zeroes the gradients, as torch's documentation of closures wants it."""
    model = Net()
    optimizer = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=0.05, **SGD)
    sam_loop(model, optimizer, zero_in_closure=True)
    sam = copy.deepcopy(model)

    model = Net()
    optimizer = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    sam_loop(model, optimizer, zero_in_closure=True)
    expected = by_hand(loader())
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert (sam.head.weight - model.head.weight).norm() > 1e-3
    assert model.body[1].num_batches_tracked == 2 * len(loader()), "the forward before the step is the loop's"


def test_sam_loop_that_adds_up_gradients_is_refused() -> None:
    """SAM zeroes the first gradients itself; FAM would add the closure's to them."""
    model = Net()
    sam_loop(model, pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, **SGD), zero_in_closure=False)
    model = Net()
    optimizer = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(RuntimeError, match="written for SAM, leave out the backward before the step, or"):
        sam_loop(model, optimizer, zero_in_closure=False)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)
    optimizer.zero_grad()
    model = Net()
    optimizer = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    sam_loop(model, optimizer, zero_in_closure=False, first_backward=False)
    assert_close(model, by_hand(loader()))


# -------------------------------------------------------------- gradients that are there before a closure


def test_hand_written_accumulation_is_no_false_alarm() -> None:
    """regularize for all micro-batches but the last, which goes through the closure."""
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    for (x, y), (x2, y2) in groups(loader(), 2):
        fam.zero_grad()
        fam.regularize(F.cross_entropy(model(x), y) / 2).backward()
        fam.step(lambda x=x2, y=y2: F.cross_entropy(model(x), y) / 2)
    assert_close(model, by_hand(loader(), 2))


@pytest.mark.parametrize("backward", [False, True], ids=["returns loss", "calls backward"])
@pytest.mark.parametrize(
    "zero",
    ["before", "inside", "after forward", "zeros", "model", "by hand"],
    ids=lambda z: z.replace(" ", "_"),
)
def test_however_gradients_are_zeroed_is_no_false_alarm(zero: str, backward: bool) -> None:
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    for x, y in loader():
        if zero == "before":
            fam.zero_grad()

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            if zero == "inside":
                fam.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if zero == "after forward":
                fam.zero_grad()
            if zero == "zeros":
                fam.zero_grad(set_to_none=False)
            if zero == "model":
                model.zero_grad()
            if zero == "by hand":
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.zero_()
            if backward:
                loss.backward()
            return loss

        fam.step(closure)
    assert_close(model, by_hand(loader()))


def test_other_losses_in_the_closure_are_no_false_alarm() -> None:
    """A penalty on the weights, backpropagated first and within the closure, has no kappa to lack."""
    model = Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)

    def penalty(model: nn.Module) -> Tensor:
        return 0.1 * model.head.weight.abs().sum()

    for x, y in loader():

        def closure(x: Tensor = x, y: Tensor = y) -> None:
            fam.zero_grad()
            penalty(model).backward()
            F.cross_entropy(model(x), y).backward()

        fam.step(closure)
    expected = by_hand(loader(), loss_of=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]) + penalty(m))
    assert_close(model, expected)


def test_gradients_of_another_optimizer_are_no_false_alarm() -> None:
    """Two FAMs, one on the body and one on the head, both flattening the head."""
    model = Net()
    with warnings.catch_warnings(action="ignore"):  # the head is not among its parameters
        body = FAM(model.body.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    head = FAM(model.head.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    before = model.head.weight.detach().clone()
    for x, y in loader():
        for fam in (body, head):

            def closure(fam: FAM = fam, x: Tensor = x, y: Tensor = y) -> Tensor:
                fam.zero_grad()  # its own parameters' alone
                return F.cross_entropy(model(x), y)

            fam.step(closure)
    assert not torch.equal(model.head.weight, before)
