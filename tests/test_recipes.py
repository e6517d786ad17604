"""Every recipe runs its real code path in seconds and writes what it promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes import benchmark, estimator_spread, quickstart

RECIPES: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "quickstart": (quickstart.main, ["quickstart.json", "quickstart.png"]),
    "benchmark": (benchmark.main, ["benchmark.json"]),
    "estimator_spread": (estimator_spread.main, ["estimator_spread.json"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name: str, tmp_path: Path) -> None:
    main, files = RECIPES[name]
    main(["--smoke", "--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    results = json.loads((tmp_path / files[0]).read_text())
    assert results["runs"] and results["environment"]["torch"]
