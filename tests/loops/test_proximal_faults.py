"""Proximal steps that once were wrong without a word: losses not trained on, other means, dead weights."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fam_optim import FAM, weight_layers
from fam_optim.estimators import roots
from tests import reference
from tests.loops.test_proximal_loops import by_regularize, fam, net, parameters, trained
from tests.support import assert_close, assert_same, samples, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def same_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn before: by the number of the outputs alone."""

    def draw(shape: Any, like: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        return (drawn < 0.5).to(like) * 2 - 1

    monkeypatch.setattr(roots, "rademacher", draw)


def loss_of(model: nn.Module, step: int, n: int = 16) -> Tensor:
    x, y = samples(step, n)
    return F.cross_entropy(model(x), y)


# ---------------------------------------------------------------------------- A of what was trained on


ZEROS: dict[str, Callable[[nn.Module, FAM], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "model": lambda model, optimizer: model.zero_grad(),
    "in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("first", ["zero_grad", "loss"])
@pytest.mark.usefixtures("same_signs")
def test_a_skipped_step_leaves_nothing_to_the_next(first: str, zero: str) -> None:
    """A batch of nan, say; whether gradients are zeroed before the loss is computed or after, and by whom."""
    results = []
    for skipped in (False, True):
        model = net()
        optimizer = fam(model, every=1, lam=0.0)
        for step in [0, 1, 2, 3] if skipped else [0, 2, 3]:
            optimizer.lam = float(step > 0)
            if first == "zero_grad":
                ZEROS[zero](model, optimizer)
            x, y = samples(step, 16)
            loss = F.cross_entropy(model(x * torch.nan if step == 1 else x), y)
            loss = optimizer.regularize(loss)
            if first == "loss":
                ZEROS["optimizer"](model, optimizer)
            (4 * loss if step == 1 else loss).backward()
            if step != 1:
                optimizer.step()
        results.append(model)
    assert_same(*results)


def test_a_micro_batch_that_is_not_backpropagated_does_not_count() -> None:
    results = []
    for dropped in (False, True):
        model = net()
        optimizer = fam(model, every=1)
        for step in (0, 1):
            optimizer.regularize(loss_of(model, step)).backward()
        if dropped:
            optimizer.regularize(loss_of(model, 2))
        optimizer.step()
        results.append(model)
    assert_same(*results)


@pytest.mark.parametrize("n", [4, 16])
def test_weights_of_micro_batches_after_regularize(n: int) -> None:
    """In rows and in the weights' gradient; a factor that all have in common is no weight."""
    one, other = net(), net()
    first, second = fam(one, every=1), fam(other, every=1)
    for step, weight in enumerate((0.9, 0.0, 0.1)):
        first.regularize(weight * loss_of(one, step, n)).backward()
        (8 * weight * second.regularize(loss_of(other, step, n))).backward()
    for p in other.parameters():
        p.grad /= 8
    first.step()
    second.step()
    assert_close(one, other)


@pytest.mark.parametrize("n", [4, 16])
def test_micro_batches_whose_gradients_are_asked_for_are_all_counted(n: int) -> None:
    """By torch.autograd.grad, which leaves none on the weights."""
    results = []
    for asked in (False, True):
        model = net()
        optimizer = fam(model, every=1)
        weights, sums = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]
        for step in (0, 1):
            loss = optimizer.regularize(loss_of(model, step, n))
            if asked:
                sums = [s + g for s, g in zip(sums, torch.autograd.grad(loss, weights), strict=True)]
            else:
                loss.backward()
        for p, total in zip(weights, sums, strict=True):
            p.grad = total if asked else p.grad
        optimizer.step()
        results.append(model)
    assert_same(*results)


@pytest.mark.usefixtures("same_signs")
def test_a_loss_that_is_backpropagated_twice_counts_twice() -> None:
    results = []
    for twice in (False, True):
        optimizer = fam(model := net(), every=1)
        first, second = (optimizer.regularize(loss_of(model, step)) for step in (0, 1))
        if twice:
            first.backward(retain_graph=True)
            first.backward()
        else:
            (2 * first).backward()
        second.backward()
        optimizer.step()
        results.append(model)
    assert_close(*results)


def test_a_loss_that_is_backpropagated_again_after_its_gradients_were_looked_at() -> None:
    """They are measured, zeroed, and made once more for the step."""
    results = []
    for looked_at in (False, True):
        optimizer = fam(model := net(), every=1)
        loss = optimizer.regularize(loss_of(model, 0))
        if looked_at:
            loss.backward(retain_graph=True)
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert optimizer.last_kappa is not None
        results.append(model)
    assert_same(*results)


def test_skipped_steps_pile_nothing_up() -> None:
    optimizer = fam(model := net(), every=1)
    counts = []
    for step in range(6):
        optimizer.zero_grad()
        loss = optimizer.regularize(loss_of(model, step))
        loss.backward()
        counts.append(matrices())
    assert counts[2] == counts[5]


@pytest.mark.parametrize("closure", [False, True])
def test_layers_may_be_frozen_at_first(closure: bool) -> None:
    """The head is trained before the body; nothing that stands still is moved."""
    optimizer = fam(model := net(), every=2)
    hidden = [w.parameter for w in optimizer.regularizer.weights]
    for step in range(4):
        for weight in hidden:
            weight.requires_grad_(step > 1)
        before = [weight.detach().clone() for weight in hidden]
        optimizer.zero_grad()
        if closure:
            optimizer.step(lambda step=step: loss_of(model, step))
        else:
            optimizer.regularize(loss_of(model, step)).backward()
            optimizer.step()
        moved = [not torch.equal(weight, old) for weight, old in zip(hidden, before, strict=True)]
        assert all(moved) if step > 1 else not any(moved)
        assert (optimizer.last_kappa is not None) == (step == 3)


def test_a_regularised_loss_that_is_maximised_is_refused() -> None:
    optimizer = fam(model := net(), every=1)
    loss = optimizer.regularize(loss_of(model, 0))
    with pytest.raises(RuntimeError, match=r"negative factor.*Regularise what is minimised"):
        (-loss).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_was_refused_is_refused_again() -> None:
    optimizer = fam(model := net(), every=1)
    loss = loss_of(model, 0).exp()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="known to be convex"):
            optimizer.regularize(loss)


def test_a_scaled_loss_has_the_kappa_of_the_loss() -> None:
    kappas = []
    for scale in (1.0, 1024.0):
        optimizer = fam(model := net(), every=1, lr=0.0)
        (scale * optimizer.regularize(loss_of(model, 0))).backward()
        optimizer.step()
        kappas.append(optimizer.last_kappa)
    assert torch.equal(*kappas)


@pytest.mark.usefixtures("same_signs")
def test_micro_batches_have_the_kappa_of_their_mean_wherever_they_are_divided() -> None:
    kappas = []
    for before in (True, False):
        optimizer = fam(model := net(), every=1, lr=1e-300)
        for batch in range(3):
            loss = loss_of(model, batch)
            (optimizer.regularize(loss / 3) if before else optimizer.regularize(loss) / 3).backward()
        optimizer.step()
        kappas.append([optimizer.last_kappa])
    assert_close(*kappas)


@pytest.mark.parametrize("n", [4, 16])
def test_inputs_may_be_overwritten_before_the_step(n: int) -> None:
    results = []
    for overwritten in (False, True):
        model = net()
        optimizer = fam(model, every=1)
        x, y = samples(0, n)
        optimizer.regularize(F.cross_entropy(model(x), y)).backward()
        if overwritten:
            x.zero_()
        optimizer.step()
        results.append(model)
    assert_same(*results)


@pytest.mark.parametrize("order", ["other first", "other last"])
def test_a_loss_without_its_curvature_is_refused_on_a_due_step(order: str) -> None:
    optimizer = fam(model := net(), every=2)
    for step in range(2):
        seen, other = optimizer.regularize(loss_of(model, step)), loss_of(model, step + 2)
        for loss in (other, seen) if order == "other first" else (seen, other):
            loss.backward()
        if step:
            with pytest.raises(RuntimeError, match="for every loss and micro-batch of a step"):
                optimizer.step()
        else:
            optimizer.step()


@pytest.mark.parametrize("mode", ["proximal", "exact"])
def test_a_backward_that_failed_does_not_hide_the_next(mode: str) -> None:
    """Neither alone nor before a regularised one; without it the step goes on."""

    def fail(gradient: Tensor) -> None:
        raise KeyError("lost")

    for others in ("none", "alone", "before"):
        model = net()
        every = {"every": 1} if mode == "proximal" else {}
        optimizer = FAM(model.parameters(), torch.optim.SGD, model[2], mode=mode, lr=0.1, **every)
        z = model[:2](samples(0, 16)[0])
        loss = optimizer.regularize(F.cross_entropy(model[2:](z), samples(0, 16)[1]))
        z.register_hook(fail)
        with pytest.raises(KeyError, match="lost"):
            loss.backward()
        model.zero_grad()
        if others != "none":
            loss_of(model, 1).backward()
        if others != "alone":
            optimizer.regularize(loss_of(model, 2)).backward()
        if others == "none":
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="are of a loss that was not regularised"):
                optimizer.step()


@pytest.mark.parametrize("how", ["checkpoint", "lam"])
def test_a_due_step_of_which_part_was_not_looked_at_is_refused(how: str) -> None:
    """A checkpoint is loaded, or lam no longer 0; with zeroed gradients, or with lam alone, it goes on."""
    for zeroed in (True, False):
        optimizer = fam(model := net(), every=1, lam=1.0 if how == "checkpoint" else 0.0)
        loss = loss_of(model, 0)
        (optimizer.regularize(loss) if how == "checkpoint" else loss).backward()
        if how == "checkpoint":
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.lam = 1.0
        if zeroed:
            optimizer.zero_grad()
        optimizer.regularize(loss_of(model, 1)).backward()
        if zeroed:
            optimizer.step()
            assert optimizer.last_kappa is not None
        else:
            with pytest.raises(RuntimeError, match=r"not regularised.*call optimizer\.zero_grad\(\) first"):
                optimizer.step()
    optimizer = fam(model := net(), every=1, lam=0.0, momentum=0.0)
    optimizer.regularize(loss_of(model, 0)).backward()
    optimizer.lam = 1.0
    before = model[0].weight - 0.1 * model[0].weight.grad
    optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("zero", ZEROS)
def test_a_backward_whose_gradients_are_zeroed_is_nobodys_business(zero: str) -> None:
    """A generator's loss passes the discriminator; gradients that never are zeroed add up."""
    optimizer = fam(model := net(), every=1)
    for step in range(3):
        loss_of(model, step).backward()
        ZEROS[zero](model, optimizer)
        optimizer.regularize(loss_of(model, step)).backward()
        optimizer.step()
    optimizer.regularize(loss_of(model, 3)).backward()
    optimizer.step()


def matrices() -> int:
    gc.collect()
    return sum(type(t) is Tensor and t.dim() == 2 for t in gc.get_objects())


def test_losses_that_are_kept_do_not_keep_the_roots() -> None:
    model = net()
    optimizer = fam(model, every=1, momentum=0.0)
    losses, counts = [], []
    for step in range(4):
        optimizer.zero_grad()
        losses.append(optimizer.regularize(loss_of(model, step)))
        losses[-1].backward()
        optimizer.step()
        counts.append(matrices())
    assert counts[1] == counts[3]


@pytest.mark.usefixtures("same_signs")
def test_a_step_uses_up_its_curvature() -> None:
    """Also where gradients are kept: the next due step's is that of its own losses."""
    kappas = []
    for kept in (False, True):
        model = net()
        optimizer = fam(model, every=1, lr=1e-300)  # the weights stay as they are
        for step in (0, 1):
            if not kept:
                optimizer.zero_grad()
            optimizer.regularize(loss_of(model, step)).backward()
            optimizer.step()
        kappas.append([optimizer.last_kappa])
    assert_close(*kappas)


def test_terms_that_are_not_convex_may_be_added_in_a_closure() -> None:
    """The remedy that the refusal names: their curvature is left out."""
    results = []
    for how in ("regularize", "returned", "backward"):
        model = net()
        optimizer = fam(model, every=1)

        def total(model: nn.Module = model, optimizer: FAM = optimizer) -> Tensor:
            entropies = optimizer.regularize(loss_of(model, 0))
            return entropies + 1e-3 * sum(p.abs().sum() for p in model.parameters())

        def backpropagated(total: Callable[[], Tensor] = total) -> Tensor:
            total().backward()
            return torch.zeros(())

        if how == "regularize":
            total().backward()
            optimizer.step()
        else:
            optimizer.step(total if how == "returned" else backpropagated)
        results.append(model)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_loss_with_other_terms_says_what_to_do() -> None:
    optimizer = fam(model := net())
    with pytest.raises(RuntimeError, match=r"convex in the.*Give regularize\(\) the terms that are and add"):
        optimizer.regularize(loss_of(model, 0) + loss_of(model, 0).sqrt())


DECAYS: dict[str, Callable[[nn.Module], Tensor]] = {
    "scaled": lambda model: sum((0.5 * p).square().sum() for p in model.parameters()),
    "in one vector": lambda model: torch.cat([p.flatten() for p in model.parameters()]).square().sum(),
    "towards another point": lambda model: sum((p - 0.3).square().sum() for p in model.parameters()),
    "of parts": lambda model: sum(q.square().sum() for p in model.parameters() for q in p.chunk(2)),
    "of a slice": lambda model: model[0].weight[:2, 1:].square().sum(),
    "of means": lambda model: sum(p.mean(0).square().sum() for p in model.parameters()),
    "about their mean": lambda model: sum((p - p.mean()).square().sum() for p in model.parameters()),
    "of some entries": lambda model: sum(p.where(p > 0, 0.0).square().sum() for p in model.parameters()),
    "of what rows have in common": lambda model: sum(
        (w @ w.T - torch.eye(len(w))).square().sum() for w in (model[0].weight, F.normalize(model[2].weight))
    ),
    "as products": lambda model: sum((p * p).sum() for p in model.parameters()),
    "absolute values": lambda model: sum(p.abs().sum() for p in model.parameters()),
    "norms": lambda model: sum(p.norm() ** 2 + p.norm() for p in model.parameters()),
    "norms of rows": lambda model: model[0].weight.norm(dim=1).sum(),
    "a nuclear norm": lambda model: torch.linalg.matrix_norm(model[0].weight, "nuc"),
    "with importances": lambda model: sum(
        (p.detach().abs() * (p - 0.3) ** 2).sum() for p in model.parameters()
    ),
}


@pytest.mark.parametrize("name", DECAYS)
def test_weight_decay_in_the_loss_is_no_curvature_however_written(name: str) -> None:
    kappas = []
    for decay in (0.0, 0.1):
        optimizer = fam(model := net(), every=1, lr=0.0)
        optimizer.regularize(loss_of(model, 0) + decay * DECAYS[name](model)).backward()
        optimizer.step()
        kappas.append(float(optimizer.last_kappa))
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-12)


def test_squared_errors_of_embeddings_are_outputs() -> None:
    """Looked up, a parameter is what the network makes of its input."""
    table = seeded(lambda: nn.Parameter(torch.randn(6, 3)))
    optimizer = FAM([table], torch.optim.SGD, table, mode="proximal", every=1, lr=0.1)
    optimizer.regularize(
        (table[torch.tensor([0, 2])] - table[torch.tensor([1, 3])]).square().sum()
    ).backward()
    optimizer.step()
    assert float(optimizer.last_kappa) > 0


def test_a_transposed_weight_that_two_modules_share_keeps_its_rows() -> None:
    """As one parameter it would have a row for every input."""
    first, second = (nn.ConvTranspose1d(2, 4, 3, padding=1, groups=2) for _ in range(2))
    second.weight = first.weight
    model = seeded(lambda: nn.Sequential(first, nn.Conv1d(4, 2, 1), second, nn.Flatten(), nn.LazyLinear(3)))
    model(x := torch.randn(2, 2, 5))
    layers = weight_layers(model)
    assert layers[0] is first and len(layers) == 3
    optimizer = FAM(model.parameters(), torch.optim.SGD, layers[:-1], mode="proximal", every=1, lr=0.1)
    assert [(w.d, w.m) for w in optimizer.regularizer.weights] == [(4, 3), (2, 4)]
    optimizer.regularize(F.cross_entropy(model(x), torch.tensor([0, 2]))).backward()
    optimizer.step()
    assert float(optimizer.last_kappa) > 0
    fam = FAM(model.parameters(), torch.optim.SGD, first, mode="hutchinson", lr=0.1)
    with pytest.raises(RuntimeError, match=r"not observed.*shares the weight"):
        fam.regularize(F.cross_entropy(model(x), torch.tensor([0, 2])))


# ------------------------------------------------------------------------------------------ checkpoints


class Checkpointed(nn.Module):
    """What lies between the first layer and the loss runs again in every derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.middle, self.head = (
            nn.Linear(5, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        def behind(z: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.middle(self.norm(z)).tanh()), y)

        return checkpoint(behind, self.first(x), use_reentrant=False)


@pytest.mark.parametrize("n", [4, 16])
def test_batch_norm_counts_once_in_a_checkpoint_with_the_loss(n: int) -> None:
    model, plain = seeded(Checkpointed), seeded(Checkpointed)
    optimizer = fam(model, every=1)
    optimizer.regularize(model.loss(*samples(0, n))).backward()
    plain.loss(*samples(0, n)).backward()
    assert torch.equal(model.norm.num_batches_tracked, plain.norm.num_batches_tracked)
    assert torch.equal(model.norm.running_mean, plain.norm.running_mean)


def test_weights_hidden_in_a_reentrant_checkpoint_are_refused() -> None:
    """Some of the weights are in sight, so that nothing else would tell."""
    model = net()
    x, y = samples(0, 16)
    z = checkpoint(model[:2], x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"Linear\(in_features=5, out_features=6.*use_reentrant=False"):
        fam(model, every=1).regularize(F.cross_entropy(model[2:](z), y))


def test_a_loss_that_was_backpropagated_already_is_refused() -> None:
    model = net()
    loss = loss_of(model, 0)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backpropagated already: call regularize\(loss\)"):
        fam(model).regularize(loss)


# ------------------------------------------------------------------------------------------------ means


def wide() -> nn.Sequential:
    """Of its first weight the last four A are smaller than T, with one sample."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(5, 31), nn.Tanh(), nn.Linear(31, 7), nn.Tanh(), nn.Linear(7, 3))
    )


def test_a_root_that_does_not_count_leaves_the_mean() -> None:
    """Of a weight that is used by no sample, in either form of the mean, over five due steps."""
    model = wide()
    optimizer = fam(model, every=1)
    trained(model, optimizer, 5, n=64)
    means = copy.deepcopy(optimizer.regularizer.means.kept)
    assert means[0].shape == (31, 20) and means[1].shape == (7, 7)
    before = parameters(model)
    optimizer.zero_grad()
    optimizer.regularize(0.0 * loss_of(model, 5)).backward()
    optimizer.param_groups[0]["momentum"] = 0.0
    optimizer.step()
    assert all(torch.equal(mean, means[i]) for i, mean in optimizer.regularizer.means.kept.items())
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


@pytest.mark.parametrize("made, loaded", [(1, 2), (2, 1)])
def test_checkpoint_of_another_number_of_samples_is_refused(made: int, loaded: int) -> None:
    """Its means may be of the other form, T for the last A side by side."""
    model = wide()
    one, other = (
        FAM(
            model.parameters(),
            torch.optim.SGD,
            weight_layers(model)[:-1],
            mode="proximal",
            every=1,
            n_samples=n,
            lr=0.1,
        )
        for n in (made, loaded)
    )
    trained(model, one, 2, n=64)
    with pytest.raises(
        ValueError, match=r"same layers and n_samples.*layers and n_samples that it was saved"
    ):
        other.load_state_dict(one.state_dict())


def test_weights_may_change_their_precision() -> None:
    """The means follow: from here on it is the formula in the new precision."""
    model = net()
    optimizer = fam(model, every=1, momentum=0.0)
    trained(model, optimizer, 3)
    means = [optimizer.regularizer.means.kept[i] for i in range(2)]
    model.float()
    before = [layer.weight.detach().double() for layer in (model[0], model[2])]
    x, y = samples(3, 8, dtype=torch.float32)
    by_regularize(model, optimizer, x, y)
    for i, layer in enumerate((model[0], model[2])):
        mean = optimizer.regularizer.means.kept[i]
        assert mean.dtype == torch.float32 and not torch.equal(mean.double(), means[i])
        moved = before[i] - 0.1 * layer.weight.grad.double()
        right = reference.proximal(moved, before[i], mean.double(), 1.0, 1)
        assert torch.allclose(layer.weight.detach().double(), right, atol=1e-5)


class Single(nn.Linear):
    """Multiplies in another precision than its weight's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float()).double()


@pytest.mark.parametrize("n", [4, 16])
def test_products_in_another_precision_than_their_weights(n: int) -> None:
    results = []
    for kind in (nn.Linear, Single):
        model = net()
        model[0].__class__ = model[2].__class__ = kind
        trained(model, fam(model), 4, n=n)
        results.append(torch.cat([p.flatten() for p in parameters(model)]))
    assert torch.allclose(*results, rtol=0, atol=1e-5)
    assert not torch.equal(*results)


@pytest.mark.parametrize("saved", ["proximal", "hutchinson"])
def test_lam_of_another_kind_is_not_loaded(saved: str) -> None:
    """0.008 is a penalty's usual value, and next to nothing for a proximal step."""
    made = {}
    for mode in ("proximal", "hutchinson"):
        model = net()
        made[mode] = FAM(model.parameters(), torch.optim.SGD, model[0], mode=mode, lr=0.1, momentum=0.9)
        made[mode].step(lambda model=model: loss_of(model, 0))
    (other,) = made.keys() - {saved}
    lam, momentum = made[other].lam, made[saved].state_dict()["state"][0]["momentum_buffer"].clone()
    made[other].load_state_dict(made[saved].state_dict())
    assert made[other].lam == lam
    assert torch.equal(made[other].state_dict()["state"][0]["momentum_buffer"], momentum)


# ------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("which", ["all", "one", "longer", "longer in a copy"])
def test_parameters_that_were_replaced_are_told(which: str) -> None:
    model = net()
    optimizer = fam(model, every=1)
    trained(model, optimizer, 2)
    if which == "longer in a copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    if which == "all":
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    elif which == "one":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    else:
        optimizer.state.clear()
        for p, old in zip((model[0].weight, model[0].bias), parameters(model)[:2], strict=True):
            p.data, p.grad = torch.cat([old, old]), None
        model[2].weight.data = model[2].weight.detach().repeat(1, 2)
    with pytest.raises(RuntimeError, match=r"`layer` \w+.* was replaced or resized.*assign=True.*Build"):
        trained(model, optimizer, 1)


def test_parameters_may_be_swapped() -> None:
    """torch swaps no tensor to which there is a weak reference."""
    model = nn.ModuleList([nn.MultiheadAttention(6, 2), nn.Linear(6, 3)])
    weights = list(model.parameters())
    made = [
        FAM(model.parameters(), torch.optim.SGD, weight_layers(model), mode=mode, every=every, lr=0.1)
        for mode, every in (("proximal", 1), ("hutchinson", None))
    ]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p is w and p.dtype == torch.float32 for p, w in zip(model.parameters(), weights, strict=True))
    assert made


COMPUTED: dict[str, Callable[[Any], object]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_weights_that_come_to_be_computed_are_refused(how: str) -> None:
    model = net()
    optimizer = fam(model, every=2)
    COMPUTED[how](model[0])
    optimizer.regularize(loss_of(model, 0)).backward()
    optimizer.step()
    optimizer.regularize(loss_of(model, 1)).backward()
    with pytest.raises(TypeError, match="is computed at every call"):
        optimizer.step()


def test_no_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"at least one layer.*Name the layer"):
        FAM(model.parameters(), torch.optim.SGD, weight_layers(model)[:-1], mode="proximal", lr=0.1)


def test_complex_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, 5, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"a real weight.*torch\.complex128"):
        FAM([weight], torch.optim.SGD, weight, mode="proximal", lr=0.1)


# ---------------------------------------------------------------------------- W', where the base steps from


class MovesFirst(torch.optim.SGD):
    """Moves every weight, and then evaluates the closure and moves no more."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.1)
        return closure()


def test_a_base_that_moves_before_its_closure_has_moved() -> None:
    model = net()
    before = parameters(model)
    optimizer = FAM.for_model(model, MovesFirst, lr=0.1, every=1)
    optimizer.step(lambda: loss_of(model, 0))
    for i, (old, new) in enumerate(zip(before, parameters(model), strict=True)):
        pulled = i in (0, 2)  # the hidden layers' weights
        assert torch.allclose(new, old + 0.1) != pulled


def test_what_a_closure_does_to_weights_is_no_movement_of_the_base() -> None:
    """Clipping, say. A loop without a closure has the same W'."""
    results = []
    for by_closure in (False, True):
        model = net()
        optimizer = fam(model, every=1)

        def loss(model: nn.Module = model) -> Tensor:
            with torch.no_grad():
                model[0].weight.clamp_(-0.1, 0.1)  # type: ignore[index]
            return loss_of(model, 0)

        if by_closure:
            optimizer.step(loss)
        else:
            optimizer.regularize(loss()).backward()
            optimizer.step()
        results.append(model)
    assert_same(*results)
