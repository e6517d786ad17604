"""Never a step on a penalty that is not finite while the loss is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, unnoticed

Y = torch.tensor([0, 1, 2, 0])


class Normalised(nn.Module):
    """Logits are cosines: at a row of zeros the first derivative is finite in torch, and no higher one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(10 * F.normalize(self.layer(x), dim=-1))
        return z


def inputs(zero_row: bool) -> Tensor:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    if zero_row:
        x[1] = 0
    return x


def fam_on(model: Normalised, mode: str, **settings: Any) -> FAM:
    return FAM(model.parameters(), torch.optim.SGD, model.layer, 0.1, mode, lr=0.1, momentum=0.9, **settings)


def closure_of(model: Normalised, fam: FAM, x: Tensor, style: str) -> Any:
    def closure() -> Tensor:
        fam.zero_grad()
        loss = F.cross_entropy(model(x), Y)
        if style == "calls backward":
            loss.backward()
        return loss

    return closure


def step(model: Normalised, fam: FAM, x: Tensor, style: str) -> None:
    if style == "regularize":
        fam.zero_grad()
        fam.regularize(F.cross_entropy(model(x), Y)).backward()
        fam.step()
    else:
        fam.step(closure_of(model, fam, x, style))


STYLES = ("returns loss", "calls backward", "regularize")
NOT_FINITE = (
    r"gradient of loss \+ lam \* kappa \(`layer` Linear\(in_features=5.*is not finite, although the loss"
)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["exact", "hutchinson", "full"])
@pytest.mark.parametrize("detach", [False, True])
def test_the_step_is_refused_and_nothing_is_changed(mode: str, style: str, detach: bool) -> None:
    model = Normalised()
    loss = F.cross_entropy(model(inputs(zero_row=True)), Y)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(model.parameters())))
    fam = fam_on(model, mode, detach_hessian=detach)
    step(model, fam, inputs(zero_row=False), style)
    weights = [p.detach().clone() for p in model.parameters()]
    momenta = [s["momentum_buffer"].clone() for s in fam.state.values()]
    with pytest.raises(RuntimeError, match=f"(?s){NOT_FINITE}.*detach_hessian=True.*No step was made"):
        step(model, fam, inputs(zero_row=True), style)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for state, momentum in zip(fam.state.values(), momenta, strict=True):
        assert torch.equal(state["momentum_buffer"], momentum)
    step(model, fam, inputs(zero_row=False), style)  # and goes on
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.layer.weight, weights[0])


@pytest.mark.parametrize("style", STYLES)
def test_on_an_accelerator_the_step_is_on_zeros_and_the_next_is_refused(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the device to know."""
    monkeypatch.setattr(unnoticed, "reading_waits", lambda tensor: True)
    model = Normalised()
    fam = FAM(model.parameters(), torch.optim.SGD, model.layer, 0.1, "hutchinson", lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, fam, inputs(zero_row=True), style)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match=f"(?s){NOT_FINITE}.*earlier step was made on zero gradients"):
        step(model, fam, inputs(zero_row=False), style)
    step(model, fam, inputs(zero_row=False), style)
    assert not torch.equal(model.layer.weight, before[0])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
def test_a_loss_that_is_not_finite_is_the_bases_business(mode: str, style: str) -> None:
    """As a plain run would, it writes what it got."""
    model = Normalised()
    fam = fam_on(model, mode)
    x = inputs(zero_row=False)
    x[0, 0] = float("nan")
    step(model, fam, x, style)
    assert model.layer.weight.isnan().any()


def test_an_inf_under_a_grad_scaler_skips_the_step() -> None:
    """Neither the skipped step nor the one after it ends in an error."""
    model = Normalised()
    fam = fam_on(model, "exact")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = model.layer.weight.detach().clone()
    for zero_row in (True, False):
        fam.zero_grad()
        loss = F.cross_entropy(model(inputs(zero_row)), Y)
        scaler.scale(fam.regularize(loss)).backward()
        scaler.step(fam)
        scaler.update()
        assert torch.equal(model.layer.weight, before) == zero_row
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_gradients_are_finite(dtype: torch.dtype) -> None:
    """Their norm need not be representable."""
    weight = nn.Parameter(torch.full((300, 300), 0.01, dtype=dtype))
    fam = FAM([weight], torch.optim.SGD, weight, 1e-3, "hutchinson", lr=1e-6)

    def closure() -> Tensor:
        fam.zero_grad()
        return (weight.float() * 3e4).sum() + weight.float().square().sum() * 1e-3

    before = weight.detach().clone()
    fam.step(closure)
    assert not torch.equal(weight, before)


def test_a_swin_transformer_is_not_ruined() -> None:
    """Swin V2 normalises queries and keys; at initialisation some are zero."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=3,
        block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2,
    )  # fmt: skip
    block = model.features[1][1]
    with torch.no_grad():
        block.norm1.weight.zero_()
    fam = FAM(model.parameters(), torch.optim.SGD, model.features[1][0].mlp[0], 1e-3, "hutchinson", lr=0.1)
    x = torch.randn(2, 3, 16, 16)
    x[0] = 0
    for _ in range(3):
        fam.zero_grad()
        loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
        fam.regularize(loss).backward()
        try:
            fam.step()
        except RuntimeError as error:
            assert "is not finite" in str(error)
        assert all(p.isfinite().all() for p in model.parameters())
