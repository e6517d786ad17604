"""kappa without the Hessian, and never an approximation.

With phi_a the input that row a of z sees, and F's columns f,

    <F F^T, T> = sum_{a,b} <phi_a, phi_b> <F F^T, Hess_{z_a z_b}(L)>                      (DESIGN, 3)

Where the layer feeds a softmax cross-entropy there is a closed form (`softmax`). Else two ways to the same
number, the cheaper that provably applies is taken:

    rows      rows fall into groups that do not interact behind the layer (samples; the tokens of a
              sentence): all groups share one product, (rows per group) * min(d, m) products in all
    weight    directions in weight space: m * min(d, m) products, whatever interacts

Whether rows interact is read off the graph (`independence`) or tested (`rows`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from fam_optim.estimators.rows import find_grouping
from fam_optim.graph import errors, verdicts
from fam_optim.layer.use import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fam_optim.estimators.curvature import Curvature
    from fam_optim.estimators.measure import Factor
    from fam_optim.estimators.rows import Grouping
    from fam_optim.graph.trace import Tail

MAX_PRODUCTS = 1024
"""More Hessian-vector products than this in one evaluation end in an error instead."""

MANY_PRODUCTS = 50
"""More than this are worth a word: of the ways to regularise this layer exact is the slowest."""

BATCHED = 1 << 18
"""Numbers in the directions that are multiplied with the Hessian at a time: many small products are slow."""


def exact(curvature: Curvature, factor: Factor) -> Tensor:
    """``<F F^T, T>`` without forming H.

    Cost: ``min(d, m)`` Hessian-vector products through the tail where the rows of z do not interact, more
    where they do.

    Raises:
        RuntimeError: if that would take more than `MAX_PRODUCTS` products.
    """
    tail = curvature.tail
    m = tail.uses[0].m
    grouping = find_grouping(curvature, smaller_than=m)
    products = (m if grouping is None else grouping.size) * factor.directions
    if products > MAX_PRODUCTS:  # not on the word of an older test
        grouping = find_grouping(curvature, smaller_than=m, insist=True)
        products = (m if grouping is None else grouping.size) * factor.directions
    if products > MAX_PRODUCTS:
        raise RuntimeError(
            f"exact kappa of this layer (weight matrix {tail.uses[0].d} x {m}) takes {products} "
            f"Hessian-vector products here, more than the limit of {MAX_PRODUCTS}. Use mode='hutchinson', "
            "which is unbiased with one product per probe, or regularise a layer nearer to the loss. (To "
            "measure all the same, raise fam_optim.estimators.exact.MAX_PRODUCTS.)"
        )
    if products > MANY_PRODUCTS:
        _say_many(tail, products)
    if grouping is None:
        return _by_weight(curvature, factor)
    return _by_rows(curvature, factor, grouping)


def _by_weight(curvature: Curvature, factor: Factor) -> Tensor:
    """``sum_{k,t} <u_k e_t^T, H v_k e_t^T>``."""
    weight = curvature.uses[0].matrix()
    total = weight.new_zeros(())
    for u, v in zip(*(pairs.unbind(1) for pairs in factor.pairs()), strict=True):
        for t in range(weight.shape[1]):
            matrix = torch.zeros_like(weight)
            matrix[:, t] = v
            total = total + u @ curvature.times(matrix)[:, t]
    return total


def _by_rows(curvature: Curvature, factor: Factor, grouping: Grouping) -> Tensor:
    """``sum_{a,k} sum_b <phi_a, phi_b> <u_k, Hess_{z_b z_a} v_k>``, all groups at once."""
    u, v = factor.pairs()
    total = curvature.gradient[0].new_zeros(())
    for position, products in grouping.gram_rows():

        def along(u_k: Tensor, v_k: Tensor, position: int = position, products: Tensor = products) -> Tensor:
            moved = curvature.hvp(grouping.place(position, v_k))
            return (products * (grouping.gather_outputs(moved) @ u_k)).sum()

        total = total + _each(along, u, v, curvature).sum()
    return total


def _each(along: Callable[[Tensor, Tensor], Tensor], u: Tensor, v: Tensor, curvature: Curvature) -> Tensor:
    """`along` of every pair of columns, several at a time where all of the tail's operations can be."""
    memory, key = verdicts.of(curvature.tail.layer), verdicts.signature(curvature.tail, "batched")
    size = max(1, BATCHED // sum(g.numel() for g in curvature.gradient))
    if memory.known(key) is not False:
        try:
            return torch.vmap(along, in_dims=1, chunk_size=size)(u, v)
        except RuntimeError as error:  # some operations cannot: an autograd.Function, say
            if errors.is_out_of_memory(error):
                raise
    result = torch.stack([along(*pair) for pair in zip(u.unbind(1), v.unbind(1), strict=True)])
    memory.remember(key, False)  # one at a time it went
    return result


def _say_many(tail: Tail, products: int) -> None:
    """Warns, once for a layer, that exact is dear here."""
    memory = verdicts.of(tail.layer)
    if memory.known(b"said that exact is dear") is None:
        memory.remember(b"said that exact is dear", True)
        warnings.warn(
            f"exact kappa of `layer` {describe(tail.layer)} takes {products} Hessian-vector products through "
            "what follows it, at every evaluation: it does not feed a softmax cross-entropy directly. "
            "mode='hutchinson' is unbiased with one product.",
            stacklevel=2,
        )
