"""What the graph proves is true: groups of rows that are said not to interact have no mixed derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fam_optim import observe, relative_flatness
from fam_optim.estimators.curvature import Curvature
from fam_optim.graph import independence
from fam_optim.graph.independence import find_grouping, shown_axes
from fam_optim.graph.trace import Tail, find_tails
from tests.cases import GRID, Case, each, observed
from tests.special_cases import SPECIAL
from tests.support import covering

if TYPE_CHECKING:
    from collections.abc import Callable

    from fam_optim.layer.record import Observation

pytestmark = pytest.mark.usefixtures("float64")


def tail_of_layer(loss: Tensor, layer: Observation) -> Tail:
    return find_tails(loss, [layer])[0]


def mixed(loss: Tensor, z: Tensor, axis: int) -> float:
    """The largest second derivative of the loss in z between entries at different places of an axis."""
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True, allow_unused=True, materialize_grads=True)
    rows = []
    for entry in gradient.flatten():
        if not entry.requires_grad:
            return 0.0
        (row,) = torch.autograd.grad(entry, z, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(row.movedim(axis, 0).flatten())
    length = z.shape[axis]
    # torch 2.6 has no derivative of the root of a variance that is 0.
    hessian = torch.stack(rows).reshape(*z.shape, -1).movedim(axis, 0).nan_to_num(nan=0.0)
    between = hessian.reshape(length, z.numel() // length, length, -1).abs().amax((1, 3))
    return between.fill_diagonal_(0).max().item()


ELEMENTWISE: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, F.gelu, F.softplus, torch.square, lambda z: z * 0.3, lambda z: z + z.sin(),
    lambda z: z * z.cos(), lambda z: z + torch.arange(z.shape[-1]), lambda z: F.dropout(z, 0.3),
]  # fmt: skip
OVER_AN_AXIS: list[Callable[[Tensor, int], Tensor]] = [
    lambda z, a: z.softmax(a), lambda z, a: z.log_softmax(a), lambda z, a: z.cumsum(a),
    lambda z, a: z - z.mean(a, keepdim=True), lambda z, a: z * z.sum(a, keepdim=True).sin(),
    lambda z, a: F.normalize(z, dim=a), lambda z, a: z.logsumexp(a, keepdim=True) + z,
    lambda z, a: torch.cat([z, z.tanh()], a), lambda z, a: z.narrow(a, 0, max(1, z.shape[a] // 2)),
    lambda z, a: z * z.std(a, keepdim=True), lambda z, a: z + z.amax(a, keepdim=True).tanh(),
    lambda z, a: z.sin() + z.select(a, 0).unsqueeze(a).expand_as(z).tanh(), lambda z, a: z.mean(a),
    lambda z, a: z + z.roll(1, a).tanh(),
]  # fmt: skip
SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda z: z.reshape(z.shape[0], -1), lambda z: z.reshape(-1, z.shape[-1]), lambda z: z.transpose(0, -1),
    lambda z: z.transpose(-1, -2) if z.dim() > 1 else z, lambda z: z[None], lambda z: z.flatten(),
    lambda z: z.reshape(2, -1) if z.numel() % 2 == 0 else z, lambda z: z.movedim(0, 1) if z.dim() > 1 else z,
    lambda z: z.unsqueeze(-1), lambda z: z.squeeze(), lambda z: z.reshape(-1, 2) if z.numel() % 2 == 0 else z,
]  # fmt: skip
PRODUCTS: list[Callable[[Tensor], Tensor]] = [
    lambda z: F.linear(z, torch.randn(3, z.shape[-1]), torch.randn(3)),
    lambda z: z @ torch.randn(z.shape[-1], 2),
    lambda z: F.layer_norm(z, z.shape[-1:]), lambda z: z @ z.transpose(-1, -2) if z.dim() > 2 else z,
    lambda z: z.tanh() + z.sum(-1)[None] if z.shape[-1:] == z.shape[:1] and z.dim() == 2 else z,
    lambda z: z.sum(-1)[None].expand_as(z).sin() if z.shape[-1:] == z.shape[:1] and z.dim() == 2 else z,
    lambda z: z.tanh() + z.sum(-1) if z.shape[-1:] == z.shape[:1] and z.dim() == 2 else z,
    lambda z: torch.addmm(torch.zeros(z.shape[1]), torch.randn(len(z), len(z)), z) if z.dim() == 2 else z,
    lambda z: torch.randn(len(z), len(z)) @ z if z.dim() == 2 else z,
    lambda z: torch.einsum("...i,...i->...", z, z.tanh()) if z.dim() > 1 else z,
    lambda z: F.conv1d(z[:, None], torch.randn(2, 1, 2)) if z.dim() == 2 and z.shape[1] > 1 else z,
]  # fmt: skip
LOSSES: list[Callable[[Tensor], Tensor]] = [
    lambda z: z.square().mean(), lambda z: z.tanh().sum(), lambda z: z.sin().sum() / 3 + z.square().mean(),
    lambda z: F.mse_loss(z, torch.randn(z.shape)), lambda z: F.huber_loss(z, torch.randn(z.shape)),
    lambda z: z.square().sum().sqrt(),
    lambda z: F.mse_loss(z, z.detach().flip(0).sin(), reduction="none").mean(0).sum(),
    lambda z: F.mse_loss(z, z.flatten()[: z.shape[-1]] if z.dim() else z * 2),
    lambda z: F.binary_cross_entropy_with_logits(z, torch.rand(z.shape)),
    lambda z: F.cross_entropy(z, torch.zeros(len(z)).long()) if z.dim() == 2 else z.square().sum(),
    lambda z: F.nll_loss(z.tanh(), torch.zeros(len(z)).long(), reduction="none").square().sum()
    if z.dim() == 2 else z.square().sum(),
    lambda z: z.square().logsumexp(tuple(range(z.dim()))) if z.dim() else z.square(),
]  # fmt: skip


def random_tail(seed: int) -> tuple[Tensor, nn.Linear, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    lead = [(2,), (4,), (2, 2), (4, 2), (3,)][draw(5)]
    d = [2, 3, 4][draw(3)]  # sizes that coincide, so that a wrong axis is not seen by its length
    steps = [(draw(4), draw(100), draw(3)) for _ in range(1 + draw(4))]
    loss = LOSSES[draw(len(LOSSES))]

    def tail(z: Tensor) -> Tensor:
        for kind, which, axis in steps:
            if kind == 0:
                z = ELEMENTWISE[which % len(ELEMENTWISE)](z)
            elif kind == 1 and z.dim():
                z = OVER_AN_AXIS[which % len(OVER_AN_AXIS)](z, axis % z.dim() if axis < 2 else -1)
            elif kind == 2 and z.dim():
                z = SHAPES[which % len(SHAPES)](z)
            elif kind == 3 and z.dim():
                z = PRODUCTS[which % len(PRODUCTS)](z)
        return loss(z)

    torch.manual_seed(seed)
    return torch.randn(*lead, 3), nn.Linear(3, d), tail


def test_random_tails() -> None:
    """Whatever is proven of 1,000 compositions of operations holds."""
    proven = 0
    for seed in range(1000):
        x, linear, tail_of = random_tail(seed)
        with observe(linear) as layer:
            z = linear(x)
            loss = tail_of(z)
        if not loss.requires_grad or loss.numel() != 1 or not loss.isfinite():
            continue
        tail = tail_of_layer(loss, layer)
        (shown,) = shown_axes([tail], tail.path | tail.ends)
        path = [n.name() for n in tail.path]
        for axis in shown:
            proven += 1
            assert mixed(loss, z, axis) == 0, f"seed {seed}, axis {axis}: {path}"
        if independence.independent(tail.path, tail.ends, len(x)):
            assert mixed(loss, z, 0) == 0, f"seed {seed}, as runs: {path}"
    assert proven > 500


def test_cases() -> None:
    """And of every layer, tail and loss of the table, half of which have groups that do not interact."""
    cases = covering([*GRID, *SPECIAL], each)
    assert sum(map(check, cases)) > len(cases) / 2


def check(case: Case) -> bool:
    """Whether groups are shown. If so, scaling directions by group scales the product likewise."""
    loss, (layer, *_) = observed(case.problem())
    tail = tail_of_layer(loss, layer)
    curvature = Curvature(tail, differentiable=False)
    grouping = find_grouping(curvature.tail)
    if grouping is None or grouping.groups < 2:
        return False
    scales = grouping.scatter(torch.rand(grouping.groups, 1, 1).expand(-1, grouping.size, 1))
    q = [torch.randn_like(g) for g in curvature.gradient]
    scaled = curvature.hvp([e * u for e, u in zip(scales, q, strict=True)])
    for e, s, h in zip(scales, scaled, curvature.hvp(q), strict=True):
        torch.testing.assert_close(s, e * h, rtol=1e-9, atol=1e-13, msg=lambda text: f"{case.name}: {text}")
    return True


SHOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "perceptron": lambda z: F.cross_entropy(F.linear(F.gelu(z), torch.randn(3, 4)), torch.zeros(6).long()),
    "norms": lambda z: F.mse_loss(F.layer_norm(F.group_norm(z, 2), (4,)), torch.zeros(6, 4)),
    "batch norm in eval mode": lambda z: F.batch_norm(z, torch.zeros(4), torch.ones(4)).sin().sum(),
    "convolutions": lambda z: (
        F.avg_pool2d(F.conv2d(z.view(6, 1, 2, 2), torch.ones(2, 1, 1, 1)), 2).sin().sum()
    ),
    "attention of each sample": lambda z: (
        (z.view(6, 2, 2) @ z.view(6, 2, 2).mT).softmax(-1) @ z.view(6, 2, 2)
    ).square().mean(),
    "weights of rows": lambda z: (torch.rand(6) * z.tanh().square().sum(1)).sum() / 7,
    "normalised": lambda z: F.normalize(z, dim=-1).sin().sum(),
}  # fmt: skip


@pytest.mark.parametrize("tail_of", SHOWN.values(), ids=SHOWN)
def test_common_tails_are_shown(tail_of: Callable[[Tensor], Tensor]) -> None:
    linear = nn.Linear(3, 4)
    with observe(linear) as layer:
        loss = tail_of(linear(torch.randn(6, 3)))
    tail = tail_of_layer(loss, layer)
    (shown,) = shown_axes([tail], tail.path | tail.ends)
    assert list(shown) == [0]
    assert independence.independent(tail.path, tail.ends, 6)


def attention(z: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Of two heads, on ``(samples, words, 4)``."""
    heads = z.view(*z.shape[:2], 2, 2).transpose(1, 2)
    with sdpa_kernel(SDPBackend.MATH):
        mixed = F.scaled_dot_product_attention(heads, heads, heads, mask, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def module(make: Callable[[], nn.Module]) -> Callable[[Tensor], Tensor]:
    return lambda z: make().double()(z)


SEQUENCES: dict[str, tuple[list[int], Callable[[Tensor], Tensor]]] = {
    # what is shown of z (samples, words, 4): the axes along which nothing interacts
    "words by themselves": ([0, 1], lambda z: F.gelu(F.layer_norm(z, (4,))) @ torch.randn(4, 3)),
    "attention": ([0], lambda z: z + attention(z)),
    "causal attention": ([0], lambda z: attention(z, causal=True)),
    "attention with a mask": ([0], lambda z: attention(z, torch.rand(6, 1, 5, 5).round().bool())),
    "encoder layer": ([0], module(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True))),
    "sequence first": ([1], module(lambda: nn.TransformerEncoderLayer(4, 2, 8))),
    "recurrent": ([0], lambda z: nn.GRU(4, 3, batch_first=True).double()(z)[0]),
    "mean over words": ([0], lambda z: z.mean(1).tanh()),
    "the first word": ([0], lambda z: F.layer_norm(z[:, 0].tanh(), (4,)).cumsum(1)),
    "the last word": ([0], lambda z: F.linear(z[:, -1], torch.randn(3, 4)).softmax(1)),
    "two words together": ([0], lambda z: (z[:, 0] + z[:, -1]).tanh()),
    "the first sample": ([1], lambda z: z[0].tanh()),
    "some words": ([0], lambda z: z[:, torch.tensor([0, 2])].softmax(1)),
    "a word in front": ([0], lambda z: torch.cat([torch.zeros(6, 1, 4), z], 1).cumsum(1).sin()),
    "channels in front": ([0], lambda z: F.conv1d(z.mT, torch.randn(2, 4, 3)).relu().square()),
    "words as a batch": ([0, 1], lambda z: (z.reshape(-1, 4) @ torch.randn(4, 4)).view(6, 5, 4).tanh()),
    "heads as a batch": ([0], lambda z: z.view(6, 5, 2, 2).transpose(1, 2).reshape(12, 5, 2).softmax(1)),
    "over the samples": ([1], lambda z: z.softmax(0)),
    "as many as there are words, by a mask": ([], lambda z: z[torch.eye(6, 5).flip(1).bool()] * z[0].tanh()),
    "batch norm in train mode": ([], lambda z: F.batch_norm(z.mT, None, None, training=True)),
}


@pytest.mark.parametrize(("axes", "tail_of"), SEQUENCES.values(), ids=SEQUENCES)
def test_axes_of_sequences(axes: list[int], tail_of: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 4), torch.randn(6, 5, 3)
    with observe(linear) as layer:
        z = linear(x)
        loss = tail_of(z).sin().square().mean()
    tail = tail_of_layer(loss, layer)
    (shown,) = shown_axes([tail], tail.path | tail.ends)
    assert list(shown) == axes
    for axis in shown:
        assert mixed(loss, z, axis) == 0


def test_positions_of_an_unbatched_convolution_are_not_its_first_axis() -> None:
    """z (d, L) with d a multiple of L: its runs are channels, whatever the length of the axis."""
    convolution = nn.Conv1d(2, 4, 1)
    with observe(convolution) as layer:
        loss = convolution(torch.randn(2, 4)).softmax(1).square().sum()
    tail = tail_of_layer(loss, layer)
    assert independence.independent(tail.path, tail.ends, 4), "of channels it is true"
    grouping = find_grouping(tail)
    assert grouping is not None and grouping.axes == ()
    torch.testing.assert_close(
        relative_flatness(loss, layer), relative_flatness(loss, layer, mode="full"), rtol=1e-9, atol=0
    )
