"""Keeps a run's configuration, machine and results in its folder; ``recipes/README.md`` lists its files."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from recipes.shared.results import CPU, compact


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"

    def check(self, config: dict[str, Any], resume: bool) -> None:
        """Raises unless the folder is free or, with ``resume``, was begun with the same configuration."""
        if self.path.exists() and not resume:
            remedy = "continue it with --resume, or choose another --out"
            raise FileExistsError(f"{self.path} holds a run already: {remedy}")
        if not (self.path / "config.json").exists():
            return
        found, asked = self.read("config.json"), json.loads(json.dumps(config))
        pairs = {name: (found.get(name), asked.get(name)) for name in sorted({*found, *asked})}
        unlike = [f"{name}: {a!r} there, {b!r} asked for" for name, (a, b) in pairs.items() if a != b]
        if unlike:
            raise ValueError(f"{self.path} was begun with another configuration ({'; '.join(unlike)})")

    def begin(self, config: dict[str, Any], environment: dict[str, Any], step_time: dict[str, Any]) -> None:
        """Makes the folder, and writes what is known before the training."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("environment.json", environment)
        self.write("step_time.json", step_time)
        self.write("config.json", config)

    def read(self, name: str) -> Any:
        """Returns the content of the JSON file of that name."""
        if not (self.path / name).exists():
            raise FileNotFoundError(f"{self.path}: expected a run's folder, with {name} in it")
        return json.loads((self.path / name).read_text())

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Writes a JSON file."""
        (self.path / name).write_text(json.dumps(content, indent=1) + "\n")

    def epochs(self) -> list[dict[str, Any]]:
        """Returns what was measured after each epoch so far."""
        path = self.path / "epochs.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self, records: list[dict[str, Any]], state: dict[str, Any]) -> None:
        """Saves an epoch. A file is only ever replaced by a whole new one, so a kill loses nothing."""
        lines = "".join(json.dumps(compact(record, digits=7)) + "\n" for record in records)
        partial = self.path / "partial"
        partial.write_text(lines)
        os.replace(partial, self.path / "epochs.jsonl")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Returns the last checkpoint, or None before the first."""
        there = self.checkpoint.exists()
        return torch.load(self.checkpoint, map_location=device, weights_only=True) if there else None

    def networks(self) -> dict[int, dict[str, Any]]:
        """Returns the network's state by epoch, for the epochs that were kept and the last one."""
        kept = {int(path.stem[5:]): path for path in self.path.glob("epoch*.pt")}
        found = {epoch: torch.load(kept[epoch], CPU, weights_only=True) for epoch in sorted(kept)}
        last = self.load(CPU)
        if last is None:
            raise FileNotFoundError(f"{self.path} holds no checkpoint: train first, with recipes.train")
        return {**found, last["epoch"]: last["model"]}
