"""Prints how a run is doing: a line per epoch, and one a minute if an epoch takes longer."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from torch import Tensor

from recipes.engine.loop import Loop
from recipes.engine.task import mean

PATIENCE = 60.0  # seconds


class Progress:
    """Prints the lines of a run; their metrics and kappa are those of the last epoch."""

    def __init__(self, title: str, loop: Loop, finished: int, step_time: float, console: Console) -> None:
        self.title, self.loop, self.step_time, self.console = title, loop, step_time, console
        self.first = finished * loop.per_epoch  # steps of an earlier command
        self.begin = self.said = time.monotonic()
        self.record: Mapping[str, Any] = {"epoch": finished}

    def after_step(self, step: int, loss: Tensor) -> None:
        """Prints a line if a minute has passed; the loss is read only then, as this waits for the device."""
        if time.monotonic() - self.said >= PATIENCE:
            self.say(step, loss.item())

    def after_epoch(self, record: Mapping[str, Any]) -> None:
        """Prints what was measured after an epoch."""
        self.record = record
        self.say(record["epoch"] * self.loop.per_epoch, record["train_loss"])

    def say(self, step: int, loss: float) -> None:
        """Prints loss, metrics, kappa and the cost of a step, the most important first."""
        self.said, loop, record = time.monotonic(), self.loop, self.record
        left = (self.said - self.begin) / max(1, step - self.first) * (loop.steps - step)
        names = [name for name in record if name.endswith(f"_{loop.task.metric}")]
        names = [name for name in names if not name.startswith("validation_")] or names
        what = [self.title, f"epoch {record['epoch']}/{loop.conditions.epochs}", f"loss {loss:.3f}"]
        what += [f"{name.replace('_', ' ')} {mean(record[name]):.4g}" for name in names]
        what += [f"kappa {record['kappa']:.3g}"] if "kappa" in record else []
        what += [f"step {self.step_time:.2f}x", f"{timedelta(seconds=round(left))} left"]
        self.console.print("  ".join(what), markup=False, highlight=False, soft_wrap=True)
