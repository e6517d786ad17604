"""Learning rate schedules map the training's progress in [0, 1) to a factor of the learning rate."""

import math
from collections.abc import Callable


def constant(progress: float) -> float:
    """Stays at 1."""
    return 1.0


def cosine(progress: float) -> float:
    """Falls from 1 to 0 along half a cosine (Loshchilov and Hutter, 2017)."""
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress: float) -> float:
    """Falls from 1 to 0 on a straight line, as for fine-tuning BERT."""
    return 1 - progress


def warm_up(progress: float) -> float:
    """Rises to 1 in the first tenth and then falls to 0, on straight lines, as for fine-tuning with AdamW."""
    return min(progress / 0.1, (1 - progress) / 0.9)


def steps(*milestones: float, factor: float) -> Callable[[float], float]:
    """Returns a schedule that starts at 1 and is multiplied by ``factor`` at each of the milestones."""
    return lambda progress: factor ** sum(progress >= milestone for milestone in milestones)
