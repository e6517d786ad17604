"""Cases that fit no grid: shared, nested, frozen, tied and degenerate layers, and changing losses.

`SPECIAL` are cases like those of `tests/cases.py`. `CHANGES` are losses whose structure changes in
mid-training under an unchanged graph: a coefficient that was zero, a mask, an index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.cases import CE, Case, Problem, attend, contrastive, data_for, focal, per_row, seeded_by

if TYPE_CHECKING:
    from collections.abc import Callable


def calls(
    run: Callable[[nn.Module, Problem], Tensor], layer: nn.Module | None = None, rows: int = 4
) -> Problem:
    """A stem and one layer, with a loss that calls them as it pleases.

    Args:
        run: the loss, of the layer and the problem, which has inputs `x` and `x2` (rows, m) and
            `tokens` (2, 3, m), and data for as many rows.
    """
    layer = layer or nn.Linear(4, 3)
    m = layer.in_features
    net = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(m, m), nn.Tanh()), "layer": layer})
    data = {"x": torch.randn(rows, m), "x2": torch.randn(rows, m), "tokens": torch.randn(2, 3, m)}
    data |= data_for(rows, layer.out_features)
    return Problem(net, [layer], lambda p: run(p.net["layer"], p), **data)


def features(p: Problem) -> Tensor:
    return p.net["stem"](p.x)


def once(f: nn.Module, p: Problem) -> Tensor:
    """One call of the layer."""
    return f(features(p))


def both(f: nn.Module, p: Problem) -> tuple[Tensor, Tensor]:
    """Two calls of the layer, on two views."""
    return once(f, p), f(p.net["stem"](p.x2))


def head(f: nn.Module, p: Problem) -> Tensor:
    return CE(once(f, p), p.y)


def pairs(a: Tensor, b: Tensor, p: Problem) -> Tensor:
    """Pairs at wanted distances."""
    return ((a - b).square().sum(1) - p.distance).square().mean()


def unequal_views(f: nn.Module, p: Problem) -> Tensor:
    one, two = f(features(p)), f(p.net["stem"](torch.cat([p.x2, p.x2.flip(0)])))
    return ((one.repeat(2, 1) - two).square().sum(1)).square().mean()


def teacher_of_another_view(f: nn.Module, p: Problem) -> Tensor:
    """The first call feeds a cross-entropy and, as a teacher without gradient, the second call's."""
    a, b = both(f, p)
    return CE(a, p.y) + CE(b, a.detach().softmax(1))


def call_without_gradient_first(f: nn.Module, p: Problem) -> Tensor:
    with torch.no_grad():
        targets = f(p.x).softmax(1)
    return CE(once(f, p), targets)


def call_left_unused(f: nn.Module, p: Problem) -> Tensor:
    f(p.x2)
    return head(f, p)


def tanh_of_norm(z: Tensor) -> Tensor:
    return torch.tanh(F.layer_norm(z, z.shape[-1:]))


def nested_three_times(f: nn.Module, p: Problem) -> Tensor:
    h = features(p)
    for _ in range(3):
        h = h + torch.tanh(f(h))
    return CE(h, p.y)


def recurrent(f: nn.Module, p: Problem) -> Tensor:
    """Every step's input depends on the last step's output."""
    h, losses = torch.zeros_like(p.tokens[:, 0]), []
    for t in range(p.tokens.shape[1]):
        h = torch.tanh(f(h) + p.tokens[:, t])
        losses.append(CE(h, p.y[:2]))
    return torch.stack(losses).mean()


def autoencoder(f: nn.Module, p: Problem) -> Tensor:
    """Decodes with the same matrix: kappa of the *module* sees the encoder only."""
    h = features(p)
    return F.mse_loss(F.linear(torch.tanh(f(h)), f.weight.T), h)


def written_in_place(f: nn.Module, p: Problem) -> Tensor:
    z = once(f, p)
    z[:, 0] = 0.3
    z[1] *= 2
    return CE(z, p.y)


def first_row_dropped(f: nn.Module, p: Problem) -> Tensor:
    """One sample's features are all zero."""
    h = features(p)
    return CE(f(h * (torch.arange(len(h), device=h.device) > 0)[:, None]), p.y)


def sequence_first(f: nn.Module, p: Problem) -> Tensor:
    """A non-contiguous input, samples along its second axis."""
    z = f(p.net["stem"](p.tokens).transpose(0, 1))
    return CE(torch.tanh(z.mean(0)), p.y[:2])


def checkpointed(f: nn.Module, p: Problem) -> Tensor:
    return CE(checkpoint(lambda x: f(p.net["stem"](x)), p.x, use_reentrant=False), p.y)


def one_token_in_place(f: nn.Module, p: Problem) -> Tensor:
    """An activation in place on a view of the output, which is a view itself."""
    z = f(p.tokens)
    z[:, 0].relu_()
    return CE(z.flatten(0, 1), p.y.repeat(2)[:6])


def written_into_a_buffer(f: nn.Module, p: Problem) -> Tensor:
    buffer = torch.zeros_like(once(f, p))
    buffer[p.kept] = once(f, p)[p.kept]
    return CE(buffer, p.y)


def called_with_another_weight(f: nn.Module, p: Problem) -> Tensor:
    return CE(torch.func.functional_call(f, {"weight": 2 * f.weight}, (features(p),)), p.y)


def straight_through(f: nn.Module, p: Problem) -> Tensor:
    """Rounded outputs, with the gradient of what was rounded."""
    z = once(f, p)
    return CE(z + (z.round() - z).detach(), p.y)


def log_probabilities_squared(f: nn.Module, p: Problem) -> Tensor:
    """Products of log-probabilities with themselves: bilinear operations, and yet not linear."""
    log_p = once(f, p).log_softmax(1)
    return (log_p @ log_p.T).sum()


def inner_gradient_step(f: nn.Module, p: Problem) -> Tensor:
    """The loss after a step of another weight on the gradient of an inner loss (MAML)."""
    bias = f.bias
    (slope,) = torch.autograd.grad(head(f, p), bias, create_graph=True)
    return CE(p.target + bias - 0.5 * slope, p.y2)


# What one layer's calls can be used for.
CALLS: dict[str, Callable[[nn.Module, Problem], Tensor]] = {
    "siamese_contrastive": lambda f, p: pairs(*both(f, p), p),
    "siamese_pairs_shuffled": lambda f, p: pairs(once(f, p), both(f, p)[1].flip(0), p),
    "siamese_unequal_views": unequal_views,
    "siamese_similarity_matrix": lambda f, p: contrastive(torch.cat(both(f, p))),
    "siamese_concatenated_ce": lambda f, p: CE(torch.cat(both(f, p)), torch.cat([p.y, p.y2])),
    "siamese_logits_averaged": lambda f, p: CE(torch.stack(both(f, p)).mean(0), p.y),
    "siamese_two_ces": lambda f, p: CE(once(f, p), p.y) + 0.5 * CE(f(p.x2), p.y2),
    "siamese_product_of_ces": lambda f, p: CE(both(f, p)[0], p.y) * CE(both(f, p)[1], p.y2),
    "siamese_gate": lambda f, p: (per_row(both(f, p)[0], p) * both(f, p)[1].sigmoid().mean(1)).mean(),
    "siamese_teacher_learns_too": lambda f, p: CE(both(f, p)[1], both(f, p)[0].softmax(1)),
    "calls_of_different_shape": lambda f, p: head(f, p) + f(p.tokens).tanh().square().mean(),
    "call_left_unused": call_left_unused,
    "call_by_keyword": lambda f, p: CE(f(input=features(p)), p.y),
    "call_on_expanded_input": lambda f, p: CE(f(features(p)[:1].expand(4, -1)), p.y),
    "call_on_sequence_first": sequence_first,
    "call_inside_checkpoint": checkpointed,
    "weight_used_elsewhere": autoencoder,
    "weight_used_in_the_tail": lambda f, p: CE(torch.tanh(once(f, p)) @ f.weight, p.y),
    "gated_by_itself": lambda f, p: CE(once(f, p) * torch.sigmoid(once(f, p).flip(1)), p.y),
    "weights_from_features": lambda f, p: (features(p)[:, 0].sigmoid() * per_row(once(f, p), p)).mean(),
    "targets_from_features": lambda f, p: CE(once(f, p), features(p)[:, :3].exp()),
    "bias_from_features": lambda f, p: CE(once(f, p) + features(p)[:, :3], p.y),
    "probabilities_averaged": lambda f, p: F.nll_loss(f(p.tokens).softmax(-1).mean(1).log(), p.y[:2]),
    "ce_of_the_first_row": lambda f, p: CE(once(f, p)[0], p.y[0]),
    "ce_of_confident_logits": lambda f, p: CE(f(20 * features(p)), p.y),
    "ce_in_double_precision": lambda f, p: CE(once(f, p).double(), p.y),
    "first_row_dropped": first_row_dropped,
    "half_of_the_batch_detached": lambda f, p: CE(torch.cat([once(f, p)[:2].detach(), once(f, p)[2:]]), p.y),
    "written_in_place": written_in_place,
    "one_token_in_place": one_token_in_place,
    "written_into_a_buffer": written_into_a_buffer,
    "called_with_another_weight": called_with_another_weight,
    "tokens_unbound": lambda f, p: torch.stack([CE(z, p.y[:2]) for z in f(p.tokens).unbind(1)]).sum(),
    "ce_of_transposed_rows": lambda f, p: CE(once(f, p)[:3].T, p.y[:3]),
    "ce_weighted_by_the_weight": lambda f, p: CE(once(f, p), p.y) * f.weight.square().sum(),
    "ce_deviation": lambda f, p: CE(once(f, p), p.y) + per_row(once(f, p), p).std(),
    "log_softmax_twice": lambda f, p: F.nll_loss(once(f, p).log_softmax(1).log_softmax(1), p.y),
    "log_probabilities_squared": log_probabilities_squared,
    "log_probabilities_or_logits": lambda f, p: per_row(once(f, p), p).where(once(f, p)[:, 0] > 0, 0).mean(),
    "inner_gradient_step": inner_gradient_step,
}
DETACHED: dict[str, Callable[[nn.Module, Problem], Tensor]] = {
    "straight_through": straight_through,
    "siamese_stop_gradient": lambda f, p: -F.cosine_similarity(both(f, p)[0], both(f, p)[1].detach()).mean(),
    "siamese_teacher_detached": teacher_of_another_view,
    "call_without_gradient_first": call_without_gradient_first,
}
NESTED: dict[str, Callable[[nn.Module, Problem], Tensor]] = {
    "nested_mse": lambda f, p: F.mse_loss(f(torch.tanh(once(f, p))), p.target),
    "nested_ce": lambda f, p: CE(f(torch.tanh(once(f, p))), p.y),
    "nested_ce_on_both": lambda f, p: CE(f(torch.tanh(once(f, p))), p.y) + CE(once(f, p), p.y2),
    "nested_linear": lambda f, p: (f(f(features(p))) * p.target).sum(),
    "nested_three_times": nested_three_times,
    "nested_layer_norm": lambda f, p: F.mse_loss(tanh_of_norm(f(tanh_of_norm(f(features(p))))), p.target),
    "nested_layer_norm_ce": lambda f, p: CE(f(tanh_of_norm(f(tanh_of_norm(once(f, p))))), p.y),
    "recurrent": recurrent,
}
DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "zero_weight": torch.zeros_like,
    "identity_weight": lambda w: torch.eye(*w.shape),
    "orthogonal_weight": lambda w: nn.init.orthogonal_(w.detach().clone()),
    "rank_one_weight": lambda w: torch.outer(torch.randn(w.shape[0]), torch.randn(w.shape[1])),
}


def with_weight(init: Callable[[Tensor], Tensor]) -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(init(layer.weight))
    return layer


def frozen(run: Callable[[nn.Module, Problem], Tensor], *names: str) -> Problem:
    """The named parts take no gradient; what is left does."""
    problem = calls(run)
    for name, parameter in problem.net.named_parameters():
        parameter.requires_grad_(not name.startswith(names))
    return problem


def chain(*modules: nn.Module, x: Tensor, loss: Callable[[Tensor, Problem], Tensor]) -> Problem:
    """A network whose layers are all asked for."""
    net = nn.Sequential(*modules)
    layers = [module for module in net if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        data = data_for(*net(x).shape)
    return Problem(net, layers, lambda p: loss(p.net(p.x), p), x=x, **data)


def three_layers(loss: Callable[[Tensor, Problem], Tensor]) -> Problem:
    body = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 3)
    return chain(*body, x=torch.randn(4, 3), loss=loss)


def convolution_and_head() -> Problem:
    body = nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    return chain(*body, x=torch.randn(3, 1, 3, 3), loss=lambda z, p: CE(z, p.y))


def frozen_body() -> Problem:
    body = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)
    problem = chain(*body, x=torch.randn(4, 3), loss=lambda z, p: CE(z, p.y))
    problem.layers = problem.layers[:1]
    problem.net[0].requires_grad_(False)
    return problem


def bare(run: Callable[[nn.Module, Problem], Tensor], layer: nn.Module | None = None) -> Problem:
    """The layer's weight as a bare parameter: every use of it counts."""
    problem = calls(run, layer)
    problem.layers = (problem.layers[0].weight,)
    return problem


def bare_attention_output() -> Problem:
    """nn.MultiheadAttention never calls its out_proj as a module."""
    net = nn.MultiheadAttention(3, 1, batch_first=True)

    def run(p: Problem) -> Tensor:
        return CE(p.net(p.x, p.x, p.x, need_weights=True)[0].flatten(0, 1), p.y)

    return Problem(net, [net.out_proj.weight], run, x=torch.randn(2, 2, 3), **data_for(4, 3))


def module_and_parameter() -> Problem:
    problem = three_layers(lambda z, p: F.mse_loss(z, p.target))
    problem.layers = (problem.net[0], problem.net[2].weight)
    return problem


def tied_embedding() -> Problem:
    """A language model whose head is its embedding: kappa of the head sees the head's use alone."""
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 5, bias=False))
    net[3].weight = net[0].weight

    def run(p: Problem) -> Tensor:
        return CE(p.net(p.tokens)[:, :-1].reshape(-1, 5), p.tokens[:, 1:].reshape(-1))

    return Problem(net, [net[3]], run, tokens=torch.randint(5, (2, 4)))


def output_size_chosen_by_the_call() -> Problem:
    layer = nn.ConvTranspose1d(2, 2, 3, stride=2, padding=1)

    def run(p: Problem) -> Tensor:
        return F.mse_loss(torch.tanh(p.net(p.x, output_size=[4])), p.target)

    return Problem(layer, [layer], run, x=torch.randn(2, 2, 2), target=torch.randn(2, 2, 4))


class Block(nn.Module):
    """A transformer block, twice attended, with a classifier on the mean token."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(3))
        self.norm_first = norm_first

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attend, self.mlp, self.attend), strict=True):
            x = x + part(norm(x)) if self.norm_first else norm(x + part(x))
        return self.head(x.mean(1))

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0]

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def transformer(norm_first: bool) -> Problem:
    net = Block(norm_first)
    return Problem(net, [net.up], lambda p: CE(p.net(p.x), p.y), x=torch.randn(2, 3, 4), **data_for(2, 3))


def special() -> list[Case]:
    cases = [Case(name, lambda run=run: calls(run)) for name, run in CALLS.items()]
    cases += [
        Case(name, lambda run=run: calls(run), finite_differences=False) for name, run in DETACHED.items()
    ]
    cases += [Case(name, lambda run=run: calls(run, nn.Linear(3, 3))) for name, run in NESTED.items()]
    cases += [
        Case(f"{name}-{loss}", lambda init=init, run=run: calls(run, with_weight(init)))
        for name, init in DEGENERATE.items()
        for loss, run in (
            ("ce", head),
            ("pairs", CALLS["siamese_contrastive"]),
            ("gate", CALLS["gated_by_itself"]),
        )
    ]
    only_full = ("full",)
    return [
        *cases,
        Case("three_layers-ce", lambda: three_layers(lambda z, p: CE(z, p.y))),
        Case("three_layers-mse", lambda: three_layers(lambda z, p: F.mse_loss(z, p.target))),
        Case("three_layers-contrastive", lambda: three_layers(lambda z, p: contrastive(z))),
        Case("convolution_and_head", convolution_and_head),
        Case("tied_embedding", tied_embedding),
        Case("output_size_chosen_by_the_call", output_size_chosen_by_the_call),
        Case("transformer_norm_first", lambda: transformer(norm_first=True)),
        Case("transformer_norm_last", lambda: transformer(norm_first=False)),
        Case("frozen_layer", lambda: frozen(head, "layer")),
        Case("frozen_layer_not_last", lambda: frozen(CALLS["gated_by_itself"], "layer")),
        Case("frozen_stem", lambda: frozen(head, "stem")),
        Case("frozen_all_but_the_bias", lambda: frozen(head, "stem", "layer.weight")),
        Case("frozen_body_trained_head", frozen_body),
        Case("bare_parameter", lambda: bare(head), modes=only_full),
        Case("bare_parameter_used_twice", lambda: bare(autoencoder), modes=only_full),
        Case("bare_parameter_nested", lambda: bare(NESTED["nested_mse"], nn.Linear(4, 4)), modes=only_full),
        Case("bare_parameter_attention_output", bare_attention_output, modes=only_full),
        Case("module_and_bare_parameter", module_and_parameter, modes=only_full),
    ]


SPECIAL = special()


# ------------------------------------------------------------------------------------------ changes


@dataclass(frozen=True)
class Change:
    """A loss whose curvature has another structure at each setting of a knob, and its graph the same.

    Attributes:
        run: the loss, of the layer and the problem, which has the setting as `problem.knob`.
        settings: in the order in which a training meets them.
        undifferentiable: for each setting, whether torch lacks a third derivative.
    """

    name: str
    run: Callable[[nn.Module, Problem], Tensor] = field(repr=False)
    settings: tuple[Any, ...] = field(repr=False)
    undifferentiable: tuple[bool, ...] = (False,) * 4

    def problem(self) -> Problem:
        return seeded_by(self.name, lambda: calls(self.run, nn.Linear(4, 4))).double()


def scalars(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.float64) for v in values)


def ce_and_contrastive(z: Tensor, p: Problem) -> Tensor:
    return CE(z, p.y) + p.knob * contrastive(z)


def coupled(f: nn.Module, p: Problem) -> Tensor:
    z = once(f, p)
    return torch.tanh(z + p.knob * z.mean(0))


def normed(f: nn.Module, p: Problem) -> Tensor:
    z = once(f, p)
    return F.batch_norm(z, torch.zeros_like(z[0]), torch.full_like(z[0], 0.7), training=p.knob)


def attended(f: nn.Module, p: Problem) -> Tensor:
    z = f(p.net["stem"](p.tokens))
    return attend(z, z, z, attn_mask=p.knob).flatten(0, 1)


EYE, FIRST, SHUFFLED = torch.eye(4, dtype=torch.float64), torch.arange(4), torch.tensor([2, 0, 3, 1])
ENTRIES, ALL = torch.arange(16), torch.ones(3, 3, dtype=torch.bool)
MASK = ALL.tril()

CHANGES = [
    Change("contrastive_joins", lambda f, p: head(f, p) + p.knob * contrastive(once(f, p)), scalars(0, 1, 0)),
    Change("contrastive_joins_on_one_call", lambda f, p: ce_and_contrastive(once(f, p), p), scalars(0, 1, 0)),
    Change("temperature", lambda f, p: CE(once(f, p) / p.knob, p.y), scalars(1, 2, 1)),
    Change("focal_gamma", lambda f, p: focal(once(f, p), p, p.knob), scalars(0, 2, 0)),
    Change("coupling_under_ce", lambda f, p: CE(coupled(f, p), p.y), scalars(0, 0.5, 0)),
    Change("coupling_under_mse", lambda f, p: F.mse_loss(coupled(f, p), p.target), scalars(0, 0.5, 1e-6)),
    Change("prior", lambda f, p: CE(once(f, p) + p.knob, p.y), (0 * FIRST, 1.0 * FIRST, 0 * FIRST)),
    Change("batch_norm", lambda f, p: CE(normed(f, p), p.y), (False, True, False), (False, True, False)),
    Change("attention_mask", lambda f, p: CE(attended(f, p), p.y.repeat(2)[:6]), (MASK & MASK.T, ALL, MASK)),
    Change("softmax_axis", lambda f, p: -(once(f, p).log_softmax(p.knob) * p.soft).sum(), (1, 0, 1)),
    Change("class_order", lambda f, p: CE(once(f, p)[:, p.knob], p.y), (FIRST, SHUFFLED, FIRST // 2)),
    Change("row_order", lambda f, p: CE(once(f, p)[p.knob], p.y), (FIRST, SHUFFLED, FIRST // 2)),
    Change("entry_order", lambda f, p: CE(once(f, p).view(-1)[p.knob].view(4, 4), p.y),
           (ENTRIES, ENTRIES.view(4, 4).T.flatten(), ENTRIES.roll(1))),
    Change("matrix_on_classes", lambda f, p: CE(once(f, p) @ p.knob, p.y), (EYE, EYE.flip(0), 2 * EYE, EYE)),
    Change("matrix_on_rows", lambda f, p: CE(p.knob @ once(f, p), p.y), (EYE, EYE.flip(0), EYE + 0.5, EYE)),
    Change("transposed", lambda f, p: CE(once(f, p).transpose(0, p.knob), p.y), (0, 1, 0)),
    Change("pairs", lambda f, p: F.softplus(once(f, p) - once(f, p).roll(p.knob, 0)).mean(), (0, 1, 2)),
]  # fmt: skip
