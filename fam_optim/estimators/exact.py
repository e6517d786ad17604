"""kappa is computed exactly, by forming the Hessian (`full`) or without it (`exact`).

`full` follows the definition: it forms H, takes ``T[s,u] = Tr(H_{s,u})`` and contracts (paper, section 1). It
is slow and general. It shares no shortcut with the other estimators, and the tests check them against it.

`exact` returns the same number without H, and never an approximation. If phi_a is the input of row a of z,

    <F F^T, T> = sum_{a,b} <phi_a, phi_b> <F F^T, Hess_{z_a z_b}(L)>

Where the layer feeds a softmax cross-entropy there is a closed form (`softmax`). Otherwise `exact` takes one
of two ways, the cheaper of those that the graph proves right:

    rows      The graph shows that groups of rows (samples, say, or sentences) do not interact behind the
              layer. All groups share each product, so (rows per group) * min(d, m) products are needed.
    weight    Directions in weight space take m * min(d, m) products, whatever interacts.
"""

import warnings

import torch
from torch import Tensor

from fam_optim.estimators.curvature import Curvature, inner
from fam_optim.estimators.measure import Factor
from fam_optim.graph.independence import Grouping, find_grouping
from fam_optim.layer.use import describe

MAX_PRODUCTS = 1024  # an evaluation that would take more Hessian-vector products raises an error
MANY_PRODUCTS = 50  # one that takes more than this warns, since hutchinson would be much faster


def exact(curvature: Curvature, factor: Factor) -> Tensor:
    """Returns ``<F F^T, T>`` without forming H; RuntimeError if that takes more than `MAX_PRODUCTS`."""
    tail = curvature.tail
    d, m = tail.uses[0].d, tail.uses[0].m
    grouping = find_grouping(tail)
    products = (m if grouping is None else min(grouping.size, m)) * factor.directions
    if products > min(MAX_PRODUCTS, MANY_PRODUCTS):
        layer = f"`layer` {describe(tail.layer)} (weight matrix {d} x {m})"
        what = f"exact kappa of {layer} takes {products} Hessian-vector products"
        if products > MAX_PRODUCTS:
            raise RuntimeError(
                f"{what} here, more than the limit of {MAX_PRODUCTS}. Use mode='hutchinson', which is "
                "unbiased with one product per probe, or regularise a layer nearer to the loss. (To measure "
                "all the same, raise fam_optim.estimators.exact.MAX_PRODUCTS.)"
            )
        warnings.warn(  # Python shows the same text only once
            f"{what} through what follows it, at every evaluation: it does not feed a softmax cross-entropy "
            "directly. mode='hutchinson' is unbiased with one product.",
            stacklevel=2,
        )
    if grouping is None or grouping.size >= m:
        return _by_weight(curvature, factor)
    return _by_rows(curvature, factor, grouping)


def _by_weight(curvature: Curvature, factor: Factor) -> Tensor:
    """Returns ``sum_{k,t} <u_k e_t^T, H v_k e_t^T>``, in weight space."""
    weight = curvature.tail.uses[0].matrix()
    total = weight.new_zeros(())
    for u, v in zip(*factor.pairs(), strict=True):
        for t in range(weight.shape[1]):
            matrix = torch.zeros_like(weight)
            matrix[:, t] = v
            total = total + (u * curvature.times(matrix)[:, t]).sum()
    return total


def _by_rows(curvature: Curvature, factor: Factor, grouping: Grouping) -> Tensor:
    """Returns ``sum_{a,k} sum_b <phi_a, phi_b> <u_k, Hess_{z_b z_a} v_k>``, all groups together."""
    phi = grouping.gather([use.rows() for use in grouping.uses])
    total = curvature.gradient[0].new_zeros(())
    pairs = factor.pairs()
    for position in range(grouping.size):
        products = phi @ phi[:, position, :, None]
        for u, v in zip(*pairs, strict=True):
            at = v.new_zeros(grouping.groups, grouping.size, len(v))
            at[:, position] = v
            moved = curvature.hvp(grouping.scatter(at))
            total = total + inner(grouping.scatter(products * u), moved)
    return total


def full(curvature: Curvature, factor: Factor) -> Tensor:
    """Returns ``<F F^T, T>`` from the whole Hessian, by ``d * m`` products, in ``O((d m)^2)`` memory."""
    weight = curvature.tail.uses[0].matrix()
    units = torch.eye(weight.numel(), dtype=weight.dtype, device=weight.device).view(-1, *weight.shape)
    hessian = torch.stack([curvature.times(unit) for unit in units]).view(*weight.shape, *weight.shape)
    return (factor.gram() * torch.einsum("stut->su", hessian)).sum()
