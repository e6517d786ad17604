"""The interface of a regulariser: it looks at a step's losses and acts around the base optimizer's step."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


class Regularizer:
    """Keeps layers flat. Its state lies outside the optimizer because trainers wrap an optimizer in a class
    that inherits from the optimizer's. Methods and setters then get the wrapper as self, which reads the
    optimizer's attributes but writes its own (Lightning-AI/pytorch-lightning, core/optimizer.py)."""

    lam: float  # the strength, at least 0
    last_kappa: Tensor | None = None  # kappa as last computed for a step, detached
    last_lam: float | None = None  # lam when kappa last entered a penalty
    given: bool  # whether the user asked for a regularised loss, or called backward, since the last step
    _saved: ClassVar[tuple[str, ...]]  # attributes that a copy or pickle keeps; `_prepare` makes the others

    def _prepare(self) -> None:
        """Makes the attributes that are not saved, in a new, copied or unpickled regulariser."""

    def named_weights(self) -> list[tuple[str, list[Tensor]]]:
        """Returns the name of each layer with its parameters."""
        raise NotImplementedError

    @property
    def names(self) -> str:
        """The names of the layers, for messages."""
        return ", ".join(name for name, _ in self.named_weights())

    @property
    def looks(self) -> bool:
        """Whether it looks at the coming step's losses; otherwise the step is the base optimizer's alone."""
        return True

    def change_lam(self, lam: float) -> None:
        """Sets lam; may be called at any time."""
        self.lam = lam

    @property
    def trained(self) -> list[Tensor]:
        """The base optimizer's parameters."""
        return [p for group in self._base.param_groups for p in group["params"]]

    def start(self, base: Optimizer) -> None:
        """Called once, before the first forward."""
        self._base = base

    def regularize(self, loss: Tensor) -> Tensor:
        """Returns what to backpropagate in place of a loss."""
        raise NotImplementedError

    def plain(self, loss: Tensor) -> Tensor:
        """Returns a loss without what was added to it, or to losses that it is made of."""
        return loss

    def gradients_zeroed(self) -> None:
        """Called after the gradients were emptied."""

    def check(self) -> None:
        """Raises RuntimeError if no step may be made on the present gradients."""

    def before_step(self) -> None:
        """Called before the base optimizer moves the weights."""

    def after_step(self) -> None:
        """Called after the base optimizer has moved the weights."""

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint needs."""
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        """Takes over the state of a checkpoint; ValueError if it was made with other layers."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()
