"""Learning rate schedules as functions: progress of the training in [0, 1) -> factor of the learning rate."""

import math
from collections.abc import Callable


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


def steps(*milestones: float, factor: float) -> Callable[[float], float]:
    """Multiplied by ``factor`` at each milestone of the progress."""
    return lambda progress: factor ** sum(progress >= milestone for milestone in milestones)
