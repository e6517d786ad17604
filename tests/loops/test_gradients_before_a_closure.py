"""Gradients that are there before a closure: refused where it would add to them, no false alarm elsewhere.

Loops written for SAM leave them there, and so does accumulation.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM
from tests.support import LAM, SGD, Net, assert_close, by_hand, loader, micro_batches, warnings_as

pytestmark = pytest.mark.usefixtures("float64")


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
    model = Net("batch norm")
    optimizer = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=0.05, **SGD)
    sam_loop(model, optimizer, zero_in_closure=True)
    sam = copy.deepcopy(model)

    model = Net("batch norm")
    optimizer = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    sam_loop(model, optimizer, zero_in_closure=True)
    expected = by_hand(loader())
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert (sam.head.weight - model.head.weight).norm() > 1e-3
    assert model.body[1].num_batches_tracked == 2 * len(loader()), "the forward before the step is the loop's"


def test_sam_loop_that_adds_up_gradients_is_refused() -> None:
    """SAM zeroes the first gradients itself; FAM would add the closure's to them."""
    model = Net("batch norm")
    sam_loop(model, pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, **SGD), zero_in_closure=False)
    model = Net("batch norm")
    optimizer = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(RuntimeError, match="written for SAM, leave out the backward before the step, or"):
        sam_loop(model, optimizer, zero_in_closure=False)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)
    optimizer.zero_grad()
    model = Net("batch norm")
    optimizer = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    sam_loop(model, optimizer, zero_in_closure=False, first_backward=False)
    assert_close(model, by_hand(loader()))


def test_hand_written_accumulation_is_no_false_alarm() -> None:
    """regularize for all micro-batches but the last, which goes through the closure."""
    model = Net("batch norm")
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, **SGD)
    for (x, y), (x2, y2) in micro_batches(loader(), 2):
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
    model = Net("batch norm")
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
    model = Net("batch norm")
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
    model = Net("batch norm")
    with warnings_as("ignore"):  # the head is not among its parameters
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
