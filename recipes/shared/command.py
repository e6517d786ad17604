"""The command line that the recipes share, and the course of one that measures, saves, prints and draws."""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from recipes.shared.pictures import save as save_picture
from recipes.shared.results import CPU, environment, load, save
from recipes.shared.tables import console, show

Options = argparse.Namespace
NOT_CONFIGURATION = ("out", "plot", "device", "data", "runs", "measured")  # of the options: where, not what


def parser(name: str, doc: str | None, listed: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """For ``python -m recipes.<name>``: its docstring's first line, and below the options what is listed."""
    lines = [f"  {key}\n      {what}" for key, what in (listed or {}).items()]
    return argparse.ArgumentParser(
        prog=f"python -m recipes.{name}",
        description=(doc or "").split("\n")[0],
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def number(text: str, least: float = -math.inf, most: float = math.inf, what: str = "finite number") -> float:
    """A finite number, for argparse."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and least <= found <= most):
        raise argparse.ArgumentTypeError(f"expected a {what}, got {text!r}")
    return found


def fraction(text: str) -> float:
    """A part of a whole, for argparse."""
    return number(text, 0, 1, "fraction from 0 to 1, such as 0.4")


class Distinct(argparse.Action):
    """Several values, none of them twice."""

    def __call__(
        self, reader: argparse.ArgumentParser, space: Options, values: Any, option: str | None = None
    ) -> None:
        if len(set(values)) < len(values):
            told = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"expected every value once, got {told}")
        setattr(space, self.dest, values)


def add_seeds(target: argparse.ArgumentParser) -> None:
    """--seeds, a run each."""
    target.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        action=Distinct,
        default=[0],
        help="of weights, order, split and noise",
    )


def device(text: str) -> torch.device:
    """A device that torch can use here, for argparse."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch sees no GPU)"
        raise argparse.ArgumentTypeError(f"expected a device such as {usable}, got {text!r}") from error
    return found


def add_device(target: argparse.ArgumentParser) -> None:
    """--device, the GPU where there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    target.add_argument(
        "--device", type=device, default=default, help="cpu, cuda, ... (default: %(default)s)"
    )


def add_smoke(target: argparse.ArgumentParser, what: str) -> None:
    """--smoke, with what it does."""
    target.add_argument(
        "--smoke", action="store_true", help=f"{what}: a test, no result, in the folder smoke below --out"
    )


def out(options: Options) -> Path:
    """Where results go: a smoke test has a folder of its own, out of the way of real ones."""
    chosen: Path = options.out
    return chosen / "smoke" if options.smoke else chosen


def fresh(folder: Path) -> Path:
    """The folder, without what an earlier smoke test left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Recipe:
    """A command that measures: a table, a JSON file and a picture in --out."""

    name: str  # its module below recipes, such as "paper.hessian_time"
    doc: str | None  # the module's docstring
    measure: Callable[[Options], list[dict[str, Any]]]  # one dict per row of what was measured
    table: Callable[[Sequence[dict[str, Any]]], Table]  # of the saved rows
    plot: Callable[[Mapping[str, Any]], Figure] | None = None  # of the saved results
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of its own, as for argparse
    smoke: Mapping[str, Any] = field(default_factory=dict)  # the options' values in a smoke test
    summary: Callable[[Sequence[dict[str, Any]]], str] | None = None  # a closing line

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Measure, save, print, draw."""
        options = self.parse(arguments)
        try:
            path = self.run(options) if options.plot is None else options.plot
            results = load(path)
            show(console(), self.table(results["runs"]))
            if self.summary is not None:
                print(self.summary(results["runs"]))
            if self.plot is not None:
                save_picture(self.plot(results), path.with_suffix(".png"))
            print(f"{path.with_suffix('')}.* written")
        except (ValueError, FileNotFoundError) as error:
            sys.exit(f"{self.name}: {error}")

    def parse(self, arguments: Sequence[str] | None) -> Options:
        """Read the command line."""
        reader = parser(self.name, self.doc)
        for name, settings in self.options.items():
            reader.add_argument(name, **settings)
        reader.add_argument("--threads", type=positive, default=1, help="of torch")
        reader.add_argument("--seed", type=int, default=0)
        reader.add_argument(
            "--out", type=Path, default=Path("runs") / self.stem, help="folder of the results"
        )
        reader.add_argument("--plot", type=Path, metavar="JSON", help="measure nothing, draw these results")
        add_smoke(reader, "the smallest sizes")
        options = reader.parse_args(arguments)
        if options.smoke:
            vars(options).update(self.smoke)
        return options

    @property
    def stem(self) -> str:
        """The name of its files."""
        return self.name.rpartition(".")[2]

    def run(self, options: Options) -> Path:
        """Measure, and save under the name of the recipe."""
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        begin = time.perf_counter()
        runs = self.measure(options)
        chosen = {name: value for name, value in vars(options).items() if name not in NOT_CONFIGURATION}
        path = out(options) / f"{self.stem}.json"
        where = {"environment": environment(getattr(options, "device", CPU))}
        seconds = time.perf_counter() - begin
        save(path, {"recipe": self.stem, "configuration": chosen, **where, "seconds": seconds, "runs": runs})
        return path
