"""What goes wrong in one of several processes is told, and where the others were meanwhile."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from tests import distributed
from tests.distributed import Processes


def passes() -> None:
    pass


def fails() -> None:
    assert dist.get_rank() == 0, "the second process"
    dist.barrier()


def dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hangs() -> None:
    while dist.get_rank() == 1:
        time.sleep(1)


@pytest.mark.parametrize(
    ("check", "told"),
    [
        (fails, r"AssertionError: the second process"),
        (dies, r"has died: exit code 7"),
        (hangs, r"does not come to an end(.|\n)*in hangs"),
    ],
    ids=["fails", "dies", "hangs"],
)
def test_a_failure_is_told(check: Callable[[], None], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE", 2.0)
    started = Processes(2)
    assert started.run(passes, {}) == {}
    failures = started.run(check, {}, limit=4.0)
    assert failures.keys() == {0, 1}
    assert "barrier" in failures[0]
    assert re.search(told, failures[1])
