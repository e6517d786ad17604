"""What the tests of frameworks share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def in_float64_and_tmp_path(float64: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """New tensors are in float64; whatever is written goes to tmp_path; no warnings of Lightning or of data
    loading."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(lightning|torch\.utils\.data)\b.*")
        yield


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps the settings of its first Accelerator for the whole process: nothing of them stays."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
