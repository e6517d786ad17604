"""Learning rate schedules as functions: progress of the training in [0, 1) -> factor of the learning rate."""

import math


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def cosine(progress: float) -> float:
    """Half a cosine, from 1 to 0 (Loshchilov and Hutter, 2017)."""
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float) -> float:
    """A straight line from 1 to 0, as for fine-tuning BERT."""
    return 1 - progress


def warm_up(progress: float) -> float:
    """A straight line up to 1 over the first tenth, then one down to 0, as for fine-tuning with AdamW."""
    return min(progress / 0.1, (1 - progress) / 0.9)


class Steps:
    """Multiply by ``factor`` at each milestone of the progress."""

    def __init__(self, *milestones: float, factor: float) -> None:
        """Take the milestones as parts of the training."""
        self.milestones, self.factor = milestones, factor

    def __call__(self, progress: float) -> float:
        """Return the factor of the learning rate."""
        return self.factor ** sum(progress >= milestone for milestone in self.milestones)

    def __str__(self) -> str:
        """Say it as a paper would."""
        return f"x {self.factor:g} after {', '.join(f'{milestone:g}' for milestone in self.milestones)}"
