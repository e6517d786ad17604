"""kappa by its definition: forms the Hessian of the loss in W, takes the trace of each block, adds up.

    T[s,u] = Tr(H_{s,u}) = sum_t H[s,t,u,t],      <F F^T, T>               (paper, section 1)

Slow and general. It shares no shortcut with the other estimators and checks them in the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fam_optim.estimators.curvature import Curvature
    from fam_optim.estimators.measure import Factor


def full(curvature: Curvature, factor: Factor) -> Tensor:
    """``<F F^T, T>`` from the whole Hessian of one layer.

    Cost: ``d * m`` Hessian-vector products through the tail and ``O((d m)^2)`` memory.
    """
    weight = curvature.uses[0].matrix()
    rows = []
    for index in range(weight.numel()):
        unit = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        unit.view(-1)[index] = 1
        rows.append(curvature.times(unit))
    hessian = torch.stack(rows).reshape(*weight.shape, *weight.shape)
    return (factor.gram() * torch.einsum("stut->su", hessian)).sum()
