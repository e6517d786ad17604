"""The proximal step in the loops that people have: what it must equal, leave alone, take and refuse."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from fam_optim import FAM, weight_layers
from tests.support import assert_same, samples, seeded

if TYPE_CHECKING:
    from collections.abc import Callable

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Its hidden weights are used by rows in batches of fewer than 6."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    ).to(dtype)


def fam(model: nn.Module, **settings: Any) -> FAM:
    return FAM.for_model(model, torch.optim.SGD, **{"every": 2, **SGD, **settings})


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def by_regularize(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    optimizer.regularize(loss).backward()
    optimizer.step()
    return loss


def by_loss(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    optimizer.zero_grad()
    return optimizer.step(lambda: F.cross_entropy(model(x), y))


def by_backward(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def by_autograd_backward(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        torch.autograd.backward([loss])
        return loss

    return optimizer.step(closure)


STYLES = [by_regularize, by_loss, by_backward, by_autograd_backward]


def trained(
    model: nn.Module, optimizer: Any, steps: int, style: Any = by_regularize, n: int = 8, first: int = 0
) -> nn.Module:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        style(model, optimizer, *samples(step, n, dtype=dtype))
    return model


# ---------------------------------------------------------------------------------------- the same step


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("style", STYLES[1:])
def test_styles_are_one_step(style: Any, n: int) -> None:
    torch.manual_seed(0)
    one, other = net(), net()
    trained(one, fam(one), 7, n=n)
    trained(other, fam(other), 7, style, n=n)
    assert_same(one, other)


def test_step_returns_the_plain_loss() -> None:
    x, y = samples(0, 8, dtype=torch.float64)
    for style in STYLES:
        model = net()
        optimizer = fam(model, every=1)
        wanted = F.cross_entropy(model(x), y).item()
        assert style(model, optimizer, x, y).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("n, parts", [(8, 2), (8, 4), (4, 2), (24, 3)])
def test_accumulation_is_the_whole_batch(n: int, parts: int) -> None:
    """With the same signs, whichever form the parts or the whole would take by themselves."""
    whole, split = net(), net()
    one, several = fam(whole), fam(split)
    for step in range(6):
        x, y = samples(step, n, dtype=torch.float64)
        by_regularize(whole, one, x, y)
        several.zero_grad()
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            several.regularize(F.cross_entropy(split(a), b) / parts).backward()
        several.step()
        for p, q in zip(whole.parameters(), split.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_losses_may_be_stacked_before_one_backward() -> None:
    whole, split = net(), net()
    one, several = fam(whole, every=1), fam(split, every=1)
    x, y = samples(0, 16, dtype=torch.float64)
    by_regularize(whole, one, x, y)
    losses = [several.regularize(F.cross_entropy(split(x[i]), y[i]) / 2) for i in (slice(8), slice(8, 16))]
    torch.stack(losses).sum().backward()
    several.step()
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_a_loss_is_taken_once() -> None:
    """Regularised in a closure that backpropagates it, or regularised twice."""
    results = []
    for how in ("once", "in a closure", "twice"):
        model = net()
        optimizer = fam(model, every=1)
        x, y = samples(0, 16, dtype=torch.float64)

        def loss(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(model(x), y)

        if how == "in a closure":
            optimizer.step(lambda o=optimizer, loss=loss: o.regularize(loss()).backward())
        else:
            regularized = optimizer.regularize(loss())
            (optimizer.regularize(regularized) if how == "twice" else regularized).backward()
            optimizer.step()
        results.append(model)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_zeroing_between_the_loss_and_its_backward() -> None:
    one, other = net(), net()
    trained(one, fam(one), 4)
    optimizer = fam(other)
    for step in range(4):
        loss = optimizer.regularize(
            F.cross_entropy(other((b := samples(step, 8, dtype=torch.float64))[0]), b[1])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(one, other)


# ---------------------------------------------------------------------------------------- bookkeeping


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("wide", [False, True])
def test_resumes_bit_for_bit(n: int, wide: bool) -> None:
    """From any step; `wide` has a weight of which the last four A are smaller than T."""

    def make() -> nn.Sequential:
        model = net()
        if wide:
            model[0] = seeded(lambda: nn.Linear(5, 31)).double()
            model[2] = seeded(lambda: nn.Linear(31, 7)).double()
        return model

    straight = make()
    trained(straight, fam(straight), 13, n=n)
    model = make()
    optimizer = fam(model)
    trained(model, optimizer, 7, n=n)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = make()
    torch.manual_seed(99)  # the seed comes from the checkpoint
    again = fam(resumed, lam=0.1)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    trained(resumed, again, 6, n=n, first=7)
    assert_same(straight, resumed)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(how: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = fam(model)
    trained(model, optimizer, 5)
    copied, its_optimizer = how((model, optimizer))
    trained(model, optimizer, 4, first=5)
    trained(copied, its_optimizer, 4, first=5)
    assert_same(model, copied)
    assert not {id(p) for p in model.parameters()} & {
        id(w.parameter) for w in its_optimizer.regularizer.weights
    }


def test_checkpoints_of_the_plain_base() -> None:
    model = net()
    plain = torch.optim.SGD(model.parameters(), **SGD)
    by = lambda: F.cross_entropy(model(torch.ones(2, 5).double()), torch.tensor([0, 1])).backward()  # noqa: E731
    by()
    plain.step()
    optimizer = fam(model)
    optimizer.load_state_dict(plain.state_dict())
    for a, b in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    trained(model, optimizer, 3)
    plain.load_state_dict({k: v for k, v in optimizer.state_dict().items() if k in ("state", "param_groups")})
    torch.optim.SGD(model.parameters(), lr=1.0).load_state_dict(optimizer.state_dict())


def test_checkpoint_of_other_layers_is_refused() -> None:
    model = net()
    optimizer = fam(model)
    trained(model, optimizer, 2)
    other = FAM(model.parameters(), torch.optim.SGD, model[4], mode="proximal", lr=0.1)
    with pytest.raises(ValueError, match="same layers"):
        other.load_state_dict(optimizer.state_dict())


def test_global_random_numbers_are_not_drawn() -> None:
    model = net()
    optimizer = fam(model, every=1)
    x, y = samples(0, 8, dtype=torch.float64)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    by_regularize(model, optimizer, x, y)
    assert torch.equal(state, torch.get_rng_state())


def test_generator_gives_the_seed() -> None:
    results = []
    for seed in (1, 1, 2):
        model = net()
        layers = weight_layers(model)[:-1]
        generator = torch.Generator().manual_seed(seed)
        optimizer = FAM(
            model.parameters(), torch.optim.SGD, layers, mode="proximal", every=1, generator=generator, **SGD
        )
        results.append(parameters(trained(model, optimizer, 3)))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_schedulers_clipping_and_groups() -> None:
    """A group of its own learning rate, a frozen group (lr 0): as far as the loss moves each."""
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}]
    optimizer = FAM.for_model(model, torch.optim.SGD, params=groups, lr=0.1, every=1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    frozen, free = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        x, y = samples(step, 8, dtype=torch.float64)
        optimizer.regularize(F.cross_entropy(model(x), y)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[2].weight, free)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1 / 8)


def test_pull_is_as_far_as_the_learning_rate_moves() -> None:
    distances = []
    for lr in (0.1, 0.001):
        moved = []
        for lam in (0.0, 1e-3):
            model = net()
            optimizer = FAM.for_model(model, torch.optim.SGD, lam=lam, every=1, lr=lr)
            by_regularize(model, optimizer, *samples(0, 16, dtype=torch.float64))
            moved.append(model[0].weight.detach())
        distances.append((moved[0] - moved[1]).norm().item())
    assert distances[0] / distances[1] == pytest.approx(100, rel=0.05)


def test_two_on_one_model() -> None:
    model = net()
    first = FAM([*model[0].parameters()], torch.optim.SGD, model[0], mode="proximal", every=1, lr=0.1)
    second = FAM([*model[2:].parameters()], torch.optim.SGD, model[2], mode="proximal", every=1, lr=0.1)
    before = parameters(model)
    x, y = samples(0, 8, dtype=torch.float64)
    second.regularize(first.regularize(F.cross_entropy(model(x), y))).backward()
    first.step()
    second.step()
    assert first.last_kappa is not None and second.last_kappa is not None
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


def test_nothing_stays_on_the_model() -> None:
    model = net(torch.float32)
    optimizer = fam(model, every=1)
    trained(model, optimizer, 2)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
    for p in model.parameters():
        assert not p._backward_hooks and set(vars(p)) == set()
    assert torch.jit.script(model)(torch.ones(1, 5)).shape == (1, 3)
    assert pickle.loads(pickle.dumps(model))(torch.ones(1, 5)).shape == (1, 3)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert quantised(torch.ones(1, 5)).shape == (1, 3)


# --------------------------------------------------------------------------------- weights not used


def test_layer_drop_and_alternating_tasks() -> None:
    trunk, a, b = (seeded(lambda: nn.Linear(5, 5)).double() for _ in range(3))
    everything = nn.ModuleList([trunk, a, b])
    optimizer = FAM(
        everything.parameters(),
        torch.optim.SGD,
        [trunk, a, b],
        mode="proximal",
        every=1,
        lr=0.1,
        momentum=0.9,
    )
    plain = FAM(
        (twin := copy.deepcopy(everything)).parameters(), torch.optim.SGD, list(twin), 0.0, "proximal", **SGD
    )
    for step in range(4):
        x, y = samples(step, 9, dtype=torch.float64)
        for modules, used in ((everything, optimizer), (twin, plain)):
            used.zero_grad()
            head = modules[1 + step % 2]
            used.regularize(F.cross_entropy(head(modules[0](x).tanh()), y)).backward()
            used.step()
        if step == 0:  # b has not been used yet, and moves in neither
            assert torch.equal(everything[2].weight, twin[2].weight)
            assert not torch.equal(everything[1].weight, twin[1].weight)


class Experts(nn.Module):
    """Each row goes through the one expert that its router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(5, 3), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 6)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]).tanh() * share[rows, None])
        return self.head(out)


def test_experts_without_tokens_are_left_alone() -> None:
    model = seeded(Experts).double()
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([5.0, 5.0, -50.0]))
    before = [expert.weight.detach().clone() for expert in model.experts]
    optimizer = fam(model, every=1, weight_decay=0.1)
    plain = copy.deepcopy(model)
    base = torch.optim.SGD(plain.parameters(), weight_decay=0.1, **SGD)
    x, y = samples(0, 12, dtype=torch.float64)
    by_regularize(model, optimizer, x, y)
    F.cross_entropy(plain(x), y).backward()
    base.step()
    assert torch.equal(model.experts[2].weight, plain.experts[2].weight)
    assert not torch.equal(model.experts[0].weight, plain.experts[0].weight)
    assert not torch.equal(model.experts[2].weight, before[2])  # the base's decay


# ------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_curvature(dtype: torch.dtype) -> None:
    """Of sure predictions too, whose A would underflow in float16."""
    kappas = {}
    for enabled in (False, True):
        model = net(torch.float32)
        with torch.no_grad():
            model[4].weight.mul_(12)
        optimizer = fam(model, every=1)
        x, _ = samples(0, 512, dtype=torch.float32)
        y = model(x).argmax(1)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        optimizer.regularize(loss).backward()
        optimizer.step()
        kappas[enabled] = float(optimizer.last_kappa)
        assert all(p.isfinite().all() for p in model.parameters())
    assert kappas[True] == pytest.approx(kappas[False], rel=0.1)
    assert kappas[True] > 0


def test_imprecise_products_round_only_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TF32 does on a GPU: a weight that the base leaves alone stays as it is, to the last bit."""
    precise = torch.Tensor.__matmul__

    def imprecise(a: Tensor, b: Tensor) -> Tensor:
        return precise(a.bfloat16(), b.bfloat16()).to(a)

    model = net(torch.float32)
    groups = [{"params": model[:2].parameters(), "lr": 0.0}, {"params": model[2:].parameters()}]
    optimizer = fam(model, every=1, params=groups)
    before = parameters(model)
    for x, y in (samples(step, 16, dtype=torch.float32) for step in range(3)):
        optimizer.zero_grad()
        optimizer.regularize(F.cross_entropy(model(x), y)).backward()
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "__matmul__", imprecise)
            optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])


def test_micro_batches_under_autocast_are_put_together_in_full_precision() -> None:
    """Four of two samples have rows of their own at first, and more rows than outputs in the end."""
    weights = []
    for within in (False, True):
        model = net(torch.float32)
        optimizer = fam(model, every=1)
        for x, y in (samples(part, 2, dtype=torch.float32) for part in range(4)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y) / 4
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
                optimizer.regularize(loss)
            loss.backward()
        optimizer.step()
        weights.append(parameters(model))
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize("n", [4, 16])
def test_a_step_under_autocast_moves_in_full_precision(n: int) -> None:
    """With a closure, the whole step is often made in the context that the forward needs."""
    weights = []
    for within in (False, True):
        model = net(torch.float32)
        optimizer = fam(model, every=1)
        for step in range(3):
            x, y = samples(step, n, dtype=torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = optimizer.regularize(F.cross_entropy(model(x), y))
            loss.backward()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
                optimizer.step()
        weights.append(parameters(model))
    assert all(map(torch.equal, *weights))


def test_a_step_that_a_scaler_skips_neither_counts_nor_moves() -> None:
    model = net(torch.float32)
    optimizer = fam(model, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = samples(0, 8, dtype=torch.float32)
    before = parameters(model)
    optimizer.zero_grad()
    scaler.scale(optimizer.regularize(F.cross_entropy(model(x), y))).backward()
    model[4].weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
    assert optimizer.regularizer.steps == 0

    twin = net(torch.float32)
    other = fam(twin, every=1)
    for one, its in ((model, optimizer), (twin, other)):
        its.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(its.regularize(F.cross_entropy(one(x), y))).backward()
        scaler.step(its)
        scaler.update()
    assert_same(model, twin)  # what was taken with the skipped step is forgotten
    assert optimizer.regularizer.steps == 1


def test_bfloat16_weights() -> None:
    model = net(torch.bfloat16)
    optimizer = fam(model, every=1)
    x, y = samples(0, 16, dtype=torch.bfloat16)
    by_regularize(model, optimizer, x, y)
    assert model[0].weight.dtype == torch.bfloat16
    assert optimizer.regularizer.means.kept[0].dtype == torch.float32


def test_a_root_that_is_not_finite_is_no_step() -> None:
    model, plain = net(), net()
    optimizer = fam(model, every=1, weight_decay=0.1)
    base = torch.optim.SGD(plain.parameters(), weight_decay=0.1, **SGD)
    trained(model, optimizer, 2)
    plain.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    base.load_state_dict({k: v for k, v in state.items() if k in ("state", "param_groups")})
    x, y = samples(5, 8, dtype=torch.float64)

    def spoilt(module: nn.Module) -> Tensor:
        z = module[:2](x)
        if module is model and optimizer.regularizer._ledger is not None:
            z.register_hook(lambda g: g * torch.inf if spoil[0] else g)
        return F.cross_entropy(module[2:](z), y)

    spoil = [True]
    optimizer.zero_grad()
    loss = optimizer.regularize(spoilt(model))
    spoil[0] = False
    loss.backward()
    optimizer.step()
    base.zero_grad()
    spoilt(plain).backward()
    base.step()
    assert torch.equal(model[0].weight, plain[0].weight)
    assert not torch.equal(model[2].weight, plain[2].weight)
    mean = optimizer.regularizer.means.kept[0]
    assert mean.isfinite().all() and mean.any()


# ----------------------------------------------------------------------------------------- taken


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.rnn, self.head = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.body(x)[:, None])[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)[:, None].expand(-1, 3, -1)
        return self.head(self.attention(z, z, z, need_weights=False)[0].mean(1))


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)),
    "inplace": lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "recurrent": Recurrent,
    "attention": Attention,
    "once differentiable": lambda: nn.Sequential(
        nn.Linear(5, 6),
        type("Half", (nn.Module,), {"forward": lambda self, x: Halved.apply(x)})(),
        nn.Linear(6, 3),
    ),
}


def assert_pulled_along_its_trace(model: nn.Module, loss_of: Callable[[], Tensor], **settings: Any) -> None:
    """A due step makes all hidden weights that have curvature shorter along T, and leaves the others."""
    optimizer = fam(model, every=1, lr=1e-3, **settings)
    optimizer.regularize(loss_of()).backward()
    proximal = optimizer.regularizer
    after: list[Tensor] = []
    original = proximal.after_step

    def spy() -> None:
        after.extend(w.of(w.parameter).detach().clone() for w in proximal.weights)
        original()

    proximal.after_step = spy  # type: ignore[method-assign]
    optimizer.step()
    assert float(optimizer.last_kappa) > 0
    moved = 0
    for w, old in zip(proximal.weights, after, strict=True):
        new = w.of(w.parameter).detach()
        assert new.isfinite().all()
        assert new.norm() <= old.norm() * (1 + 1e-6)
        moved += not torch.equal(new, old)
    assert moved


@pytest.mark.parametrize("name", TAKEN)
def test_takes_what_has_one_derivative(name: str) -> None:
    model = seeded(TAKEN[name])
    x, y = samples(0, 16, dtype=torch.float32)
    assert_pulled_along_its_trace(model, lambda: F.cross_entropy(model(x), y))


def test_fused_attention() -> None:
    model = seeded(Attention)
    x, y = samples(0, 16, dtype=torch.float32)

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.cross_entropy(model(x), y)

    assert_pulled_along_its_trace(model, loss)


@pytest.mark.slow
def test_compiled_model_with_the_loss_outside() -> None:
    model = net(torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=True):
        one, other = fam(model), fam(twin := net(torch.float32))
        assert not torch._functorch.config.donated_buffer  # before anything is compiled, some of it at once
        for step, n in enumerate((16, 11, 16, 16, 16, 11, 13, 16)):  # another size is compiled anew
            x, y = samples(step, n, dtype=torch.float32)
            by_regularize(compiled, one, x, y)
            by_regularize(twin, other, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5)
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=True):
        F.cross_entropy(compiled(x), y).backward()
        late = fam(model, every=2)
        by_regularize(model, late, x, y)
        for optimizer in (late, fam(model)):  # whose step is due, and whose is the first
            with pytest.raises(RuntimeError, match=r"two backwards.*torch.compiler.reset\(\) after building"):
                by_regularize(compiled, optimizer, x, y)
        torch.compiler.reset()
        by_regularize(compiled, late, x, y)
    whole = torch.compile(lambda: F.cross_entropy(model(x), y), backend="aot_eager")
    with pytest.raises(RuntimeError, match="Compute the loss outside of what is compiled"):
        fam(model).regularize(whole())


@pytest.mark.parametrize("reentrant", [False])
def test_batch_norm_in_a_checkpoint_counts_as_without(reentrant: bool) -> None:
    def train(every: int | None) -> nn.BatchNorm1d:
        model = seeded(
            lambda: nn.Sequential(
                nn.Linear(5, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Tanh()), nn.Linear(6, 3)
            )
        )
        optimizer: Any = fam(model, every=1) if every else torch.optim.SGD(model.parameters(), **SGD)
        x, y = samples(0, 8, dtype=torch.float32)
        z = checkpoint(model[1], model[0](x), use_reentrant=reentrant)
        loss = F.cross_entropy(model[2](z), y)
        (optimizer.regularize(loss) if every else loss).backward()
        optimizer.step()
        return model[1][0]

    plain, with_fam = train(None), train(1)
    assert plain.num_batches_tracked == with_fam.num_batches_tracked
    assert torch.equal(plain.running_mean, with_fam.running_mean)


def test_tied_and_shared_weights_count_every_use() -> None:
    model = net()
    model[2] = nn.Linear(6, 6).double()
    model.insert(3, model[2])
    model[5] = nn.Linear(6, 3).double()
    optimizer = FAM(model.parameters(), torch.optim.SGD, model[2], mode="proximal", every=1, lr=1e-3)
    x, y = samples(0, 3, dtype=torch.float64)  # few rows, but two uses: the weight's gradient
    by_regularize(model, optimizer, x, y)
    assert 0 in optimizer.regularizer.means.kept


# --------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "make", [lambda m: parametrizations.weight_norm(m), lambda m: prune.l1_unstructured(m, "weight", 0.5)]
)
def test_computed_weights_are_refused(make: Callable[[nn.Module], Any]) -> None:
    model = net()
    make(model[0])
    with pytest.raises(TypeError, match=r"computed at every call.*Leave this layer out"):
        FAM(model.parameters(), torch.optim.SGD, model[0], mode="proximal", lr=0.1)


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LBFGS.*another base optimizer"):
        FAM.for_model(net(), torch.optim.LBFGS, lr=0.1)


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "measure": ({"measure": "neuronwise"}, "measure='neuronwise' with mode='proximal'"),
    "normalize": ({"normalize": False}, "normalize=False"),
    "detach_hessian": ({"detach_hessian": True}, "detach_hessian=True"),
    "curvature": ({"curvature": "hessian"}, "curvature='hessian'"),
    "every": ({"every": 0}, "`every` to be a positive integer, got 0"),
    "n_samples": ({"n_samples": 0}, "`n_samples` to be a positive integer, got 0"),
    "lam": ({"lam": -1.0}, "`lam` to be finite and at least 0, got -1"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_without_a_meaning_are_refused(name: str) -> None:
    settings, message = ARGUMENTS[name]
    model = net()
    with pytest.raises(ValueError, match=message):
        FAM(model.parameters(), torch.optim.SGD, model[0], mode="proximal", lr=0.1, **settings)


def test_gauss_newton_may_be_said() -> None:
    model = net()
    FAM(model.parameters(), torch.optim.SGD, model[0], mode="proximal", curvature="gauss_newton", lr=0.1)


def test_every_is_refused_with_a_penalty() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"`every` with mode='proximal' alone"):
        FAM(model.parameters(), torch.optim.SGD, model[4], every=10, lr=0.1)


def test_an_unknown_loss_is_refused_at_the_first_call() -> None:
    model = net()
    optimizer = fam(model, every=10)
    with pytest.raises(RuntimeError, match="convex in the network's outputs"):
        optimizer.regularize(model(torch.ones(2, 5).double()).sin().sum())


def test_negative_weights_of_samples_are_refused() -> None:
    model = net()
    x, y = samples(0, 8, dtype=torch.float64)
    weights = torch.linspace(-0.1, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="negative weight"):
        fam(model, every=1).regularize((F.cross_entropy(model(x), y, reduction="none") * weights).sum())


def test_weight_decay_in_the_loss_is_no_curvature() -> None:
    """It would make T a multiple of the identity, whose pull is that of more weight decay."""
    kappas = []
    x, y = samples(0, 8, dtype=torch.float64)
    for decay in (0.0, 0.1):
        model = net()
        optimizer = fam(model, every=1, lr=0.0)
        loss = F.cross_entropy(model(x), y) + decay * sum(p.square().sum() for p in model.parameters())
        optimizer.regularize(loss).backward()
        optimizer.step()
        kappas.append(optimizer.last_kappa.item())
    assert kappas[0] == pytest.approx(kappas[1], rel=1e-12)


def test_a_loss_without_a_graph_is_refused() -> None:
    """Whether a step is due or not: an evaluation must not fail once in ten times."""
    model = net()
    optimizer = fam(model, every=10)
    trained(model, optimizer, 1)
    with torch.no_grad():
        loss = F.cross_entropy(model(torch.ones(2, 5).double()), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="without a graph"):
        optimizer.regularize(loss)


def test_nothing_regularised_is_refused() -> None:
    model = net()
    optimizer = fam(model, every=1)
    x, y = samples(0, 8, dtype=torch.float64)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"regularize\(\) was not called"):
        optimizer.step()
    optimizer.regularize(F.cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="was not backpropagated"):
        optimizer.step()
    stranger = nn.Linear(5, 3).double()
    optimizer.zero_grad()
    fresh = fam(model, every=1)
    fresh.regularize(F.cross_entropy(stranger(x), y)).backward()
    with pytest.raises(RuntimeError, match="no loss so far depends on the weight"):
        fresh.step()


def test_a_closure_that_fails_changes_nothing() -> None:
    model = net()
    optimizer = fam(model, every=1)
    trained(model, optimizer, 2)
    before, steps = parameters(model), optimizer.regularizer.steps

    def closure() -> Tensor:
        optimizer.zero_grad()
        F.cross_entropy(model(torch.ones(2, 5).double()), torch.tensor([0, 1])).backward()
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
    assert optimizer.regularizer.steps == steps
    assert torch.autograd.backward.__module__ == "torch.autograd"
    other = net()
    other.load_state_dict(model.state_dict())
    trained(model, optimizer, 1, first=9)


def test_a_model_with_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two weight layers"):
        FAM.for_model(nn.Linear(3, 2), torch.optim.SGD, lr=0.1)


def test_repr_says_what_it_does() -> None:
    text = repr(fam(net()))
    assert "mode='proximal'" in text and "lam=1.0" in text and "every=2" in text and "Linear(" in text
