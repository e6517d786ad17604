"""Mixed precision: kappa and its gradient keep their digits where activations or parameters have few.

The oracle evaluates the same network in float64, on the parameters and activations as rounded by the
low precision: every module's result is moved to the rounded value, and differentiated as if it had not
been. What the two disagree in is then the arithmetic of the derivatives alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fam_optim import FAM, observe, relative_flatness, unnoticed
from tests import reference
from tests.support import Batch, assert_same, crossed, samples, seeded

LOW = [torch.bfloat16, torch.float16]
TOLERANCE = 1e-2
LAM = 0.01
SCALE = 2.0**16
"""Of a GradScaler at its start. float16 cannot do without; bfloat16 has no need of it."""


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Setting(NamedTuple):
    """A network with data, and where its regularised layers are."""

    net: nn.Sequential
    x: Tensor
    y: Tensor
    layers: tuple[int, ...]


# Activations whose derivative is computed from their input: tanh's is, from its output, as 1 - y^2, which
# at bfloat16's y has no digits left in saturation, the loss's own gradient included.
def mlp() -> Setting:
    net = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 12), nn.ELU(), nn.Linear(12, 4))
    y = torch.arange(256) % 4
    return Setting(net, 2 * torch.randn(4, 5)[y] + 0.3 * torch.randn(256, 5), y, (0, 2, 4))


def normalised() -> Setting:
    net = nn.Sequential(
        nn.Linear(5, 24), nn.LayerNorm(24, elementwise_affine=False), nn.Softplus(), nn.Linear(24, 4)
    )
    y = torch.arange(256) % 4
    return Setting(net, 2 * torch.randn(4, 5)[y] + 0.3 * torch.randn(256, 5), y, (0, 3))


def convolutional() -> Setting:
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ELU(), nn.Conv2d(4, 6, 2), nn.Softplus(), nn.Flatten(), nn.Linear(24, 4)
    )
    y = torch.arange(128) % 4
    return Setting(net, 2 * torch.randn(4, 1, 5, 5)[y] + 0.3 * torch.randn(128, 1, 5, 5), y, (2, 5))


NETWORKS = {"mlp": mlp, "layer norm": normalised, "conv": convolutional}


@cache
def trained(network: str, surplus: float) -> Setting:
    """Trained until ``1 - p`` of the right class is `surplus` for most samples."""
    setting = seeded(NETWORKS[network])
    optimizer = torch.optim.Adam(setting.net.parameters(), lr=1e-2)
    for _ in range(5000):
        z = setting.net(setting.x)
        p = z.double().softmax(1)[torch.arange(len(setting.y)), setting.y]
        if (1 - p).median() < surplus:
            return setting
        optimizer.zero_grad()
        F.cross_entropy(z, setting.y).backward()
        optimizer.step()
    raise AssertionError(f"{network} did not get sure enough: 1 - p is {(1 - p).median():.1e}")


class InDouble(nn.Module):
    """`net` in float64: its parameters and every activation are those of a low-precision forward."""

    def __init__(self, net: nn.Sequential, dtype: torch.dtype, activations: list[Tensor]) -> None:
        super().__init__()
        self.net, self.activations = copy.deepcopy(net).to(dtype).double(), activations

    def forward(self, x: Tensor) -> Tensor:
        x = self.activations[0]
        for module, activation in zip(self.net, self.activations[1:], strict=True):
            x = module(x)
            x = x + (activation - x.detach())  # that value, this derivative
        return x


class Run(NamedTuple):
    """kappa and its gradient, and the activations it was computed at, the input first."""

    kappa: Tensor
    gradient: list[Tensor]
    activations: list[Tensor]


def probes(mode: str) -> dict[str, Any]:
    if mode == "exact":
        return {}
    return {"n_samples": 2, "generator": torch.Generator().manual_seed(5)}


LossFunction = Callable[[Tensor, Tensor], Tensor]


def in_low_precision(
    setting: Setting, index: int, dtype: torch.dtype, mode: str, loss_fn: LossFunction, parameters_too: bool
) -> Run:
    net = copy.deepcopy(setting.net)
    if parameters_too:
        net = net.to(dtype)
    autocast: AbstractContextManager[Any] = nullcontext() if parameters_too else torch.autocast("cpu", dtype)
    with observe(net[index]) as layer, autocast:
        activations = [setting.x.to(dtype)]
        for module in net:
            activations.append(module(activations[-1]))
        loss = loss_fn(activations[-1], setting.y)
    kappa = relative_flatness(loss, layer, mode=mode, **probes(mode))
    assert kappa.dtype == torch.float32
    scale = LAM * (SCALE if dtype == torch.float16 else 1.0) / max(1.0, kappa.item())
    (scale * kappa).backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.double() / scale for p in net.parameters()]
    return Run(kappa.detach(), gradient, [a.detach().double() for a in activations])


def in_double(
    setting: Setting, index: int, dtype: torch.dtype, mode: str, loss_fn: LossFunction, at: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """kappa and its gradient at these activations: by brute force, or for hutchinson from the same probes."""
    twin = InDouble(setting.net, dtype, at)
    layer = twin.net[index]
    if mode == "hutchinson":
        with observe(layer) as observed:
            loss = loss_fn(twin(setting.x), setting.y)
        kappa = relative_flatness(loss, observed, mode=mode, **probes(mode))
    else:
        curvatures = reference.curvatures(
            lambda: loss_fn(twin(setting.x), setting.y), [layer], create_graph=True
        )
        kappa = reference.sum_of_kappas(curvatures, "neuronwise")
    return kappa.detach(), reference.gradient(kappa, list(twin.net.parameters()))


def check(
    setting: Setting, index: int, dtype: torch.dtype, mode: str, loss_fn: LossFunction, parameters_too: bool
) -> None:
    got = in_low_precision(setting, index, dtype, mode, loss_fn, parameters_too)
    kappa, gradient = in_double(setting, index, dtype, mode, loss_fn, got.activations)
    what = f"{setting.net[index]}, {mode}, {name(dtype)}"
    error = abs(got.kappa.item() / kappa.item() - 1)
    assert error <= TOLERANCE, f"{what}: kappa is {got.kappa:.5g}, expected {kappa:.5g}, error {error:.1e}"
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    errors = [((g - w).norm() / norm).item() for g, w in zip(got.gradient, gradient, strict=True)]
    assert max(errors) <= TOLERANCE, f"{what}: the gradient's errors, parameter by parameter: {errors}"


@pytest.mark.parametrize(
    ("network", "mode", "dtype", "parameters_too", "surplus"),
    crossed(NETWORKS, ["exact", "hutchinson"], LOW, [False, True], [0.5, 1e-2, 1e-4], by=3),
)
def test_kappa_keeps_its_digits(
    network: str, mode: str, dtype: torch.dtype, parameters_too: bool, surplus: float
) -> None:
    setting = trained(network, surplus)
    for index in setting.layers:
        check(setting, index, dtype, mode, F.cross_entropy, parameters_too)


@pytest.mark.parametrize("surplus", [0.5, 1e-4])
@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_many_classes_keep_their_digits(
    dtype: torch.dtype, surplus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed form has two ways; the other tests are small, and take that for few classes."""
    monkeypatch.setattr("fam_optim.estimators.measure.SMALL", 0)
    setting = trained("mlp", surplus)
    check(setting, setting.layers[-1], dtype, "exact", F.cross_entropy, parameters_too=False)


def steep(z: Tensor, y: Tensor) -> Tensor:
    """Multiplied by what suits a mean over a batch, its derivatives overflow."""
    return 1000 * F.cross_entropy(z, y, reduction="sum")


def fitted(z: Tensor, y: Tensor) -> Tensor:
    """A regression that fits perfectly: no gradient to tell the size of the curvature from."""
    return 50 * F.mse_loss(z, z.detach(), reduction="sum")


def tiny(z: Tensor, y: Tensor) -> Tensor:
    """Not a scalar, but one number, which is as good."""
    return 1e-5 * F.cross_entropy(z, y).reshape(1)


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    """Every row interacts with every other."""
    few = z[:6].float()
    return F.cross_entropy(few @ few.T / 8, torch.arange(6).flip(0)) + 0 * z.float().sum()


@pytest.mark.parametrize("loss_fn", [steep, fitted, tiny], ids=lambda f: f.__name__)
@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_neither_overflow_nor_underflow(dtype: torch.dtype, mode: str, loss_fn: LossFunction) -> None:
    setting = trained("mlp", 1e-2)
    for index in setting.layers[:-1]:
        check(setting, index, dtype, mode, loss_fn, parameters_too=False)


@pytest.mark.parametrize("mode", ["exact", "hutchinson"])
@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_activations_whose_squares_overflow(dtype: torch.dtype, mode: str) -> None:
    """LayerNorm brings them back, and its derivatives are written out here: not in half precision."""
    setting = trained("layer norm", 0.5)
    setting = setting._replace(net=copy.deepcopy(setting.net))
    with torch.no_grad():
        setting.net[0].weight.mul_(300)
        setting.net[0].bias.mul_(300)
    assert setting.net[0](setting.x).square().max() > torch.finfo(torch.float16).max
    check(setting, 0, dtype, mode, F.cross_entropy, parameters_too=False)


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_rows_that_interact_are_seen(dtype: torch.dtype) -> None:
    setting = trained("mlp", 0.5)
    setting = setting._replace(x=setting.x[:6], y=setting.y[:6])
    check(setting, 0, dtype, "exact", contrastive, parameters_too=False)


@pytest.mark.parametrize("dtype", LOW, ids=name)
def test_rows_that_do_not_interact_are_seen(dtype: torch.dtype) -> None:
    """If low precision hid it, so wide a layer would take more products than are allowed, and raise."""
    net = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    setting = Setting(net, torch.randn(300, 5), torch.arange(300) % 4, (2,))
    kappa = in_low_precision(setting, 2, dtype, "exact", F.cross_entropy, parameters_too=False).kappa
    with observe(net[2]) as layer:
        loss = F.cross_entropy(net(setting.x), setting.y)
    wanted = relative_flatness(loss, layer)
    assert abs(kappa / wanted - 1).item() <= TOLERANCE


# ---------------------------------------------------------------------------------------- GradScaler


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
}


def build(base: str, dtype: torch.dtype = torch.float64, layer: int = 2) -> tuple[nn.Sequential, FAM]:
    net = seeded(lambda: nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 4)).to(dtype), 1)
    make, kwargs = BASES[base]
    return net, FAM(net.parameters(), make, net[layer], LAM, **kwargs)


def four_classes(step: int, dtype: torch.dtype = torch.float64) -> Batch:
    return samples(step, 16, classes=4, dtype=dtype)


def scaled_step(
    net: nn.Module, fam: FAM, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor, half: bool = False
) -> Tensor:
    fam.zero_grad()
    with torch.autocast("cpu", torch.float16, enabled=half):
        loss = F.cross_entropy(net(x), y)
    scaler.scale(fam.regularize(loss)).backward()
    scaler.step(fam)
    scaler.update()
    return loss


def last_kappa(fam: FAM) -> Tensor:
    assert fam.last_kappa is not None
    return fam.last_kappa


@pytest.mark.parametrize("base", BASES)
def test_scaler_scales_and_unscales_exactly_once(base: str) -> None:
    net, fam = build(base)
    plain, reference_fam = build(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    for step in range(5):
        scaled_step(net, fam, scaler, *four_classes(step))
        reference_fam.zero_grad()
        x, y = four_classes(step)
        reference_fam.regularize(F.cross_entropy(plain(x), y)).backward()
        reference_fam.step()
        assert_same(net, plain, f"after step {step} at scale {scaler.get_scale():g}")
        assert torch.equal(last_kappa(fam), last_kappa(reference_fam)), "last_kappa is not unscaled"
    assert scaler.get_scale() == 4 * SCALE


@pytest.mark.parametrize("base", BASES)
def test_unscaling_before_clipping(base: str) -> None:
    net, fam = build(base)
    plain, reference_fam = build(base)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        x, y = four_classes(step)
        fam.zero_grad()
        scaler.scale(fam.regularize(F.cross_entropy(net(x), y))).backward()
        scaler.unscale_(fam)
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(fam)
        scaler.update()
        reference_fam.zero_grad()
        reference_fam.regularize(F.cross_entropy(plain(x), y)).backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.1)) and norm > 0.1
        reference_fam.step()
        assert_same(net, plain, f"after step {step}")


@pytest.mark.parametrize("layer", [0, 2], ids=["general path", "softmax head"])
@pytest.mark.parametrize("base", BASES)
def test_an_overflow_skips_the_step_and_the_next_one_works(base: str, layer: int) -> None:
    """From a scale at which float16 overflows: as many steps are skipped as the scale takes to come down."""
    net, fam = build(base, torch.float32, layer)
    start = copy.deepcopy(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    kappas, skipped = [], 0
    while True:
        before = scaler.get_scale()
        scaled_step(net, fam, scaler, *four_classes(0, torch.float32), half=True)
        kappas.append(last_kappa(fam))
        if scaler.get_scale() == before:
            break
        skipped += 1
        assert_same(net, start, f"a skipped step at scale {before:g} moved the weights")
        assert not fam.state, "a skipped step left a state"
    assert skipped >= 3
    assert all(torch.equal(k, kappas[0]) for k in kappas), "last_kappa depends on the scale"
    assert torch.isfinite(kappas[0])
    # From here on as if nothing had happened.
    clean, clean_fam = build(base, torch.float32, layer)
    clean_scaler = torch.amp.GradScaler("cpu", init_scale=scaler.get_scale())
    scaled_step(clean, clean_fam, clean_scaler, *four_classes(0, torch.float32), half=True)
    assert_same(net, clean, "the first step that was taken")
    assert not torch.equal(net[0].weight, start[0].weight)
    scaled_step(net, fam, scaler, *four_classes(1, torch.float32), half=True)
    scaled_step(clean, clean_fam, clean_scaler, *four_classes(1, torch.float32), half=True)
    assert_same(net, clean, "the step after it")


def test_a_batch_with_an_inf_is_skipped() -> None:
    net, fam = build("Adam")
    clean, clean_fam = build("Adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(4):
        x, y = four_classes(step)
        if step == 1:
            x = x.clone()
            x[3, 2] = math.inf
        loss = scaled_step(net, fam, scaler, x, y)
        if step == 1:
            assert not torch.isfinite(loss)
            continue
        clean_fam.zero_grad()
        clean_fam.regularize(F.cross_entropy(clean(x), y)).backward()
        clean_fam.step()
        assert_same(net, clean, f"after step {step}")


def test_two_optimizers_under_one_scaler() -> None:
    def build_two() -> tuple[nn.Sequential, FAM, FAM]:
        net, _ = build("SGD")
        body = FAM(net[0].parameters(), torch.optim.Adam, net[0], 0.1, lr=0.01)
        return net, body, FAM(net[2].parameters(), torch.optim.SGD, net[2], LAM, lr=0.1)

    net, body, head = build_two()
    plain, plain_body, plain_head = build_two()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(4):
        x, y = four_classes(step)
        if step == 2:
            x = x.clone()
            x[0] = math.inf
        net.zero_grad()
        scaler.scale(head.regularize(body.regularize(F.cross_entropy(net(x), y)))).backward()
        for fam in (body, head):
            scaler.step(fam)
        scaler.update()
        if step != 2:
            plain.zero_grad()
            plain_head.regularize(plain_body.regularize(F.cross_entropy(plain(x), y))).backward()
            for fam in (plain_body, plain_head):
                fam.step()
        assert_same(net, plain, f"after step {step}")
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.parametrize("parts", [1, 2], ids=["whole batch", "two micro-batches"])
def test_a_closure_that_scales_the_loss_itself(parts: int) -> None:
    """Unusual, since GradScaler.step takes no closure. kappa scales along, being linear in the loss."""
    net, fam = build("SGD")
    plain, reference_fam = build("SGD")
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for step in range(3):
        x, y = four_classes(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            fam.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = F.cross_entropy(net(xs), ys)
                scaler.scale(loss / parts).backward()
            scaler.unscale_(fam)
            return loss

        def plain_closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            reference_fam.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = F.cross_entropy(plain(xs), ys)
                (loss / parts).backward()
            return loss

        returned = fam.step(closure)
        scaler.update()
        assert torch.equal(returned, reference_fam.step(plain_closure))
        assert_same(net, plain, f"after step {step}")
        assert torch.equal(last_kappa(fam), last_kappa(reference_fam)), "last_kappa is not unscaled"


@pytest.mark.parametrize(
    "multiple", [lambda t: t * torch.tensor(SCALE), lambda t: 3 * t / 4], ids=["tensor", "number"]
)
def test_last_kappa_belongs_to_the_loss_that_is_returned(multiple: Callable[[Tensor], Tensor]) -> None:
    """Whatever multiple of it was backpropagated: whoever logs the two sees them in one unit."""
    x, y = four_classes(0)
    net, fam = build("SGD")
    fam.regularize(F.cross_entropy(net(x), y))
    expected = last_kappa(fam)

    def closure() -> Tensor:
        loss = F.cross_entropy(net(x), y)
        multiple(loss).backward()
        return loss

    net, fam = build("SGD")
    fam.step(closure)
    torch.testing.assert_close(last_kappa(fam), expected, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------ calling styles


@pytest.mark.parametrize("dtype", LOW, ids=name)
@pytest.mark.parametrize("layer", [0, 2], ids=["general path", "softmax head"])
def test_styles_agree_under_autocast(layer: int, dtype: torch.dtype) -> None:
    """Bit for bit where autocast spans the forward, as torch recommends; closely where it spans the step."""
    x, y = four_classes(0, torch.float32)
    updates = {}
    for style in ("regularize", "returns loss", "calls backward", "autocast around step"):
        net, _ = build("SGD", torch.float32)
        fam = FAM(net.parameters(), torch.optim.SGD, net[layer], LAM, lr=0.1)

        def forward(net: nn.Module = net) -> Tensor:
            with torch.autocast("cpu", dtype):
                return F.cross_entropy(net(x), y)

        def backward(forward: Callable[[], Tensor] = forward) -> Tensor:
            loss = forward()
            loss.backward()
            return loss

        if style == "regularize":
            fam.regularize(forward()).backward()
            fam.step()
        elif style == "returns loss":
            fam.step(forward)
        elif style == "calls backward":
            fam.step(backward)
        else:
            with torch.autocast("cpu", dtype):
                fam.step(lambda: F.cross_entropy(net(x), y))  # noqa: B023  # called at once
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
        updates[style] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert torch.equal(updates["regularize"], updates["returns loss"])
    assert torch.equal(updates["regularize"], updates["calls backward"])
    whole = updates["regularize"]
    assert (updates["autocast around step"] - whole).norm() <= TOLERANCE * whole.norm()


# ----------------------------------------------------------------------------- no host synchronisation


class NoReading(TorchDispatchMode):
    """Forbids what reads a number off the device: .item(), bool(tensor), a branch on a value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError("a tensor's value was read on the host")
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_a_reading() -> None:
    for read in (lambda t: t.item(), bool, float):
        with pytest.raises(AssertionError, match="read on the host"), NoReading():
            read(torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=name)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(
    ("layer", "mode"), [(4, "exact"), (2, "exact"), (0, "exact"), (2, "hutchinson"), (2, "full")]
)
def test_a_step_reads_nothing_on_the_host_once_its_tail_is_known(
    layer: int, mode: str, curvature: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unnoticed, "reading_waits", lambda tensor: True)  # as on an accelerator
    net = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 4))
    fam = FAM(net.parameters(), torch.optim.SGD, net[layer], LAM, mode, curvature=curvature, lr=0.1)
    x, y = four_classes(0, torch.float32)

    def closure() -> Tensor:
        fam.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return F.cross_entropy(net(x), y)

    fam.step(closure)
    before = net[0].weight.detach().clone()
    with NoReading():
        fam.step(closure)
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("mode", ["exact", "hutchinson", "full"])
def test_a_layer_in_lower_precision_than_the_loss(mode: str, curvature: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    double = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    mixed = copy.deepcopy(double)
    mixed[1].to(dtype)
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    for measure in ("neuronwise", "layerwise"):
        values = []
        for m in (double, mixed):
            with observe(m[1]) as layer:
                z = m[1](m[0](x).tanh().to(m[1].weight.dtype)).double().tanh()
                loss = F.cross_entropy(m[2](z), y)
            settings = {"mode": mode, "measure": measure, "generator": torch.Generator().manual_seed(0)}
            values.append(relative_flatness(loss, layer, curvature=curvature, **settings))
        assert values[1].dtype == torch.float64
        assert values[1].item() == pytest.approx(
            values[0].item(), rel=1e-5 if dtype == torch.float32 else 0.1
        )
