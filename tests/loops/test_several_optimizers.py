"""Several networks, losses or FAMs at once: each kappa is that of its own layer and of the plain loss."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import FAM, observe, relative_flatness
from tests.support import (
    LAM,
    ROUNDING,
    Net,
    assert_close,
    batch,
    penalised,
    set_gradients,
    true_kappa,
)

pytestmark = pytest.mark.usefixtures("float64")


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.maker = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 5))
            self.critic = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def critic_loss(self, x: Tensor, noise: Tensor) -> Tensor:
        real, fake = self.critic(x), self.critic(self.maker(noise).detach())
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def maker_loss(self, noise: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.maker(noise))).mean()


@pytest.mark.parametrize("style", ["returns loss", "calls backward", "regularize"])
def test_two_networks_two_losses(style: str) -> None:
    """As GANs are trained: the maker's loss runs through the critic, whose kappa is not its own."""
    gan, plain = Gan(), Gan()
    kwargs = {"lr": 0.05, "momentum": 0.5}
    fams = {
        "critic": FAM(gan.critic.parameters(), torch.optim.SGD, gan.critic[2], 0.1, **kwargs),
        "maker": FAM(gan.maker.parameters(), torch.optim.SGD, gan.maker[2], 0.02, **kwargs),
    }
    bases = {
        name: torch.optim.SGD(getattr(plain, name).parameters(), **kwargs) for name in ("critic", "maker")
    }
    for step in range(3):
        x, _ = batch(step)
        noise = torch.randn(8, 2)
        for name, lam in (("critic", 0.1), ("maker", 0.02)):
            fam = fams[name]

            def loss(of: Gan, name: str = name, x: Tensor = x, noise: Tensor = noise) -> Tensor:
                return of.critic_loss(x, noise) if name == "critic" else of.maker_loss(noise)

            def closure(fam: FAM = fam, loss: Callable[[Gan], Tensor] = loss) -> Tensor:
                fam.zero_grad()
                value = loss(gan)
                if style == "calls backward":
                    value.backward()
                return value

            if style == "regularize":
                fam.zero_grad()
                fam.regularize(loss(gan)).backward()
                fam.step()
            else:
                fam.step(closure)
            network = getattr(plain, name)
            kappa = true_kappa(lambda loss=loss: loss(plain), network[2])  # type: ignore[misc]
            set_gradients(loss(plain) + lam * kappa, network.parameters())
            bases[name].step()
            assert_close([fam.last_kappa], [kappa.detach()], f"kappa of the {name}", 1e-10)
        assert_close(gan.parameters(), plain.parameters(), f"weights after step {step}", 1e-10)


def test_losses_that_do_not_touch_the_layer_pass_through() -> None:
    """One closure, backward of two losses: only the one through the layer is regularised."""
    gan, plain = Gan(), Gan()
    x, _ = batch(0)
    noise = torch.randn(8, 2)
    everything = [*gan.critic.parameters(), *gan.maker.parameters()]
    fam = FAM(everything, torch.optim.SGD, gan.maker[2], 0.1, lr=0.1)

    def closure() -> None:
        fam.zero_grad()
        gan.critic_loss(x, noise).backward()
        gan.maker_loss(noise).backward()

    fam.step(closure)
    kappa = true_kappa(lambda: plain.maker_loss(noise), plain.maker[2])
    parameters = [*plain.critic.parameters(), *plain.maker.parameters()]
    set_gradients(plain.critic_loss(x, noise) + plain.maker_loss(noise) + 0.1 * kappa, parameters)
    torch.optim.SGD(parameters, lr=0.1).step()
    assert_close(everything, parameters, "weights", ROUNDING)


# --------------------------------------------------------------------------------------- several FAMs


def two_fams(model: Net) -> tuple[FAM, FAM]:
    """Of two layers, with their own weights of kappa, measures and bases."""
    body = FAM(model.body.parameters(), torch.optim.SGD, model.body[0], 0.1, lr=0.1)
    head = FAM(model.head.parameters(), torch.optim.SGD, model.head, 0.03, measure="layerwise", lr=0.2)
    return body, head


def two_penalties(model: Net, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    return loss(), true_kappa(loss, model.body[0]), true_kappa(loss, model.head, measure="layerwise")


NESTINGS = ["regularize", "the other way round", "closures that return", "closures that call backward"]


@pytest.mark.parametrize("nesting", NESTINGS)
def test_several_fams_on_one_model(nesting: str) -> None:
    """Each adds its own kappa, of the plain loss: one penalty is not regularised by another."""
    model, plain = Net(), Net()
    body, head = two_fams(model)
    for step in range(3):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            body.zero_grad()
            head.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if nesting == "closures that call backward":
                loss.backward()
            return loss

        if nesting.startswith("closures"):
            returned = body.step(lambda closure=closure: head.step(closure))
        else:
            returned = closure()
            first, second = (body, head) if nesting == "regularize" else (head, body)
            regularized = second.regularize(first.regularize(returned))
            assert second.regularize(first.regularize(regularized)) is regularized, "regularised twice"
            regularized.backward()
            first.step()
            second.step()
        loss, kappa_body, kappa_head = two_penalties(plain, x, y)
        set_gradients(loss + 0.1 * kappa_body + 0.03 * kappa_head, plain.parameters())
        torch.optim.SGD([{"params": plain.body.parameters(), "lr": 0.1}], lr=0.1).step()
        torch.optim.SGD([{"params": plain.head.parameters(), "lr": 0.2}], lr=0.1).step()
        assert_close([returned.detach()], [loss.detach()], "the plain loss", 1e-11)
        assert_close([body.last_kappa], [kappa_body.detach()], "kappa of the body", 1e-11)
        assert_close([head.last_kappa], [kappa_head.detach()], "kappa of the head", 1e-11)
        assert_close(model.parameters(), plain.parameters(), f"weights after step {step}", 1e-11)


def test_two_fams_of_the_same_layer() -> None:
    """One forward is recorded once and used twice, whichever steps first."""
    model, plain = Net(), Net()
    layers = [model.body[0], model.head]
    neuronwise = FAM(model.body.parameters(), torch.optim.SGD, model.body[0], 0.1, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the body is trained by the other
        layerwise = FAM(model.head.parameters(), torch.optim.SGD, layers, 0.01, measure="layerwise", lr=0.1)
    for step in range(2):
        x, y = batch(step)
        neuronwise.zero_grad()
        layerwise.zero_grad()
        kept = layerwise.regularize(neuronwise.regularize(F.cross_entropy(model(x), y)))
        kept.backward()
        neuronwise.step()
        layerwise.step()

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(plain(x), y)

        value = loss() + 0.1 * true_kappa(loss, plain.body[0])
        value = value + 0.01 * (
            true_kappa(loss, plain.body[0], measure="layerwise")
            + true_kappa(loss, plain.head, measure="layerwise")
        )
        set_gradients(value, plain.parameters())
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
        assert_close(model.parameters(), plain.parameters(), f"weights after step {step}", 1e-11)


def test_a_regularised_loss_that_was_changed_is_refused_by_another_fam() -> None:
    model = Net()
    body, head = two_fams(model)
    x, y = batch(0)
    changed = body.regularize(F.cross_entropy(model(x), y)) / 2
    with pytest.raises(RuntimeError, match=r"another FAM.*second.regularize\(first.regularize\(loss / k\)\)"):
        head.regularize(changed)
    # The remedy of the message.
    head.regularize(body.regularize(F.cross_entropy(model(x), y) / 2)).backward()
    expected, kappa_body, kappa_head = two_penalties(Net(), x, y)
    assert_close(
        [2 * t for t in (body.last_kappa, head.last_kappa)], [kappa_body, kappa_head], "kappas", ROUNDING
    )  # type: ignore[operator]
    assert torch.isfinite(expected)


def test_nothing_is_left_of_the_optimizers() -> None:
    """After all of it: no hook on a layer that no FAM watches any more."""
    model = Net()
    body, head = two_fams(model)
    x, y = batch(0)
    head.regularize(body.regularize(F.cross_entropy(model(x), y))).backward()
    with observe(model.head) as layer:
        assert torch.isfinite(relative_flatness(F.cross_entropy(model(x), y), layer))
    del body, head, layer
    gc.collect()
    assert not model.body[0]._forward_hooks and not model.head._forward_hooks


# ------------------------------------------------------------------------------------- several losses


@pytest.mark.parametrize("layer", ["body", "head"])
def test_a_regularised_loss_that_was_changed_is_not_regularised_again(layer: str) -> None:
    """As Lightning does in a closure: it divides what training_step returned, and calls backward."""
    model, plain = Net(), Net()
    of = {"body": lambda m: m.body[0], "head": lambda m: m.head}[layer]
    fam = FAM(model.parameters(), torch.optim.SGD, of(model), LAM, lr=0.1)
    x, y = batch(0)

    def closure() -> Tensor:
        fam.zero_grad()
        total = torch.zeros(())
        for xs, ys in zip(x.split(2), y.split(2), strict=True):
            loss = fam.regularize(F.cross_entropy(model(xs), ys))
            (loss / 4).backward()
            total += loss.detach()
        return total

    fam.step(closure)

    def loss() -> Tensor:
        return F.cross_entropy(plain(x), y)

    set_gradients(penalised(loss, of(plain)), plain.parameters())
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights", ROUNDING)


def test_two_losses_in_one_step() -> None:
    """kappa of a sum is the sum of kappas, so each loss is regularised by itself."""
    model, plain = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)
    other_x, other_y = batch(1)
    fam.regularize(F.cross_entropy(model(x), y)).backward()
    fam.regularize(0.3 * F.mse_loss(model(other_x), F.one_hot(other_y, 3).double())).backward()
    fam.step()

    def loss() -> Tensor:
        second = F.mse_loss(plain(other_x), F.one_hot(other_y, 3).double())
        return F.cross_entropy(plain(x), y) + 0.3 * second

    set_gradients(penalised(loss, plain.head), plain.parameters())
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights", ROUNDING)


def test_two_losses_of_one_forward() -> None:
    model, plain = Net(), Net()
    fam = FAM(model.parameters(), torch.optim.SGD, model.head, LAM, lr=0.1)
    x, y = batch(0)

    def closure() -> None:
        z = model(x)
        F.cross_entropy(z, y).backward(retain_graph=True)
        (0.3 * z.square().mean()).backward()

    fam.step(closure)

    def loss() -> Tensor:
        z = plain(x)
        return F.cross_entropy(z, y) + 0.3 * z.square().mean()

    set_gradients(penalised(loss, plain.head), plain.parameters())
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights", ROUNDING)
