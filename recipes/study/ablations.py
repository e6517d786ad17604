"""Makes other forms of the proximal step, with one thing changed at a time, to compare by validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fam_optim import FAM
from fam_optim.estimators.running_mean import KEPT, Dense
from fam_optim.proximal import Proximal
from fam_optim.step_roots import StepRoots


@dataclass(frozen=True)
class Form:
    """A form of the proximal step."""

    layers: str = "hidden"  # which weights are moved
    lam: float = 1.0
    n_samples: int = 1  # sign matrices in a due step
    rows: bool = True  # whether A is made of rows where it can be; otherwise it is the weight's gradient
    kept: float = KEPT  # part of T's running mean that a due step keeps
    averages_rows: bool = False  # whether T is a running mean also if A is made of rows
    implicit: bool = True  # whether W moves to the minimum of the quadratic, or along its gradient
    trust: bool = (
        True  # whether c follows the base's step, or is the penalty's, every lr lam / (1 - momentum)
    )


FORMS = {
    "as it is": Form(),
    "always the weight's gradient": Form(rows=False),
    "rows averaged too": Form(averages_rows=True),
    "four signs": Form(n_samples=4),
    "no mean": Form(kept=0.0),
    "mean of 2": Form(kept=0.5),
    "mean of 10": Form(kept=0.9),
    "explicit": Form(implicit=False),
    **{f"penalty's length, lam {lam}": Form(trust=False, lam=lam) for lam in (0.003, 0.01, 0.03)},
    "all layers": Form(layers="all"),
    "last but one": Form(layers="last but one"),
    "first": Form(layers="first"),
}


def with_form(optimizer: Optimizer, form: Form, layers: Sequence[nn.Module], every: int, seed: int) -> None:
    """Gives a FAM another form of the step."""
    assert isinstance(optimizer, FAM)
    random = form.n_samples, torch.Generator().manual_seed(seed)
    other = optimizer.regularizer = OtherForm(layers, form.lam, every, *random)
    other.start(optimizer.base_optimizer)
    other.form, other.group = form, optimizer.param_groups[0]
    if not form.rows:
        other.roots = Gradients(other.weights, form.n_samples)


class Gradients(StepRoots):
    """Takes the weight's gradient as A everywhere."""

    def rows(self, reached: Any) -> dict[int, Any]:
        return {}


class OtherForm(Proximal):
    """The library's step with some parts exchanged, for a single process."""

    form: Form
    group: Mapping[str, Any]  # the base's parameter group, with its settings

    @torch.no_grad()
    def _pull(self, roots: dict[int, Tensor], of_rows: set[int], before: list[Tensor]) -> None:
        for i, a in roots.items():
            weight, form = self.weights[i], self.form
            w, old = weight.of(weight.parameter), weight.of(before[i])
            t = a @ a.mT
            if form.averages_rows or i not in of_rows:
                mean = self.means.kept.setdefault(i, torch.zeros_like(t))
                t = mean.lerp_(t, 1 - form.kept)
            twice_c = self.length(t, w, old)
            solve = Dense(t[None], w[None]).solve
            moved = solve(twice_c[None])[0] if form.implicit else w - twice_c * (t @ w)
            weight.parameter.copy_(weight.back(moved))

    def length(self, t: Tensor, w: Tensor, old: Tensor) -> Tensor:
        """Returns ``2 c``."""
        if self.form.trust:
            found = self.lam * self.every * (w - old).norm() / (t @ w).norm()
            return torch.where(found.isfinite(), found, 0)
        group = self.group
        return torch.tensor(2 * self.every * group["lr"] * self.lam / (1 - group["momentum"]))
