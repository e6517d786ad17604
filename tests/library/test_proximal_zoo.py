"""Published architectures, each tiny: one proximal step of all their hidden layers, against the formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fam_optim import FAM, weight_layers
from fam_optim.estimators import roots
from fam_optim.layer.kinds import WeightMatrix, weight_matrix
from tests.zoo import IGNORED, ROWS, Row

LR, LAM = 1e-3, 0.5


def movable(model: nn.Module) -> list[Any]:
    """Its hidden layers, without those whose weights are computed at every call."""
    found = []
    for layer in weight_layers(model)[:-1]:
        try:
            weight_matrix(layer)
        except TypeError as error:
            assert "computed at every call" in str(error)
        else:
            found.append(layer)
    return found


def cotangent(row: Row, batch: dict[str, Tensor], logits: Tensor, signs: Tensor) -> Tensor:
    """``S r`` of the mean cross-entropy of those rows of the logits that have a label."""
    labels = row.targets(batch)
    lead = logits.shape[:-1]
    r = torch.zeros_like(logits)
    if signs.numel() == logits.numel():
        r.copy_(signs.reshape(logits.shape))
    else:  # language models that cut off the last word
        r[:, :-1] = signs.reshape(lead[0], lead[1] - 1, -1)
    counted = (labels != IGNORED).to(logits.dtype).reshape(lead)[..., None]
    a, p = counted / counted.sum(), logits.detach().softmax(-1)
    return a.sqrt() * (p.sqrt() * r - p * (p.sqrt() * r).sum(-1, keepdim=True))


def solved(w: WeightMatrix, after: Tensor, before: Tensor, t: Tensor) -> Tensor:
    """``(I + 2 c T)^-1 W``, c as far as the base has moved."""
    after, before = w.of(after), w.of(before)
    pull = (2 * t @ after).norm()
    if pull == 0:
        return w.back(after)
    c = LAM * (after - before).norm() / pull
    return w.back(torch.linalg.solve(torch.eye(len(t)) + 2 * c * t, after))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_one_step_is_the_formula(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    original = roots.rademacher

    def draw(*args: Any) -> Tensor:
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(roots, "rademacher", draw)
    model, batch = row.problem()
    twin = copy.deepcopy(model)
    layers, twins = movable(model), movable(twin)
    assert layers
    fam = FAM(model.parameters(), torch.optim.SGD, layers, LAM, "proximal", every=1, lr=LR)
    loss, _ = row.loss(model, batch)
    fam.regularize(loss).backward()
    fam.step()

    calls: dict[nn.Module, list[tuple[Tensor, GradientEdge]]] = {}
    for layer in twins:  # the edge, as what follows may change z in place
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda m, i, o: calls.setdefault(m, []).append((i[0], get_gradient_edge(o)))
            )
    loss, logits = row.loss(twin, batch)
    (signs,) = drawn
    value = (logits * cotangent(row, batch, logits, signs)).sum()
    weights = [weight_matrix(layer) for layer in twins]
    traces = []
    for i, (layer, w) in enumerate(zip(twins, weights, strict=True)):
        if i in fam.regularizer.means.kept or not isinstance(layer, nn.Linear) or layer not in calls:
            (g,) = torch.autograd.grad(
                value, w.parameter, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            g = w.of(g)
            traces.append(g @ g.mT)
        else:  # rows of their own
            ((phi, z),) = calls[layer]
            (delta,) = torch.autograd.grad(value, z, retain_graph=True)
            phi, delta = phi.flatten(0, -2), delta.flatten(0, -2)
            traces.append((delta * phi.square().sum(1, keepdim=True)).mT @ delta)
    loss.backward()
    tolerance = 1e-9 if loss.dtype == torch.float64 else 1e-5
    moved = 0
    for layer, w, t in zip(layers, weights, traces, strict=True):
        after = w.parameter.detach() - LR * (0 if w.parameter.grad is None else w.parameter.grad)
        right = solved(w, after, w.parameter.detach(), t)
        got = weight_matrix(layer).parameter.detach()
        assert torch.allclose(got, right, rtol=0, atol=tolerance * (1 + float(right.abs().max()))), w.name
        moved += not torch.equal(got, after)
    assert moved
