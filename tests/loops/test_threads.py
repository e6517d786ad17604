"""Threads: several trainings at once, one forward in several threads, DataParallel's replicas."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, observe
from tests.sandwich import COMPUTED, Sandwich, check, data, fam_on, loss_of
from tests.support import LAM, Net, Style, assert_same, batch, by_style, seeded

pytestmark = pytest.mark.usefixtures("float64")


@by_style
def test_threads(style: Style) -> None:
    """Networks trained at once, each in its thread, end where they end one after the other."""
    jobs = [("head", "exact"), ("body", "exact"), ("body", "hutchinson"), ("head", "exact")]

    def train(seed: int, model: Net, layer: str, mode: str) -> None:
        of = model.head if layer == "head" else model.body[0]
        generator = torch.Generator().manual_seed(seed)
        fam = FAM(model.parameters(), torch.optim.Adam, of, LAM, mode, generator=generator, lr=0.01)
        for step in range(30):
            style(model, fam, *batch(step + 1000 * seed))

    alone, together = ([Net(seed=seed) for seed in range(len(jobs))] for _ in range(2))
    for seed, job in enumerate(jobs):
        train(seed, alone[seed], *job)
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            train(seed, together[seed], *jobs[seed])
        except BaseException as error:  # reported below, where pytest sees it
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for seed, job in enumerate(jobs):
        assert_same(together[seed].parameters(), alone[seed].parameters(), f"weights of {job}")
        assert not torch.equal(together[seed].head.weight, Net(seed=seed).head.weight)


@pytest.mark.parametrize("make", [nn.Linear, COMPUTED["weight_norm"]], ids=["plain", "weight_norm"])
def test_calls_in_several_threads(make: Callable[[int, int], nn.Module]) -> None:
    """As nn.parallel.parallel_apply does it: one chunk of the batch in each thread."""
    x, y = data()

    def run(model: nn.Module) -> Tensor:
        outputs: dict[int, Tensor] = {}

        def work(i: int, chunk: Tensor) -> None:
            outputs[i] = model(chunk)

        threads = [threading.Thread(target=work, args=(i, c)) for i, c in enumerate(x.chunk(3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return F.cross_entropy(torch.cat([outputs[i] for i in range(3)]), y)

    check(partial(Sandwich, make=make), run, loss_of)


def test_replicas_of_data_parallel_are_refused() -> None:
    model = seeded(Sandwich)
    fam_on(model)
    replica = model._replicate_for_data_parallel()
    replica.layer = model.layer._replicate_for_data_parallel()
    replica.layer.weight, replica.layer.bias = model.layer.weight * 1, model.layer.bias * 1
    with observe(model.layer), pytest.raises(RuntimeError, match=r"DataParallel.*DistributedDataParallel"):
        replica(data()[0])
    with observe(model.layer), torch.no_grad():  # evaluation is fine
        torch.testing.assert_close(replica(data()[0]), model(data()[0]), rtol=0, atol=0)
