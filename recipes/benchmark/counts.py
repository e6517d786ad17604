"""The operations behind the benchmark: multiplications of a step, counted, relative to the plain step's.

    python -m recipes.benchmark.counts                                        # table, JSON
    python -m recipes.benchmark.counts --measured runs/benchmark/benchmark.json   # measured times beside them
    python -m recipes.benchmark.counts --smoke

Counted by torch.utils.flop_counter are matrix products and convolutions, forward and backward, of the second
step (the first one verifies what is remembered afterwards). Entrywise operations are not: where they, or the
calls themselves, take the time, the measured ratio is the higher one. Three units make the counts readable:

    layer product   the layer's own forward, N m d multiplications for a Linear layer
    tail pass       forward and backward of what follows the layer
    bare product    <V, H V> by hand, and its derivative in everything that enters: V, made from W entry by
                    entry, through the layer, autograd.grad twice behind it, one backward. What makes a probe
                    from W, and checks whether rows may be probed apart, comes on top in the library
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from recipes.benchmark.candidates import CANDIDATES
from recipes.benchmark.cases import TASKS, Task
from recipes.shared.results import load, record, save

COUNTED = ("FAM exact", "FAM exact, detached", "FAM hutchinson", "FAM hutchinson, detached", "SAM")
PROBES = {"FAM hutchinson": "bare product", "FAM hutchinson, detached": "bare product, detached"}


def counter() -> FlopCounterMode:
    """Counts, also the products that torch's table leaves out."""

    def addmm_(total: Sequence[int], a: Sequence[int], b: Sequence[int], **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_})


def flops(call: Callable[[], Any]) -> int:
    """Operations of matrix products and convolutions in a call: two per multiplication."""
    with counter() as counted:
        call()
    total: int = counted.get_total_flops()
    return total


def step_flops(task: Task, label: str) -> int | None:
    """Of a candidate's second step; None where it is refused."""
    step = CANDIDATES[label].build(copy.deepcopy(task))
    try:
        step()
        return flops(step)
    except RuntimeError:
        return None


@dataclass
class Cut:
    """A task's loss as a function of what enters the layer and what follows it.

    Attributes:
        phi, z: the layer's input and output, leaves.
        entering: what else is trained in the tail.
        before, after: operations counted when the layer was called, and when it was done.
    """

    phi: Tensor = field(init=False)
    z: Tensor = field(init=False)
    entering: list[Tensor] = field(default_factory=list)
    before: int = 0
    after: int = 0


def cut(task: Task) -> tuple[Cut, Tensor, int]:
    """The graph of a forward, cut before and behind the layer; the loss; the operations of the forward."""
    found = Cut()

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if module is task.layer:
            found.before = counted.get_total_flops()
            found.phi = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
            return (found.phi,)
        if hasattr(found, "z"):
            found.entering += [p for p in module.parameters(recurse=False) if p.requires_grad]
        return None

    def leave(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        found.after = counted.get_total_flops()
        found.z = output.detach().requires_grad_()
        return found.z

    handles = [module.register_forward_pre_hook(enter) for module in task.model.modules()]
    handles.append(task.layer.register_forward_hook(leave))
    with counter() as counted:
        loss = task.loss()
        whole: int = counted.get_total_flops()
    for handle in handles:
        handle.remove()
    return found, loss, whole


def units(task: Task) -> dict[str, int | None]:
    """The layer product, the tail pass and the bare products of a task; None without third derivatives."""
    task = copy.deepcopy(task)
    parts, loss, whole = cut(task)
    entering = [t for t in (task.weight, parts.phi, parts.z, *parts.entering) if t.requires_grad]

    def backward(value: Tensor) -> int:
        return flops(lambda: torch.autograd.grad(value, entering, retain_graph=True, allow_unused=True))

    def product(*, detached: bool) -> Tensor:
        phi = parts.phi.detach() if detached else parts.phi
        direction = functional_call(task.layer, {"weight": task.weight * signs, **no_bias}, (phi,))
        (gradient,) = torch.autograd.grad(loss, parts.z, create_graph=True)
        (moved,) = torch.autograd.grad(
            gradient, parts.z, direction.detach(), create_graph=not detached, retain_graph=True
        )
        value: Tensor = (direction * moved).sum()
        return value

    signs = torch.randn_like(task.weight).sign()
    bias = task.layer._parameters.get("bias")
    no_bias = {} if bias is None else {"bias": torch.zeros_like(bias)}
    plain = backward(loss)
    found: dict[str, int | None] = {
        "layer product": parts.after - parts.before,
        "tail pass": whole - parts.after + plain,
    }
    for name, detached in (("bare product", False), ("bare product, detached", True)):
        try:
            with counter() as counted:
                value = product(detached=detached)
            found[name] = counted.get_total_flops() + backward(loss + value) - plain
        except RuntimeError:  # BatchNorm in train mode has no third derivative
            found[name] = None
    return found


def count(name: str) -> dict[str, Any]:
    """One row: the units, and every candidate's operations."""
    torch.manual_seed(0)
    task = TASKS[name]()
    return {
        "task": name,
        "units": units(task),
        "plain": step_flops(task, "plain"),
        "candidates": {label: step_flops(task, label) for label in COUNTED},
    }


def tables(rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> tuple[Table, Table]:
    """The ratios to the plain step, with the measured ones, and what comes on top, in each unit."""
    times = {row["task"]: row["candidates"] for row in measured}
    ratios = Table("task", "plain, GFLOP", *COUNTED, box=box.MARKDOWN)
    ratios.title = "operations relative to the plain step" + (" (measured time)" if times else "")
    extras = Table(
        *("task", "unit", "unit / plain", "exact", "hutchinson", "bare product", "hutchinson / bare"),
        *("hutchinson, detached", "bare product, detached", "detached / bare"),
        title="operations on top of the plain step's, in tail passes or layer products, whichever is larger",
        box=box.MARKDOWN,
    )
    for row in rows:
        cells = []
        for label in COUNTED:
            found = times.get(row["task"], {}).get(label, {}).get("ratio")
            beside = f" ({found:.2f})" if found is not None else ""
            cells.append(quotient(row["candidates"][label], row["plain"]) + beside)
        ratios.add_row(row["task"], f"{row['plain'] / 1e9:.3g}", *cells)
        on_top = {label: None if n is None else n - row["plain"] for label, n in row["candidates"].items()}
        unit = max(("tail pass", "layer product"), key=lambda name: row["units"][name])
        size = row["units"][unit]
        cells = [unit, quotient(size, row["plain"], 4), quotient(on_top["FAM exact"], size)]
        for label, bare in PROBES.items():
            cells.append(quotient(on_top[label], size))
            cells.append(quotient(row["units"][bare], size))
            cells.append(quotient(on_top[label], row["units"][bare]))
        extras.add_row(row["task"], *cells)
    return ratios, extras


def quotient(over: int | None, under: int | None, digits: int = 2) -> str:
    """For the tables; "-" where there is none."""
    return "-" if over is None or not under else f"{over / under:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark.counts", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--measured", type=Path, help="JSON of recipes.benchmark")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_counts"))
    parser.add_argument("--smoke", action="store_true", help="the smallest tasks: a test, no result")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.tasks = ["tiny 16x16", "efficientnet head 100x256"]
    torch.set_num_threads(options.threads)
    console = Console(width=240)
    begin = time.perf_counter()
    rows = []
    for name in options.tasks:
        with console.status(name):
            rows.append(count(name))
    path = options.out / "benchmark_counts.json"
    configuration = {"operations": "two per multiplication", "smoke": options.smoke}
    save(path, record("benchmark_counts", configuration, time.perf_counter() - begin, rows))
    console.print(*tables(rows, load(options.measured)["runs"] if options.measured else []))


if __name__ == "__main__":
    main()
