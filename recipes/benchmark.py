"""What a step costs, relative to the same step of the plain base optimizer.

    python -m recipes.benchmark                                       # every row
    python -m recipes.benchmark --tasks "resnet18 head 10x512"        # one row
    python -m recipes.benchmark --smoke                               # seconds: does everything run?

The candidates of a row alternate in one process, in an order that rotates; every step is compared with
the plain step of the same round, so that a busy machine slows both; the table has the median of the ratios
and their quartiles. Before anything is timed, exact kappa is checked against Hutchinson's estimate with
many probes. Memory is the peak over one step of what is allocated, parameters and state included.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_optimizer import SAM
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from recipes.benchmark_cases import TASKS, Task
from recipes.memory import alive_bytes, peak_bytes
from recipes.plot_benchmark import plot
from recipes.results import environment, save
from recipes.step_time import clock

LAM = 1e-3  # any positive value costs the same
BASE: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
Step = Callable[[], Any]


def plain(task: Task) -> Step:
    """The base optimizer's step, with a closure."""
    optimizer = torch.optim.SGD(task.model.parameters(), **BASE)
    return lambda: optimizer.step(_closure(task, optimizer))


def fam(**options: Any) -> Callable[[Task], Step]:
    """The same with FAM."""

    def build(task: Task) -> Step:
        optimizer = FAM(task.model.parameters(), torch.optim.SGD, task.layer, LAM, **options, **BASE)
        return lambda: optimizer.step(_closure(task, optimizer))

    return build


def sam(**options: Any) -> Callable[[Task], Step]:
    """SAM as its authors use it: a gradient at the weights, and one at the perturbed weights."""

    def build(task: Task) -> Step:
        optimizer = SAM(task.model.parameters(), torch.optim.SGD, rho=0.05, **options, **BASE)
        closure = _closure(task, optimizer)

        def step() -> None:
            closure()
            optimizer.step(closure)  # type: ignore[arg-type]

        return step

    return build


def appendix(hessian: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Callable[[Task], Step]:
    """The paper's appendix: the layer's whole Hessian ``(d, m, d, m)`` by autograd, then its blocks' traces.

    Only for a layer that is last: the loss as a function of its weight is rebuilt from its input.
    """

    def build(task: Task) -> Step:
        optimizer = torch.optim.SGD(task.model.parameters(), **BASE)
        kept: list[Tensor] = []
        task.layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
        weight = task.layer.weight
        assert isinstance(weight, Tensor)

        def step() -> None:
            optimizer.zero_grad()
            kept.clear()
            loss = task.loss_fn(task.model(task.inputs), task.targets)

            def of_weight(w: Tensor) -> Tensor:
                return task.loss_fn(nn.functional.linear(kept[0], w, task.layer.bias), task.targets)  # type: ignore[arg-type]

            blocks = torch.einsum("stut->su", hessian(of_weight, weight))
            kappa = (weight @ weight.T * blocks).sum()
            (loss + LAM * kappa).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    return build


def vectorised(of_weight: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """All rows in one batched backward."""
    hessian: Tensor = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        of_weight, weight, create_graph=True, vectorize=True
    )
    return hessian


def loop(of_weight: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """One backward per row."""
    gradient = torch.autograd.grad(of_weight(weight), weight, create_graph=True)[0].flatten()
    rows = [torch.autograd.grad(gradient[k], weight, create_graph=True)[0] for k in range(len(gradient))]
    return torch.stack(rows).view(*weight.shape, *weight.shape)


CANDIDATES: dict[str, Callable[[Task], Step]] = {
    "plain": plain,
    "FAM exact": fam(),
    "FAM exact, detached": fam(detach_hessian=True),
    "FAM hutchinson": fam(mode="hutchinson"),
    "SAM": sam(),
    "ASAM": sam(adaptive=True),
    "vectorised Hessian": appendix(vectorised),
    "autograd-loop Hessian": appendix(loop),
}
WITH_HESSIAN = {  # where they fit, and take seconds
    "vectorised Hessian": {"resnet18 head 10x512", "bert-small classifier 2x512"},
    "autograd-loop Hessian": {"bert-small classifier 2x512"},
}


def _closure(task: Task, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss_fn(task.model(task.inputs), task.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def check(task: Task, probes: int) -> dict[str, float] | str:
    """Exact kappa beside the mean and standard error of single probes; raises if five errors apart."""
    with observe(task.layer) as layer:
        loss = task.loss_fn(task.model(task.inputs), task.targets)
    try:
        exact = relative_flatness(loss, layer).item()
    except RuntimeError as error:
        return str(error)
    generator = torch.Generator(task.targets.device).manual_seed(0)
    samples = [
        relative_flatness(loss, layer, mode="hutchinson", generator=generator).item() for _ in range(probes)
    ]
    mean, error_of_mean = statistics.fmean(samples), statistics.stdev(samples) / math.sqrt(probes)
    if abs(mean - exact) > 5 * error_of_mean + 1e-4 * abs(exact):
        raise AssertionError(f"exact kappa {exact} but {mean} +- {error_of_mean} from {probes} probes")
    return {"exact": exact, "probes": mean, "standard error": error_of_mean}


def measure(
    name: str, labels: Sequence[str], rounds: int, probes: int, device: torch.device
) -> dict[str, Any]:
    """One row: check, then time all candidates in alternation, then their memory."""
    torch.manual_seed(0)
    task = TASKS[name]()
    task.model.to(device)
    task.inputs, task.targets = task.inputs.to(device), task.targets.to(device)
    row: dict[str, Any] = {"task": name, "check": check(task, probes), "candidates": {}}
    candidates = {label: CANDIDATES[label] for label in CANDIDATES if label == "plain" or label in labels}
    candidates = {
        label: build for label, build in candidates.items() if name in WITH_HESSIAN.get(label, {name})
    }
    steps: dict[str, Step] = {}
    for label, build in candidates.items():
        step = build(copy.deepcopy(task))
        try:
            step()
            step()
        except RuntimeError as error:  # a refusal is an answer too
            row["candidates"][label] = {"refused": str(error)}
        else:
            steps[label] = step
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    order = list(steps)
    for turn in range(rounds):
        first = turn % len(order)
        for label in (*order[first:], *order[:first]):
            seconds[label].append(_timed(steps[label], device))
    reference = seconds["plain"]
    steps.clear()
    peaks = {label: _peak(task, candidates[label], device) for label in order}
    for label in order:
        ratios = sorted(own / other for own, other in zip(seconds[label], reference, strict=True))
        row["candidates"][label] = {
            "ratio": statistics.median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "seconds": statistics.median(seconds[label]),
            "extra_seconds": statistics.median(
                own - other for own, other in zip(seconds[label], reference, strict=True)
            ),
            "memory": peaks[label] / peaks["plain"],
            "peak_bytes": peaks[label],
        }
    return row


def _peak(task: Task, build: Callable[[Task], Step], device: torch.device) -> int:
    """Peak memory of a step of one candidate alone."""
    others = alive_bytes(device)
    step = build(copy.deepcopy(task))
    step()  # creates the optimizer's state
    return peak_bytes(step, device) - others


def _timed(step: Step, device: torch.device) -> float:
    begin = clock(device)
    step()
    return clock(device) - begin


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Time and memory relative to the plain step."""
    labels = list(dict.fromkeys(label for row in rows for label in row["candidates"]))
    table = Table(title="time (quartiles) and peak memory, relative to the plain step", box=box.SIMPLE)
    table.add_column("task")
    for label in labels:
        table.add_column(label, justify="right")
    for row in rows:
        cells = []
        for label in labels:
            c = row["candidates"].get(label)
            if c is None:
                cells.append("")
            elif "refused" in c:
                cells.append("refused")
            elif label == "plain":
                cells.append(f"{1000 * c['seconds']:.3g} ms")
            else:
                low, high = c["quartiles"]
                cells.append(f"{c['ratio']:.2f} ({low:.2f}-{high:.2f})\n{c['memory']:.2f}")
        table.add_row(row["task"], *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.benchmark", description=(__doc__ or "").split("\n")[0]
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=12, help="steps of every candidate")
    parser.add_argument("--probes", type=int, default=32, help="of the check")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device(default_device))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest tasks, three rounds: a test, no result"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.tasks, options.rounds, options.probes = ["tiny 16x16", "efficientnet head 100x256"], 3, 8
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    rows: list[dict[str, Any]] = []
    results = {
        "rounds": options.rounds,
        "environment": environment(options.device),
        "runs": rows,
    }
    for name in options.tasks:
        with console.status(name):
            # tiny steps are cheap and noisy
            rounds = options.rounds if name != "tiny 16x16" or options.smoke else 400
            rows.append(measure(name, options.candidates, rounds, options.probes, options.device))
        save(options.out / "benchmark.json", results)
    show(rows, console)
    path = options.out / "benchmark.json"
    plot(path, path.with_suffix(".png"))
    console.print(f"{path} and {path.with_suffix('.png')} written")


if __name__ == "__main__":
    main()
