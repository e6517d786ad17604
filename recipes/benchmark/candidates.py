"""The columns of the benchmark: the training steps that are compared, and the rows that each fits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from recipes.benchmark.cases import CASES, HIDDEN, INNER, ONE
from recipes.engine.optimizers import GAUSS_NEWTON, Settings, build, take_step
from recipes.shared.problem import Problem

BASE: dict[str, Any] = {"base": "sgd", "lr": 1e-3, "momentum": 0.9}
LOOKSAM: dict[str, Any] = {"optimizer": "looksam", **BASE, "rho": 0.05, "k": 10}
PENALTY: dict[str, Any] = {"optimizer": "fam", **BASE, "lam": 1e-3}  # any positive lam costs the same
REFUSALS = (RuntimeError, TypeError, ValueError)  # with which the library refuses
Step = Callable[[], Any]


@dataclass(frozen=True)
class Candidate:
    """A training step that is measured."""

    about: str
    settings: Settings  # of its optimizer, as `recipes.engine.optimizers.build` takes them
    rows: frozenset[str] = frozenset(CASES)  # the rows that it fits
    period: int = 1  # after how many steps its cost repeats

    def build(self, problem: Problem) -> Step:
        """Returns the step on a problem's batch; it changes the problem's model."""
        optimizer = build(self.settings, problem.model, problem.layers)
        return lambda: take_step(optimizer, problem.model, problem.loss_fn, problem.inputs, problem.targets)


def proximal(every: int) -> Candidate:
    """Returns FAM as recommended, on the problem's layers."""
    settings = {"optimizer": "fam", **BASE, "mode": "proximal", "lam": 1.0, "every": every}
    return Candidate(f"FAM's proximal step in every {every}th step", settings, HIDDEN, every)


def penalty(label: str, about: str, own: Settings, rows: frozenset[str]) -> dict[str, Candidate]:
    """Returns FAM's penalty, and the same with the curvature as a constant, by label."""
    constant = {**PENALTY, **own, "detach_hessian": True}
    detached = Candidate(f"{label} with the curvature as a constant", constant, rows)
    return {label: Candidate(about, {**PENALTY, **own}, rows), f"{label}, detached": detached}


CANDIDATES: dict[str, Candidate] = {
    "plain": Candidate("SGD with momentum, to which all are relative", {"optimizer": "sgd", **BASE}),
    "FAM proximal": proximal(10),
    "FAM proximal, every 20": proximal(20),
    "SAM": Candidate("pytorch_optimizer's SAM", {"optimizer": "sam", **BASE, "rho": 0.05}),
    "LookSAM": Candidate("pytorch_optimizer's LookSAM, SAM in every 10th step", LOOKSAM, HIDDEN, 10),
    **penalty("FAM exact", "FAM's penalty, kappa in closed form or by all products", {}, ONE),
    **penalty("FAM hutchinson", "FAM's penalty, kappa by one random probe", {"mode": "hutchinson"}, ONE),
    **penalty("FAM Gauss-Newton", "FAM's penalty, one random Gauss-Newton vector", GAUSS_NEWTON, INNER),
}


def chosen(labels: Sequence[str], row: str) -> dict[str, Candidate]:
    """Returns the candidates with these labels that fit the row, and always the plain step."""
    fitting = {label: one for label, one in CANDIDATES.items() if row in one.rows}
    return {label: one for label, one in fitting.items() if label in ("plain", *labels)}
