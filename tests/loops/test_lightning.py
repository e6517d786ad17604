"""Lightning's Trainer: unmodified modules, modules that regularise, manual optimisation, float16, resuming.

The real package against the plain mathematical answer (`tests.support.by_hand`).
"""

from __future__ import annotations

import copy
import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from tests import reference
from tests.support import (
    LAM,
    SGD,
    Batch,
    Net,
    assert_close,
    assert_regularisation_matters,
    assert_same,
    by_hand,
    loader,
    penalised,
    without_penalty,
)


@pytest.fixture(autouse=True)
def _quiet(in_float64_and_tmp_path: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No messages."""
    for name in ("lightning", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


class Lit(lightning.LightningModule):
    """A LightningModule as anyone writes it; only `configure_optimizers` knows of FAM."""

    def __init__(self, make: Any = torch.optim.SGD, **kwargs: Any) -> None:
        super().__init__()
        self.net = Net("batch norm")
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


def test_lightning_skips_a_batch() -> None:
    """By returning None from training_step; a closure that never returns a loss is refused."""

    class Skipping(Lit):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx < self.batches else None

    model = Skipping()
    model.batches = 3
    fit(model)
    assert_close(model.net, by_hand(loader(3)))
    never = Skipping()
    never.batches = 0
    with pytest.raises(RuntimeError, match="called no backward and returned None"):
        fit(never)


def test_lightning_with_adam_and_a_scheduler() -> None:
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.1)

    class Scheduled(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": decay(optimizer), "interval": "step"}]

    model = Scheduled(torch.optim.Adam, lr=0.01)
    fit(model)
    assert_close(model.net, by_hand(loader(), make=torch.optim.Adam, schedule=decay, lr=0.01))


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
    assert_same(model.net.parameters(), before)


def test_lightning_accumulation_without_penalty_is_not() -> None:
    class Unpenalised(Lit):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.lam = 0.0
            return optimizer

    model = Unpenalised()
    fit(model, accumulate_grad_batches=2)
    assert_same(model.net, without_penalty(loader(), 2))


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
    expected = Net("batch norm")
    expected.body[1].eval()
    plain = torch.optim.LBFGS(expected.parameters(), **settings)
    for x, y in loader(2):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            plain.zero_grad()
            objective = penalised(lambda: F.cross_entropy(expected(x), y), expected.head)
            objective.backward()
            return objective

        plain.step(closure)
    assert_close(model.net, expected, tolerance=1e-8)


@pytest.mark.parametrize("module", [Lit, Regularizing])
def test_lightning_in_bfloat16(module: type[Lit]) -> None:
    """bf16-mixed is the plain loop under autocast, bit for bit; kappa that of the float32 weights to the
    precision of bfloat16."""
    torch.set_default_dtype(torch.float32)
    model = module()
    fit(model, precision="bf16-mixed")
    plain = Net("batch norm")
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
    plain = Net("batch norm").to(where)
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
    assert_close(model.net.cpu(), single, tolerance=torch.finfo(torch.float16).eps)


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
