"""Parses the recipes' command lines, and runs the recipes that measure, save, print and draw."""

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
NOT_CONFIGURATION = ("out", "plot", "device", "data", "runs")  # options that say where, not what


def positive(text: str) -> int:
    """Reads a whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def number(text: str, least: float = -math.inf, most: float = math.inf, what: str = "finite number") -> float:
    """Reads a finite number, for argparse."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and least <= found <= most):
        raise argparse.ArgumentTypeError(f"expected a {what}, got {text!r}")
    return found


fraction = partial(number, least=0, most=1, what="fraction from 0 to 1, such as 0.4")


def device(text: str) -> torch.device:
    """Reads a device that torch can use here, for argparse."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        usable = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch sees no GPU)"
        raise argparse.ArgumentTypeError(f"expected a device such as {usable}, got {text!r}") from error
    return found


class Distinct(argparse.Action):
    """Stores several values. Raises ArgumentError if one is given twice."""

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
    """Returns the parser of ``python -m recipes.<name>``; its help shows ``doc``, the options and ``listed``.

    It has these common options, ``--out`` if a default is given, and ``--smoke`` if its effect is given.
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
    """Returns the folder of the results. A smoke test has one of its own, apart from real results."""
    chosen: Path = options.out
    return chosen / "smoke" if options.smoke else chosen


def fresh(folder: Path) -> Path:
    """Removes the folder with all that it holds, and returns its path."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@contextmanager
def in_a_sentence(
    name: str, stopped: str = "stopped", errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[None]:
    """Ends a program that fails with a sentence, not a traceback; Ctrl-C ends it with ``stopped``."""
    try:
        yield
    except errors as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: {stopped}")


@dataclass(frozen=True)
class Recipe:
    """A command that measures, prints a table, and writes JSON and a picture into --out."""

    name: str  # its module below recipes, such as "paper.hessian_time"
    doc: str | None  # the module's docstring
    measure: Callable[[Options], Iterable[dict[str, Any]]]  # yields a dict per row
    tables: Callable[[Sequence[dict[str, Any]]], Table | list[Table]]  # made from the saved rows
    plot: Callable[[Mapping[str, Any]], Figure] | None = None  # drawn from the saved results
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # its own, as for argparse
    smoke: Mapping[str, Any] = field(default_factory=dict)  # the options' values in a smoke test

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Measures, saves, prints and draws."""
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
        """Reads the command line."""
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
        """The name of its files, without folder and ending."""
        return self.name.rpartition(".")[2]

    def run(self, options: Options) -> Path:
        """Measures, saves the results under the recipe's name, and returns the file's path."""
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
