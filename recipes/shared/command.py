"""The command line that the recipes share, and the course of one that measures, saves, prints and draws."""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from recipes.shared.pictures import save as save_picture
from recipes.shared.results import CPU, environment, load, save
from recipes.shared.tables import console, show

Options = argparse.Namespace
NOT_CONFIGURATION = ("out", "plot", "device", "data", "runs")  # of the options: where, not what


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


fraction = partial(number, least=0, most=1, what="fraction from 0 to 1, such as 0.4")


def device(text: str) -> torch.device:
    """A device that torch can use here, for argparse."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch sees no GPU)"
        raise argparse.ArgumentTypeError(f"expected a device such as {usable}, got {text!r}") from error
    return found


class Distinct(argparse.Action):
    """Several values, none of them twice."""

    def __call__(self, reader: Any, space: Options, values: Any, option: str | None = None) -> None:
        if len(set(values)) < len(values):
            told = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"expected every value once, got {told}")
        setattr(space, self.dest, values)


SEVERAL: dict[str, Any] = {"nargs": "+", "action": Distinct}
COMMON: dict[str, dict[str, Any]] = {  # options that several recipes have
    "--seeds": {**SEVERAL, "type": int, "default": [0], "help": "random seeds; a run for each (default: 0)"},
    "--device": {
        "type": device,
        "default": "cuda" if torch.cuda.is_available() else "cpu",
        "help": "cpu, cuda, ... (default: %(default)s)",
    },
    "--data": {
        "type": Path,
        "default": Path("data"),
        "help": "folder of the data sets (default: %(default)s)",
    },
    "--plot": {"type": Path, "metavar": "JSON", "help": "measure nothing, show these saved results"},
}


def parser(
    name: str,
    doc: str | None,
    *common: str,
    out: Path | None = None,
    smoke: str = "",
    listed: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """For ``python -m recipes.<name>``: its docstring, and below the options what is listed.

    It has these common options, ``--out`` where a folder is given, and ``--smoke`` with what that does.
    """
    lines = [f"  {key}\n      {what}" for key, what in (listed or {}).items()]
    reader = argparse.ArgumentParser(
        prog=f"python -m recipes.{name}",
        description=doc,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option in common:
        reader.add_argument(option, **COMMON[option])
    if out is not None:
        reader.add_argument(
            "--out", type=Path, default=out, help="folder of the results (default: %(default)s)"
        )
    if smoke:
        told = f"a quick test with {smoke}; its results mean nothing, and go to OUT/smoke"
        reader.add_argument("--smoke", action="store_true", help=told)
    return reader


def out(options: Options) -> Path:
    """Where results go: a smoke test has a folder of its own, out of the way of real ones."""
    chosen: Path = options.out
    return chosen / "smoke" if options.smoke else chosen


def fresh(folder: Path) -> Path:
    """The folder, without what an earlier smoke test left there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@contextmanager
def in_a_sentence(
    name: str, stopped: str = "stopped", errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Say what is missing or wrong, in place of a traceback; ``stopped`` is for who stops it by hand."""
    try:
        yield
    except errors as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")


@dataclass(frozen=True)
class Recipe:
    """A command that measures: a table, a JSON file and a picture in --out."""

    name: str  # its module below recipes, such as "paper.hessian_time"
    doc: str | None  # the module's docstring
    measure: Callable[[Options], Iterable[dict[str, Any]]]  # one dict per row of what was measured
    tables: Callable[[Sequence[dict[str, Any]]], Table | list[Table]]  # of the saved rows
    plot: Callable[[Mapping[str, Any]], Figure] | None = None  # of the saved results
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of its own, as for argparse
    smoke: Mapping[str, Any] = field(default_factory=dict)  # the options' values in a smoke test

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Measure, save, print, draw."""
        options = self.parse(arguments)
        with in_a_sentence(self.name):
            path = options.plot or self.run(options)
            results = load(path)
            found = self.tables(results["runs"])
            show(console(), *([found] if isinstance(found, Table) else found))
            if self.plot is not None:
                save_picture(self.plot(results), path.with_suffix(".png"))
            print(f"{path.with_suffix('')}.* written")

    def parse(self, arguments: Sequence[str] | None) -> Options:
        """Read the command line."""
        reader = parser(
            self.name, self.doc, "--plot", out=Path("runs") / self.stem, smoke="the smallest sizes"
        )
        reader.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
        reader.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
        for name, settings in self.options.items():
            reader.add_argument(name, **settings)
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
        runs = list(self.measure(options))
        chosen = {name: value for name, value in vars(options).items() if name not in NOT_CONFIGURATION}
        path = out(options) / f"{self.stem}.json"
        where = {"environment": environment(getattr(options, "device", CPU))}
        seconds = time.perf_counter() - begin
        save(path, {"recipe": self.stem, "configuration": chosen, **where, "seconds": seconds, "runs": runs})
        return path
