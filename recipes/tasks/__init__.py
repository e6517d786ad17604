"""The experiments by name."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from recipes.engine.task import Task

# name -> module, function, arguments; imported when asked for, so that a task needs its own packages alone
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "quickstart": ("small", "quickstart", {"noise": 0.0}),
    "quickstart-noise40": ("small", "quickstart", {"noise": 0.4}),
    "fashion-mnist-small": ("small", "fashion_mnist_small", {}),
    "fashion-mnist-small-tuning": ("small", "fashion_mnist_small", {"tuning": True}),
    "fashion-mnist-shipped": ("small", "fashion_mnist_small", {"shipped": True}),
    "fashion-mnist-shipped-tuning": ("small", "fashion_mnist_small", {"shipped": True, "tuning": True}),
    "cifar10": ("vision", "cifar10", {}),
    "cifar100": ("vision", "cifar100", {}),
    "svhn": ("vision", "svhn", {}),
    "fashion-mnist": ("vision", "fashion_mnist", {}),
    "skulls": ("skulls", "skulls", {}),
    "skulls-small": ("skulls", "skulls", {"small": True}),
    "rte": ("rte", "rte", {}),
    "reviews": ("reviews", "reviews", {}),
}


def load_task(name: str) -> Task:
    """Build a task; raises ``recipes.engine.task.Missing`` where a package is not there."""
    module, function, arguments = TASKS[name]
    make: Callable[..., Task] = getattr(import_module(f"recipes.tasks.{module}"), function)
    return make(**arguments)
