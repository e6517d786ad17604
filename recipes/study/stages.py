"""Names the study's stages; each looks at what was measured so far, and yields the trials still wanted.

A stage that chooses is asked again until it wants nothing more.
"""

from collections.abc import Callable, Iterator

from recipes.study import defaults, search
from recipes.study.analysis import Results
from recipes.study.trial import Trial

STAGES: dict[str, Callable[[Results], Iterator[Trial]]] = {
    "sgd": search.sgd,
    "defaults": defaults.defaults,
    "half": defaults.half,
    "other_rates": defaults.other_rates,
    "bar": defaults.bar,
    "step": defaults.step,
    "confirmation": defaults.confirmation,
    "ablations": defaults.ablations,
    "flattening": defaults.flattening,
    "reviews": defaults.reviews,
    "tuning": search.tuning,
    "comparison": search.comparison,
    "longer": search.longer,
    "more_seeds": search.more_seeds,
}
