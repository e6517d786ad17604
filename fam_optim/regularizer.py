"""What FAM asks of a regulariser: it looks at a step's losses, and acts around the base optimizer's step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Regularizer:
    """Keeps layers flat, and knows what happened to them since the last step.

    It is one object beside the optimizer, since trainers wrap optimizers in a class that inherits from
    theirs: methods and setters are then called with the wrapper for self, which reads the optimizer's
    attributes but writes its own (Lightning-AI/pytorch-lightning, core/optimizer.py).
    """

    lam: float  # how strongly, at least 0
    last_kappa: Tensor | None  # detached, as it was last computed for a step; None before
    given: bool  # whether FAM.regularize was called since the last step
    _saved: ClassVar[tuple[str, ...]]  # what a copy or pickle keeps; `_prepare` makes the other attributes

    def _prepare(self) -> None:
        """Makes what a new, copied or unpickled one needs beside the attributes that are saved."""
        raise NotImplementedError

    def named_weights(self) -> list[tuple[str, list[Tensor]]]:
        """The layers' names with their parameters."""
        raise NotImplementedError

    @property
    def names(self) -> str:
        """The layers, for messages."""
        return ", ".join(name for name, _ in self.named_weights())

    @property
    def last_penalty(self) -> Tensor | None:
        """What was last added to a loss, detached; None before, and where nothing is added."""
        return None

    @property
    def looks(self) -> bool:
        """Whether it looks at the coming step's losses; the other steps are the base optimizer's alone."""
        return True

    def change_lam(self, lam: float) -> None:
        """Sets lam, at any time."""
        self.lam = lam

    def start(self, trained: Iterable[Tensor]) -> None:
        """Called once, before the first forward, with the base optimizer's parameters."""

    def regularize(self, loss: Tensor) -> Tensor:
        """What is backpropagated in place of a loss."""
        raise NotImplementedError

    def gradients_zeroed(self) -> None:
        """Called when the gradients were emptied."""

    def check(self, trained: Iterable[Tensor]) -> None:
        """Raises RuntimeError if no step may be made on the gradients that are there."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Called before the base optimizer moves the weights."""

    def after_step(self) -> None:
        """Called when it has moved them."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside lam."""
        raise NotImplementedError

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint, if it is of this kind of regulariser."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self._saved}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()
