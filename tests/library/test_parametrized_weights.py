"""Weights that are computed (weight_norm, spectral_norm, pruning, LoRA, lazy layers) count as computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fam_optim import FAM
from tests.sandwich import (
    COMPUTED,
    MODES,
    WHERE,
    Sandwich,
    assert_step,
    check,
    checkpointed,
    data,
    definition,
    fam_on,
    loss_of,
    pruned,
    two_calls,
)
from tests.support import LAM, LR, seeded

pytestmark = pytest.mark.usefixtures("float64")


@MODES
@WHERE
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_computed_weight_counts_as_computed(
    make: Callable[[int, int], nn.Module], head: bool, mode: str
) -> None:
    check(partial(Sandwich, head, make), mode=mode)


@pytest.mark.parametrize("name", ["spectral_norm", "old spectral_norm"])
@pytest.mark.parametrize("save", [False, True], ids=["", "body checkpointed"])
def test_state_of_a_computed_weight_advances_as_in_a_plain_run(name: str, save: bool) -> None:
    """Power iterations happen in forwards alone: with weights that do not move, all runs agree."""
    models = [seeded(partial(Sandwich, make=COMPUTED[name])) for _ in range(2)]
    run = checkpointed("body", False) if save else loss_of
    optimizers = [
        FAM(models[0].parameters(), torch.optim.SGD, models[0].layer, LAM, lr=0.0),
        torch.optim.SGD(models[1].parameters(), lr=0.0),
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = run(model)
                loss.backward()
                return loss

            optimizer.step(closure)
        fam, plain = (dict(model.layer.named_buffers()) for model in models)
        assert len(plain) == 2
        for key, vector in plain.items():
            assert torch.equal(fam[key], vector), f"{key} is not that of a run without FAM"


def test_pruned_entries_stay_pruned() -> None:
    model = seeded(partial(Sandwich, make=pruned))
    fam_on(model).step(lambda: loss_of(model))
    zero = model.layer.weight_mask == 0
    assert zero.sum() == 12
    assert not model.layer.weight_orig.grad[zero].any()
    assert model.layer.weight_orig.grad[~zero].all()


def test_parametrised_after_it_was_observed() -> None:
    model = seeded(Sandwich)
    fam = fam_on(model)
    parametrizations.spectral_norm(model.layer)
    with pytest.raises(RuntimeError, match=r"parametrised after it was observed.*before building FAM"):
        fam.step(lambda: loss_of(model))


@pytest.mark.parametrize("name", [n for n in COMPUTED if n != "spectral_norm in eval mode"])
def test_untrained_computed_weight_warns(name: str) -> None:
    model = seeded(partial(Sandwich, make=COMPUTED[name]))
    with pytest.warns(UserWarning, match="not among the parameters given to FAM"):
        FAM(model.body.parameters(), torch.optim.SGD, model.layer, LAM, lr=LR)


@pytest.mark.parametrize("before", [False, True], ids=["FAM after", "FAM before"])
def test_lazy_linear(before: bool) -> None:
    def lazy() -> nn.Module:
        return Sandwich(make=lambda m, d: nn.LazyLinear(d))

    def built() -> nn.Module:
        model = lazy()
        torch.manual_seed(2)
        model(data()[0])  # a dry run
        return model

    kappa, moved = definition(built, loss_of)
    model = seeded(lazy)
    fam = fam_on(model) if before else None
    torch.manual_seed(2)
    if before:
        model(data()[0])
    else:
        model = seeded(built)
    fam = fam or fam_on(model)
    fam.step(lambda: loss_of(model))
    assert_step(model, fam, kappa, moved)


@MODES
@pytest.mark.parametrize("name", ["weight_norm", "old weight_norm", "pruned", "LoRA"])
def test_weight_computed_anew_at_every_call(name: str, mode: str) -> None:
    check(partial(Sandwich, make=COMPUTED[name]), two_calls, mode=mode)


@MODES
def test_spectral_norm_cached_over_two_calls(mode: str) -> None:
    """The remedy of the message; the reference takes the first call's weight for both."""
    check(partial(Sandwich, make=COMPUTED["spectral_norm"]), partial(two_calls, cache=True), mode=mode)
