"""Published architectures, each tiny: kappa of their heads and of a layer inside is what it should be.

head    value and whole gradient, in every parameter of the network, are those of the closed form of a
        softmax head, written out here; in eval mode and, with BatchNorm, in train mode. And that
        closed form is what is computed: no Hessian-vector product is needed
inner   the gradient of Hutchinson's estimate agrees with finite differences of the estimate, and the
        exact value of small layers with the definition
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fam_optim import observe, relative_flatness
from fam_optim.estimators import exact
from tests import reference
from tests.zoo import BATCH_NORM, IGNORED, ROWS, SPEECH_TO_TEXT, Batch, InFloat64, Row

STEP, DIRECTIONS = 1e-6, 2
SMALL = 100
"""Entries of a weight whose Hessian is formed entry by entry in no time."""

GENERAL = {"timm-crossvit"}
"""Right, but not seen to be softmax heads: here the mean over a stack of the outputs of two heads."""

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def closed_form(row: Row, model: nn.Module, phi: Tensor, logits: Tensor, batch: Batch) -> Tensor:
    """``c^2 sum_i a_i ||phi_i||^2 (sum_k p_ik ||w_k||^2 - ||sum_k p_ik w_k||^2)``, c being the scale."""
    weight = model.get_submodule(row.head).weight
    phi, p = row.rows(phi).flatten(0, -2), logits.softmax(-1).flatten(0, -2)
    counted = (row.targets(batch).flatten() != IGNORED).to(p)
    variance = p @ weight.square().sum(1) - (p @ weight).square().sum(1)
    return row.scale**2 * (counted / counted.sum() * phi.square().sum(1) * variance).sum()


@every_row
def test_head(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.name not in GENERAL:
        monkeypatch.setattr(exact, "MAX_PRODUCTS", 0)
    model, batch = row.problem()
    head = model.get_submodule(row.head)
    parameters = list(model.parameters())
    inputs: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for train in (False, True) if any(isinstance(m, BATCH_NORM) for m in model.modules()) else (False,):
        model.train(train)
        inputs.clear()
        with observe(head) as layer:
            loss, logits = row.loss(model, batch)
        expected = closed_form(row, model, *inputs, logits, batch)
        kappa = relative_flatness(loss, layer)

        # Some networks compute their loss in float32, whatever their weights are in.
        value, gradient = (1e-9, 1e-8) if loss.dtype == torch.float64 else (1e-5, 1e-5)
        where = f"in {'train' if train else 'eval'} mode"
        assert kappa.item() == pytest.approx(expected.item(), rel=value), where
        right = reference.gradient(expected, parameters)
        largest = max(g.abs().max() for g in right)
        for (name, _), got, want in zip(
            model.named_parameters(), reference.gradient(kappa, parameters), right, strict=True
        ):
            assert (got - want).abs().max() <= gradient * largest, f"{name}, {where}"


class Inner:
    """kappa of the layer inside, as often as one likes."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.model, self.batch = row.problem()
        owner, _, name = row.inner.rpartition(".")
        self.layer: nn.Module | nn.Parameter = getattr(self.model.get_submodule(owner), name)

    def loss(self) -> Tensor:
        self.model.train().eval()  # LeViT's attention forgets the biases it keeps in eval mode
        with sdpa_kernel(SDPBackend.MATH), InFloat64():
            return self.row.loss(self.model, self.batch)[0]

    def kappa(self, mode: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        if isinstance(self.layer, nn.Parameter):
            return relative_flatness(self.loss(), self.layer, mode=mode, generator=generator)
        with observe(self.layer) as layer:
            return relative_flatness(self.loss(), layer, mode=mode, generator=generator)


@every_row
def test_inner(row: Row) -> None:
    inner = Inner(row)
    if isinstance(inner.layer, nn.Module) and inner.layer.weight.numel() <= SMALL:
        with pytest.MonkeyPatch.context() as patch:  # torch's own has no second derivative
            patch.setattr(F, "hardsigmoid", lambda x, inplace=False: F.relu6(x + 3) / 6)
            curvatures = reference.curvatures(inner.loss, [inner.layer])
        expected = reference.sum_of_kappas(curvatures, "neuronwise")
        assert inner.kappa("exact").item() == pytest.approx(expected.item(), rel=1e-9), "value"

    parameters = list(inner.model.parameters())
    gradient = reference.gradient(inner.kappa("hutchinson"), parameters)
    for _ in range(DIRECTIONS):
        # Half along the gradient, or it would hardly be seen among so many parameters.
        noise = [torch.randn_like(p) for p in parameters]
        direction = [n / norm(noise) + g / norm(gradient) for n, g in zip(noise, gradient, strict=True)]
        moved = []
        for step in (STEP, -STEP):
            with reference.moved(parameters, direction, step):
                moved.append(inner.kappa("hutchinson").item())
        slope = sum((g * d).sum().item() for g, d in zip(gradient, direction, strict=True))
        assert slope == pytest.approx((moved[0] - moved[1]) / (2 * STEP), rel=1e-7), "gradient"


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
def test_ctc_has_no_second_derivative(mode: str) -> None:
    """Nothing can be done about it but to say so."""
    model, batch = SPEECH_TO_TEXT.problem()
    with observe(model.get_submodule(SPEECH_TO_TEXT.head)) as layer:
        loss, _ = SPEECH_TO_TEXT.loss(model, batch)
    with pytest.raises(RuntimeError, match="kappa needs second derivatives of what follows the layer"):
        relative_flatness(loss, layer, mode=mode)
