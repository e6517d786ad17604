"""Weights that the layer shares with an embedding, and parts of the model that are frozen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import observe, relative_flatness
from tests import reference
from tests.sandwich import MODES, Sandwich, check, fam_on
from tests.support import seeded

pytestmark = pytest.mark.usefixtures("float64")


class Tied(nn.Module):
    """A language model whose head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.layer = nn.Linear(4, 7, bias=False)
        self.layer.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.mix(self.embedding(tokens))))


def next_token_loss(model: nn.Module) -> Tensor:
    tokens = torch.tensor([[0, 3, 2, 6, 1], [5, 5, 4, 0, 2]])
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@MODES
def test_tied_embedding_counts_in_the_head_alone(mode: str) -> None:
    """kappa sees the head's use of the weight; its gradient reaches the weight through both uses."""
    model = check(Tied, next_token_loss, mode=mode)
    assert model.layer.weight is model.embedding.weight
    untied = seeded(Tied)
    untied.layer.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    fam = fam_on(untied, mode)
    fam.step(lambda: next_token_loss(untied))
    tied = seeded(Tied)
    fam_on(tied, mode).step(lambda: next_token_loss(tied))
    both = untied.embedding.weight.grad + untied.layer.weight.grad
    torch.testing.assert_close(tied.layer.weight.grad, both, rtol=1e-12, atol=1e-15)


def test_tied_embedding_as_a_parameter_counts_in_every_use() -> None:
    model = seeded(Tied)
    loss = next_token_loss(model)
    hessian = reference.brute_force_hessian(loss, model.layer.weight).reshape(7, 4, 7, 4)
    wanted = reference.kappa(model.layer.weight, hessian, "neuronwise")
    kappa = relative_flatness(loss, model.layer.weight, mode="full")
    torch.testing.assert_close(kappa, wanted, rtol=1e-10, atol=0)
    with observe(model.layer) as layer:
        alone = relative_flatness(next_token_loss(model), layer)
    assert (kappa - alone).abs() > 1e-2 * kappa.abs()


FROZEN = {
    "body": ("body",),
    "layer": ("layer",),
    "weight": ("layer.weight",),
    "tail": ("tail",),
    "body and layer": ("body", "layer"),
    "body and tail": ("body", "tail"),
}


@MODES
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_frozen_parts_stay_as_they_are(names: tuple[str, ...], mode: str) -> None:
    def build() -> nn.Module:
        model = Sandwich()
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(names))
        return model

    before = seeded(build).state_dict()
    model = check(build, mode=mode)
    for name, p in model.named_parameters():
        assert p.requires_grad is not name.startswith(names)
        if not p.requires_grad:
            assert p.grad is None and torch.equal(p, before[name]), name
