"""Hutchinson's estimator: ``E[<V, H V>] = <F F^T, T>`` for ``V = F Z`` with random signs Z ``(k, m)``.

F is not held constant, so the estimate's gradient is unbiased for all of Lemma 1, and H V is one
Hessian-vector product through the tail. (The paper, section 4, uses it for the layerwise measure.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fam_optim.curvature import Curvature
    from fam_optim.measure import Factor


def rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent signs, in `like`'s dtype and on its device."""
    device = like.device if generator is None else generator.device
    bits = torch.randint(0, 2, shape, generator=generator, device=device)
    return (2 * bits - 1).to(device=like.device, dtype=like.dtype)


def hutchinson(
    curvature: Curvature, factor: Factor, n_samples: int, generator: torch.Generator | None
) -> Tensor:
    """The mean of `n_samples` probes ``<V, H V>``.

    Cost: one Hessian-vector product through the tail per probe.
    """
    use = curvature.uses[0]
    like = curvature.gradient[0]
    values = []
    for _ in range(n_samples):
        signs = rademacher((factor.columns, use.m), like, generator)
        scale, probe = factor.probe(signs.T)
        values.append(scale * curvature.quadratic(probe.T))
    return torch.stack(values).mean()
