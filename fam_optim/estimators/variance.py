"""The trace of the covariance of class vectors under softmax probabilities: the closed form's arithmetic.

    sum_i b_i c_i,    c_i = sum_k p_ik ||w_k||^2 - ||sum_k p_ik w_k||^2

for log p ``(n, d)``, class vectors W ``(d, m)`` and a weight b_i per row, in two ways: by pairs of classes
where they are few, around the most probable where they are many. In neither do terms cancel where the largest
probability rounds to one. Moving all class vectors alike changes nothing, so what they have in common is
taken away first: it may be large beside their differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def trace_of_covariance(log_p: Tensor, w: Tensor, by_row: Tensor) -> Tensor:
    """``sum_i b_i c_i``, ``()``, of log p ``(n, d)``, W ``(d, m)`` and b ``(n,)``.

    Cost: one product ``(n, d) x (d, m)`` and two in the backward, or less.
    """
    n, d = log_p.shape
    centred = w - w.detach().mean(0)
    by_class = _by_pairs if few_classes(n, d, w.shape[1]) else _around_top
    return by_class(log_p, centred) @ by_row


def variance_of_indicator(log_p: Tensor, by_row: Tensor) -> Tensor:
    """``sum_i b_i (1 - ||p_i||^2)``, ``()``: the same for orthonormal class vectors."""
    q, _ = _without_top(log_p)
    rest = q.sum(1)
    return (by_row * (2 * rest - rest.square() - q.square().sum(1))).sum()


def few_classes(n: int, d: int, m: int) -> bool:
    """Whether pairs of the d classes take less time than products of the size of the head itself.

    They take ``d d (n + 2 m)`` multiplications against ``3 n d m``, and were as fast with twice as many,
    since they read and write less, and with a few million more, since they are fewer operations.
    """
    return d <= max(n, m) and d * d * (n + 2 * m) < 6 * n * d * m + 8_000_000


def _by_pairs(log_p: Tensor, w: Tensor) -> Tensor:
    """For few classes: ``c_i = 1/2 sum_kl p_ik p_il ||w_k - w_l||^2``, whose terms are all positive.

    Nothing of the size of the layer's inputs ``(n, m)`` is formed.
    """
    p, squares = log_p.exp(), w.square().sum(1)
    same = torch.eye(len(w), dtype=torch.bool, device=w.device)
    distances = torch.addmm(squares, w, w.T, alpha=-2).add(squares[:, None]).masked_fill(same, 0)
    return (p * (p @ distances)).sum(1) / 2


def _around_top(log_p: Tensor, w: Tensor) -> Tensor:
    """For many classes: with t the most probable, q the probabilities of the others and ``delta = mu - w_t``,

    ``c = sum_k q_k (||w_k||^2 - ||w_t||^2) - 2 <delta, w_t> - ||delta||^2``.
    """
    q, top = _without_top(log_p)
    rest, w_top, squares = q.sum(1), w[top], w.square().sum(1)
    delta = q @ w - rest[:, None] * w_top
    return q @ squares - rest * squares[top] - (delta * (2 * w_top + delta)).sum(1)


def _without_top(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """p with its largest entry set to zero, and where that was ``(n,)``."""
    top = log_p.argmax(1)
    return log_p.exp().scatter(1, top[:, None], 0.0), top
