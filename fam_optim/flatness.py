"""One function, `relative_flatness`, computes the relative flatness of layers from a measure and a mode.

measure   ->  factor F and number c   (`measure`)
mode      ->  estimator               (`estimators`)
both      ->  c <F F^T, T>,  T[s,u] = Tr(H_{s,u})
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fam_optim.estimators.curvature import Curvature
from fam_optim.estimators.exact import exact, full
from fam_optim.estimators.gauss_newton import gauss_newton
from fam_optim.estimators.hutchinson import hutchinson
from fam_optim.estimators.measure import Factor
from fam_optim.estimators.softmax import closed_form
from fam_optim.graph import errors
from fam_optim.graph.reach import computed_alike
from fam_optim.graph.trace import Tail, find_tails
from fam_optim.layer.record import Observation
from fam_optim.layer.use import describe
from fam_optim.layers import Layer, distinct, several
from fam_optim.parallel import gathered, lasting, unsunk
from fam_optim.unnoticed import counted_once, in_full_precision

CHOICES = {
    "measure": ["layerwise", "neuronwise"],
    "mode": ["exact", "full", "hutchinson"],
    "curvature": ["hessian", "gauss_newton"],
}


@dataclass(frozen=True)
class Settings:
    """The choices of how to compute kappa, checked once, when the user gives them."""

    measure: str = "neuronwise"
    mode: str = "exact"
    normalize: bool = False
    n_samples: int = 1
    generator: torch.Generator | None = None
    detach_hessian: bool = False
    curvature: str = "hessian"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"expected `{name}` to be one of {known}, got {getattr(self, name)!r}.")
        for name in ("normalize", "detach_hessian"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"expected `{name}` to be True or False, got {getattr(self, name)!r}.")
        if not isinstance(self.n_samples, int) or self.n_samples < 1:
            raise ValueError(f"expected `n_samples` to be a positive integer, got {self.n_samples!r}.")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"expected `generator` to be a torch.Generator, got {type(self.generator).__name__}."
            )


def relative_flatness(
    loss: Tensor,
    layer: Layer | Sequence[Layer],
    *,
    measure: str = "neuronwise",
    mode: str = "exact",
    curvature: str = "hessian",
    normalize: bool = False,
    n_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns the relative flatness of a layer, ``()``, differentiable in every parameter of the network.

        neuronwise   kappa     = sum_{s,u} <w_s, w_u> Tr(H_{s,u})
        layerwise    kappa_hat = ||W||_F^2 Tr(H)

    W ``(d, m)`` is the layer's weight, one row w_s per output. H_{s,u} ``(m, m)`` is the loss's Hessian.

    >>> with observe(model.head) as layer:
    ...     loss = criterion(model(x), y)
    >>> (loss + 0.03 * relative_flatness(loss, layer)).backward()

    On the last layer of a classifier kappa is never negative. On lower layers it can be negative, since the
    loss need not be convex in their weights. ``curvature="gauss_newton"`` uses a part of H that is never
    negative on any layer, ``G = sum_i J_i^T B_i J_i``. Here J is the Jacobian of the network's outputs and B
    the Hessian of the loss in them. Where only piecewise linear functions follow, kappa is the same.

    Args:
        loss: the scalar loss, before its backward. kappa is linear in it and has its unit: the sum over
            samples gives the sum of their kappas, the mean gives the mean.
        layer: what `observe` yielded, an nn.Parameter (every use of it counts; not in mode exact with the
            Hessian), or a sequence of these, whose kappas are added.
        measure: "neuronwise" or "layerwise".
        mode: "exact", "full" (forms H, for tiny layers and tests) or "hutchinson" (random probes).
        curvature: "hessian", or "gauss_newton" for softmax cross-entropy, binary cross-entropy with logits,
            logsumexp, softplus, squared error, Huber and smooth L1 losses and sums of these.
        normalize: divide by m, as the authors' code does, so that the paper's lambda values apply.
        n_samples: number of probes per evaluation (hutchinson).
        generator: draws the probes; by default torch's global one (hutchinson).

    Returns:
        kappa, in float32 or in the loss's precision if this is higher.

    Raises:
        ValueError, TypeError: for an argument that is none of the above.
        RuntimeError: if the loss does not depend on the layer; in mode exact, if the value would take too
            many Hessian-vector products; in kappa's backward, if torch has no third derivative of what
            follows the layer (BatchNorm in train mode).

    Cost, in tail backwards (a backward from the loss to the layer's output only): exact takes about one on a
    softmax cross-entropy head and about ``4 min(d, m)`` elsewhere; hutchinson about 4 per probe. With
    Gauss-Newton curvature one product serves all layers: hutchinson takes 1 per probe and 2 more for its
    gradient, exact takes that for each of the network's outputs.

    Source: Petzka et al. 2021, definition 3 (kappa); Adilova et al. 2023, sections 1 and 3.2.
    """
    settings = Settings(measure, mode, normalize, n_samples, generator, curvature=curvature)
    layers = several(layer)
    for one in layers:
        if not isinstance(one, (Observation, Tensor)):
            got = f"the module {describe(one)}" if isinstance(one, nn.Module) else type(one).__name__
            raise TypeError(
                f"expected `layer` to be an observation or an nn.Parameter, got {got}. Run the forward "
                "inside `with observe(module) as layer:` and pass that."
            )
        check_mode(one, settings)
    return tails_flatness(list(find_tails(loss, distinct(layers)).values()), settings)


def tails_flatness(tails: Sequence[Tail], settings: Settings) -> Tensor:
    """Returns the sum of the kappas of the layers to which these tails of one loss lead."""
    first, *others = each_flatness(tails, settings)
    return sum(others, first)


def each_flatness(tails: Sequence[Tail], settings: Settings) -> list[Tensor]:
    """Returns the kappa of each layer to which these tails of one loss lead."""
    precise, graph = in_full_precision(tails[0].loss.device), tails[0].parents
    with torch.enable_grad(), precise, unsunk(graph), gathered(tails), counted_once(), _unhooked(tails):
        factors = [Factor(_matrix(tail), settings.measure, settings.normalize) for tail in tails]
        if settings.curvature == "gauss_newton":
            differentiable, random = not settings.detach_hessian, (settings.n_samples, settings.generator)
            found = gauss_newton(tails, factors, settings.mode, *random, differentiable=differentiable)
            found = list(map(errors.once_differentiable, found))
        else:
            found = [_of_hessian(tail, factor, settings) for tail, factor in zip(tails, factors, strict=True)]
        kappas = [factor.c * one for factor, one in zip(factors, found, strict=True)]
        return [kappa.to(torch.promote_types(kappa.dtype, tails[0].loss.dtype)) for kappa in kappas]


@contextmanager
def _unhooked(tails: Sequence[Tail]) -> Iterator[None]:
    """Keeps the user's hooks on a weight's gradient (to freeze rows, say) out of kappa's derivatives."""
    with ExitStack() as undoing:
        for tail in tails:
            hooks = tail.uses[0].weight._backward_hooks or {}
            undoing.callback(hooks.update, dict(hooks))
            hooks.clear()
        yield


def check_mode(layer: object, settings: Settings) -> None:
    """Raises ValueError for a bare parameter if the mode needs the layer's inputs and outputs."""
    if settings.mode == "exact" and settings.curvature == "hessian" and isinstance(layer, Tensor):
        raise ValueError(
            f"mode='exact' needs the layer's inputs and outputs, which a bare {describe(layer)} does not "
            "have. Pass the module that owns it as `layer`, or use mode='hutchinson'."
        )


def _of_hessian(tail: Tail, factor: Factor, settings: Settings) -> Tensor:
    """Returns ``<F F^T, T>`` of one layer with the Hessian's T."""
    if all(0 in use.shape for use in tail.uses):  # a batch without samples
        return 0 * tail.uses[0].matrix().sum()
    differentiable = not settings.detach_hessian
    if settings.mode == "exact":
        found = closed_form(tail, factor, differentiable=differentiable)
        if found is not None:
            return found
    curvature = Curvature(tail, differentiable=differentiable)
    if settings.mode == "hutchinson":
        found = hutchinson(curvature, factor, settings.n_samples, settings.generator)
    else:
        found = (full if settings.mode == "full" else exact)(curvature, factor)
    why = curvature.undifferentiable
    return found if settings.mode == "full" and why is None else errors.once_differentiable(found, why)


def _matrix(tail: Tail) -> Tensor:
    """Returns the W of all calls; RuntimeError unless all have computed it alike, to the same numbers."""
    first = tail.uses[0].weight
    others = [use.weight for use in tail.uses if use.weight is not first]
    if not all(computed_alike(first, w) and torch.equal(first, w) for w in others):
        raise RuntimeError(
            "the calls of the layer that the loss depends on were made with different weights (spectral_norm "
            "in train mode changes its weight at every call, torch.func.functional_call takes any), and "
            "kappa is of one weight. Call the layer once, on the concatenated inputs, or within "
            "torch.nn.utils.parametrize.cached(), or observe() the calls with one of the weights."
        )
    return lasting(tail.uses[0].matrix())
