"""What kappa must not notice, and how it adds up: no oracle here but the theory.

Reparametrisations that leave the network's function as it is leave kappa as it is (Petzka et al. 2021),
the trace of the Hessian not. kappa is linear in the loss. On the last layer of a classifier it is not
negative; below it can be.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import dataset_relative_flatness, evaluation, observe, relative_flatness
from tests import reference

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-10
MODES, MEASURES = ("exact", "full"), reference.MEASURES


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def convolutional() -> nn.Sequential:
    layers = nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(*layers).double()


INPUTS: dict[Callable[[], nn.Sequential], tuple[int, ...]] = {perceptron: (6, 5), convolutional: (2, 1, 4, 4)}
networks = pytest.mark.parametrize("network", INPUTS, ids=lambda network: network.__name__)
measures = pytest.mark.parametrize("measure", MEASURES)
modes = pytest.mark.parametrize("mode", MODES)


def batch_for(network: Callable[[], nn.Sequential]) -> tuple[Tensor, Tensor]:
    shape = INPUTS[network]
    return torch.randn(shape, dtype=torch.float64), torch.randint(3, shape[:1])


def kappa_at(net: nn.Sequential, index: int, data: tuple[Tensor, Tensor], measure: str, mode: str) -> float:
    with observe(net[index]) as layer:
        loss = F.cross_entropy(net(data[0]), data[1])
    return relative_flatness(loss, layer, measure=measure, mode=mode).item()


def trace_at(net: nn.Sequential, index: int, data: tuple[Tensor, Tensor]) -> float:
    """Tr(H) = kappa_hat / ||W||^2."""
    square = net[index].weight.square().sum().item()
    return kappa_at(net, index, data, "layerwise", "full") / square


def check_equal(got: float, wanted: float, what: str) -> None:
    error = abs(got - wanted) / abs(wanted)
    assert error <= TOLERANCE, f"{what}: {got:.12g} and {wanted:.12g} differ by {error:.1e}"


def check_function(net: nn.Module, changed: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """The reparametrisation itself: it must not change what the network computes, but its weights."""
    difference = (net(data[0]) - changed(data[0])).abs().max().item()
    assert difference <= 1e-12, f"the outputs differ by {difference:.1e}: no reparametrisation"
    moved = (net[2].weight - changed[2].weight).abs().max().item()
    assert moved > 1e-3, "the weights are the same: nothing is tested"


# ------------------------------------------------------------------------------- reparametrisations


@torch.no_grad()
def rescaled(net: nn.Sequential, below: int, at: int, c: float) -> nn.Sequential:
    """The layer `below` times c, the layer `at` divided by it: what lies between is ReLU."""
    net = copy.deepcopy(net)
    for parameter in (net[below].weight, net[below].bias):
        parameter.mul_(c)
    net[at].weight.div_(c)
    return net


@modes
@measures
@pytest.mark.parametrize("c", [0.2, 7.0])
@networks
def test_rescaling_a_layer_against_the_one_below(
    network: Callable[[], nn.Sequential], c: float, measure: str, mode: str
) -> None:
    net, data = network(), batch_for(network)
    changed = rescaled(net, 0, 2, c)
    check_function(net, changed, data)
    for layer in (0, 2):
        before, after = (kappa_at(n, layer, data, measure, mode) for n in (net, changed))
        check_equal(after, before, f"kappa of layer {layer}, {measure}, {mode}")
    check_equal(
        trace_at(changed, 2, data), c**2 * trace_at(net, 2, data), "Tr(H), which must not be invariant"
    )


@modes
@networks
def test_rescaling_neurons_one_by_one(network: Callable[[], nn.Sequential], mode: str) -> None:
    """Each of the layer's neurons by its own factor, undone behind its ReLU: neuronwise kappa is blind to
    it (whence the name), layerwise is not."""
    net, data = network(), batch_for(network)
    changed = copy.deepcopy(net)
    at, behind = changed[2], changed[-1]
    factors = 0.3 + 3 * torch.rand(at.weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        at.weight.mul_(factors.reshape(-1, *[1] * (at.weight.dim() - 1)))
        at.bias.mul_(factors)
        behind.weight.div_(factors.repeat_interleave(behind.in_features // len(factors)))
    check_function(net, changed, data)
    before, after = (kappa_at(n, 2, data, "neuronwise", mode) for n in (net, changed))
    check_equal(after, before, f"neuronwise kappa, {mode}")
    before, after = (kappa_at(n, 2, data, "layerwise", mode) for n in (net, changed))
    assert abs(after - before) > 1e-3 * abs(before), f"layerwise kappa is {before:.6g} and {after:.6g}"


@modes
@measures
@networks
def test_permuting_hidden_neurons(network: Callable[[], nn.Sequential], measure: str, mode: str) -> None:
    net, data = network(), batch_for(network)
    changed = copy.deepcopy(net)
    below, at, behind = changed[0], changed[2], changed[-1]
    inputs, outputs = torch.randperm(below.weight.shape[0]), torch.randperm(at.weight.shape[0]).roll(1)
    entries = torch.arange(behind.in_features).reshape(len(outputs), -1)[outputs].flatten()
    with torch.no_grad():
        below.weight.copy_(below.weight[inputs])
        below.bias.copy_(below.bias[inputs])
        at.weight.copy_(at.weight[outputs][:, inputs])
        at.bias.copy_(at.bias[outputs])
        behind.weight.copy_(behind.weight[:, entries])
    check_function(net, changed, data)
    for layer in (0, 2, len(net) - 1):
        before, after = (kappa_at(n, layer, data, measure, mode) for n in (net, changed))
        check_equal(after, before, f"kappa of layer {layer}, {measure}, {mode}")


@modes
@measures
def test_rotating_the_layers_input(measure: str, mode: str) -> None:
    phi, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    before = kappa_at(net, 0, (phi, y), measure, mode)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight @ rotation.T)
    check_equal(kappa_at(net, 0, (phi @ rotation.T, y), measure, mode), before, f"{measure}, {mode}")


@modes
def test_kappa_is_the_expected_loss_under_relative_noise_on_the_input(mode: str) -> None:
    """kappa = sum_i ||phi_i||^2 Laplacian_{phi_i}(L): another second derivative, without the weights."""
    tail, phi, y = perceptron(), torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
    wanted = 0.0
    for i in range(len(phi)):

        def loss(row: Tensor, i: int = i) -> Tensor:
            return F.cross_entropy(tail(torch.cat([phi[:i], row[None], phi[i + 1 :]])), y)

        hessian = torch.autograd.functional.hessian(loss, phi[i])
        wanted += (phi[i].square().sum() * hessian.trace()).item()
    check_equal(kappa_at(tail, 0, (phi, y), "neuronwise", mode), wanted, mode)


# ---------------------------------------------------------------------------------------- linearity


@modes
@measures
@networks
def test_gradient_accumulation_adds_up_to_the_full_batch(
    network: Callable[[], nn.Sequential], measure: str, mode: str
) -> None:
    """Values, and what the penalty leaves in .grad."""
    net, (x, y) = network(), batch_for(network)
    parts = x.tensor_split([len(x) // 3 or 1]), y.tensor_split([len(x) // 3 or 1])

    def accumulated(batches: list[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
        net.zero_grad()
        total = 0.0
        for inputs, targets in batches:
            with observe(net[2]) as layer:
                loss = F.cross_entropy(net(inputs), targets, reduction="sum") / len(x)
            kappa = relative_flatness(loss, layer, measure=measure, mode=mode)
            kappa.backward()
            total += kappa.item()
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        return total, torch.cat([g.flatten() for g in gradients])

    whole, gradient = accumulated([(x, y)])
    added, added_gradient = accumulated(list(zip(*parts, strict=True)))
    check_equal(added, whole, f"{measure}, {mode}")
    error = ((added_gradient - gradient).norm() / gradient.norm()).item()
    assert error <= TOLERANCE, f"{measure}, {mode}: accumulated gradients differ by {error:.1e}"


@modes
@measures
@pytest.mark.parametrize("scale", [2.0**16, -0.5])
def test_scaling_the_loss_scales_kappa(scale: float, measure: str, mode: str) -> None:
    net, (x, y) = perceptron(), batch_for(perceptron)
    with observe(net[2]) as layer:
        loss = F.cross_entropy(net(x), y)
    once, scaled = (
        relative_flatness(value, layer, measure=measure, mode=mode).item() for value in (loss, scale * loss)
    )
    check_equal(scaled, scale * once, f"{measure}, {mode}")


@modes
@measures
def test_kappa_of_a_sum_of_losses_is_the_sum_of_kappas(measure: str, mode: str) -> None:
    net, (x, y) = perceptron(), batch_for(perceptron)
    with observe(net[2]) as layer:
        z = net(x)
        one, other = F.cross_entropy(z, y), z.square().prod(1).tanh().sum()
    kappas = [
        relative_flatness(loss, layer, measure=measure, mode=mode).item()
        for loss in (one, other, one + other)
    ]
    check_equal(kappas[2], kappas[0] + kappas[1], f"{measure}, {mode}")


# ----------------------------------------------------------------------------------------- data sets


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@modes
@measures
@pytest.mark.parametrize("size", [1, 4, 5, 6])
def test_kappa_of_a_data_set_is_that_of_its_full_batch(size: int, measure: str, mode: str) -> None:
    """Uneven last batches included: batches count by their sizes."""
    net, (x, y) = perceptron(), batch_for(perceptron)
    loader = batches(x, y, size)
    value = dataset_relative_flatness(net, net[2], F.cross_entropy, loader, measure=measure, mode=mode)
    assert not value.requires_grad
    check_equal(
        value.item(), kappa_at(net, 2, (x, y), measure, mode), f"{measure}, {mode}, batches of {size}"
    )


@modes
def test_kappa_of_a_data_set_is_that_of_the_evaluated_model(mode: str) -> None:
    """No dropout and no batch statistics; every module's mode is left as found, also where they differ."""
    norm, dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
    net = nn.Sequential(nn.Linear(5, 4), norm, nn.Tanh(), dropout, nn.Linear(4, 3)).double()
    x, y = batch_for(perceptron)
    net(x)  # running statistics of their own
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    wanted = kappa_at(net.eval(), 0, (x, y), "neuronwise", mode)
    net.train()
    dropout.eval()
    modes = [module.training for module in net.modules()]
    value = dataset_relative_flatness(net, net[0], F.cross_entropy, batches(x, y, 4), mode=mode)
    check_equal(value.item(), wanted, mode)
    assert [module.training for module in net.modules()] == modes
    changed = [name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])]
    assert not changed, f"buffers {changed} were updated"


class OfTokens(nn.Module):
    """Takes its inputs as a tokenizer gives them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.net(inputs["features"] * inputs["mask"])


def test_kappa_of_a_data_set_with_dicts_of_inputs() -> None:
    net, (x, y) = perceptron(), batch_for(perceptron)
    expected = kappa_at(net, 2, (x, y), "neuronwise", "exact")
    halves = (slice(4), slice(4, None))
    loader = [({"features": x[part], "mask": torch.ones(len(x[part]), 1)}, y[part]) for part in halves]
    value = dataset_relative_flatness(OfTokens(net), net[2], F.cross_entropy, loader)
    check_equal(value.item(), expected, "dicts")
    of_features = [({"features": x[part], "mask": torch.ones(5)}, y[part]) for part in halves]
    with pytest.raises(TypeError, match=r"one sample axis.*lengths \[4, 5\].*weight=lambda"):
        dataset_relative_flatness(OfTokens(net), net[2], F.cross_entropy, of_features)
    value = dataset_relative_flatness(
        OfTokens(net), net[2], F.cross_entropy, of_features, weight=lambda inputs, targets: len(targets)
    )
    check_equal(value.item(), expected, "dicts with a weight")
    moved = evaluation._mapped(lambda t: t.to("meta"), {"features": x, "more": {"mask": y}})
    assert moved["features"].is_meta and moved["more"]["mask"].is_meta


@measures
def test_kappa_of_a_data_set_by_probes(measure: str) -> None:
    """Reproducible, and right on average."""
    net, (x, y) = perceptron(), batch_for(perceptron)
    loader = batches(x, y, 4)

    def estimate(seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        options = {"mode": "hutchinson", "n_samples": 200, "measure": measure, "generator": generator}
        return dataset_relative_flatness(net, net[2], F.cross_entropy, loader, **options).item()

    first, again = estimate(0), estimate(0)
    assert first == again, f"{first} and {again} with the same seed"
    values = torch.tensor([estimate(seed) for seed in range(8)])
    wanted = kappa_at(net, 2, (x, y), measure, "exact")
    z = abs(values.mean().item() - wanted) / (values.std().item() / len(values) ** 0.5)
    assert z < 4, f"{measure}: mean {values.mean():.6g}, exact {wanted:.6g}, z = {z:.1f}"


# --------------------------------------------------------------------------------------------- sign


@modes
@measures
def test_kappa_of_a_classifiers_last_layer_is_not_negative(measure: str, mode: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        value = kappa_at(net, 2, batch_for(perceptron), measure, mode)
        assert value > 0, f"seed {seed}: {value:.6g}"


@modes
@measures
def test_kappa_of_a_convolution_before_tanh_can_be_negative(measure: str, mode: str) -> None:
    """H is indefinite below the last layer. Some of these networks must show it, and in all of them the
    library must agree with the definition about the sign."""
    signs = set()
    for seed in range(8):
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
        net = nn.Sequential(*layers).double()
        with torch.no_grad():
            net[0].weight.mul_(3)
        x, y = torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.randint(3, (4,))

        def loss(net: nn.Sequential = net, x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(net(x), y)

        wanted = reference.sum_of_kappas(reference.curvatures(loss, [net[0]]), measure).item()
        check_equal(kappa_at(net, 0, (x, y), measure, mode), wanted, f"seed {seed}, {measure}, {mode}")
        signs.add(wanted > 0)
    assert signs == {True, False}, "all of one sign: the networks do not show what they should"
