"""Inputs that came out wrong, or died obscurely, and are right now or refused in a sentence.

Calls, changes and backwards that are not seen; what is left on a model and its copies; batches as they come;
wrapped bases.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref
from collections import UserDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from fam_optim import (
    FAM,
    dataset_relative_flatness,
    evaluation,
    layer_flatness,
    observe,
    relative_flatness,
    weight_layers,
)
from tests import reference
from tests.support import assert_close, set_gradients, true_kappa, warnings_as

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:lam . kappa"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
]

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
CE = F.cross_entropy


def mlp(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=bias))


def fam_on(model: nn.Module, layer: Any, lam: float = 0.5, **settings: Any) -> FAM:
    return FAM(model.parameters(), torch.optim.SGD, layer, lam, lr=0.1, **settings)


def measured(loss_of: Callable[[], Tensor], layer: nn.Module, **settings: Any) -> Tensor:
    with observe(layer) as seen:
        loss = loss_of()
    return relative_flatness(loss, seen, **settings)


# --------------------------------------------------------------------------- what is left on a model


def copies(model: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "save": torch.load(file, weights_only=False),
    }


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_hooks_with_kwargs) + len(module._forward_pre_hooks)
        for module in model.modules()
    )


def test_copies_of_a_model_carry_nothing() -> None:
    model = mlp()
    fam = fam_on(model, [model[0], model[2]])
    fam.step(lambda: CE(model(X), Y))
    for name, twin in copies(model).items():
        assert hooks_of(twin) == 0, name
        assert b"fam_optim" not in pickle.dumps(twin), name
        assert not any(p._post_accumulate_grad_hooks for p in twin.parameters()), name


def test_copies_keep_the_users_hooks() -> None:
    model, calls = mlp(), []
    before = model[2].register_forward_hook(Called(calls, "before"))
    fam = fam_on(model, model[2])
    after = model[2].register_forward_hook(Called(calls, "after"))
    fam.step(lambda: CE(model(X), Y))
    assert [c for c in calls if c] == ["before", "after"]
    twin = copy.deepcopy(model)
    assert len(twin[2]._forward_hooks) == 2
    for handle in (before, after):  # one that was given out before FAM was built removes its hook as well
        handle.remove()
    calls.clear()
    fam.step(lambda: CE(model(X), Y))
    assert not calls and len(model[2]._forward_hooks) == 1


class Called:
    def __init__(self, calls: list[str], name: str) -> None:
        self.calls, self.name = calls, name

    def __call__(self, *args: Any) -> None:
        self.calls.append(self.name)


@pytest.mark.parametrize("alive", [True, False], ids=["FAM alive", "FAM gone"])
def test_a_trained_model_is_scripted_traced_quantised_and_exported(alive: bool) -> None:
    model = mlp().float()
    fam = fam_on(model, model[2])
    x = X.float()
    fam.step(lambda: CE(model(x), Y))
    twin = copy.deepcopy(model)
    if not alive:
        del fam
        assert hooks_of(model) == 0, "gone at once, without the garbage collector"
    for net in (model, twin):
        with torch.no_grad():
            expected = net(x)
            assert torch.equal(torch.jit.script(net)(x), expected)
            assert torch.equal(torch.jit.trace(net, x)(x), expected)
            assert torch.equal(torch.export.export(net, (x,), strict=False).module()(x), expected)
        with warnings_as("ignore"):
            quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear})
        assert (quantised(x) - expected).abs().max() < 0.1
    for strict in (False, hasattr(torch.compiler, "is_exporting")):  # torch 2.6 does not tell a strict export
        exported = torch.export.export(model, (x,), strict=strict)  # with gradients on
        assert torch.equal(exported.module()(x), expected)
    assert torch.equal(torch.jit.trace(model, x)(x), expected)


def test_quantised_in_place_with_its_optimizer_alive() -> None:
    model = mlp().float()
    fam = fam_on(model, model[2])
    with warnings_as("ignore"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert model(X.float()).shape == (6, 3)
    assert fam.lam == 0.5


@pytest.mark.parametrize("first", ["hook", "FAM"])
def test_trainers_with_a_hook_on_the_layer_do_not_stay_alive(first: str) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net = nn.Linear(4, 3)
            if first == "hook":
                self.net.register_forward_hook(self.log)
            self.optimizer = fam_on(self.net, self.net)
            if first == "FAM":
                self.net.register_forward_hook(self.log)
            self.optimizer.step(lambda: CE(self.net(X), Y))

        def log(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.features = args[0]

    alive = [weakref.ref(Trainer()) for _ in range(5)]
    gc.collect()
    assert not any(trainer() for trainer in alive)


def test_a_hook_on_a_weight_goes_with_the_optimizer() -> None:
    model = mlp()
    fam = fam_on(model, model[2])
    fam.step(lambda: CE(model(X), Y))
    assert model[2].weight._post_accumulate_grad_hooks
    del fam
    gc.collect()
    assert not model[2].weight._post_accumulate_grad_hooks and hooks_of(model) == 0


class Equal(nn.Linear):
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


class Twin(nn.Linear):
    """Equal to all of its kind."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Twin)

    def __hash__(self) -> int:
        return 1


class Empty(nn.Linear):
    """Has no truth, and counts how often its name is told."""

    told = 0

    def __bool__(self) -> bool:
        raise ValueError("neither true nor false")

    def __repr__(self) -> str:
        self.told += 1
        return super().__repr__()


def test_layers_are_not_asked_whether_they_are_true_nor_for_their_name() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Empty(5, 3))
    kappa = dataset_relative_flatness(model, "2", CE, [(X, Y)])
    assert_close([kappa], [true_kappa(lambda: CE(model(X), Y), model[2])], "kappa", 1e-12)
    fam = FAM(model.parameters(), torch.optim.SGD, [model[0], model[2]], 1e-3, lr=0.1)
    model[2].told = 0
    fam.step(lambda: CE(model(X), Y))
    fam.zero_grad()
    fam.regularize(CE(model(X), Y)).backward()
    fam.step()
    assert model[2].told == 0, "only in messages"


def test_modules_are_told_apart_by_identity() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Equal(5, 3))
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    kappa = measured(lambda: CE(model(X), Y), model[2])
    assert_close([kappa], [true_kappa(lambda: CE(plain(X), Y), plain[2])], "kappa", 1e-12)
    pair = nn.Sequential(Twin(4, 4), nn.Tanh(), Twin(4, 3))
    with observe(pair[0]) as first, observe(pair[2]) as last:
        loss = CE(pair(X), Y)
    twin = mlp()
    twin[0], twin[2] = nn.Linear(4, 4), nn.Linear(4, 3)
    twin.load_state_dict(pair.state_dict())
    for seen, layer in ((first, twin[0]), (last, twin[2])):
        wanted = true_kappa(lambda: CE(twin(X), Y), layer)
        assert_close([relative_flatness(loss, seen)], [wanted], "kappa", 1e-11)


# ------------------------------------------------------------------------- calls that are not seen


def another(model: nn.Sequential, how: str) -> Tensor:
    """The model called a second time, past its last layer's hook."""
    u = X + 1
    if how == "vmap":
        return torch.func.vmap(model)(u)
    if how == "forward":
        return model[2].forward(model[:2](u))
    if how == "reentrant checkpoint":
        return checkpoint(model, u.clone().requires_grad_(), use_reentrant=True)
    if how == "checkpoint of a sample":
        return checkpoint(lambda z: model[2](z.tanh()), model[0](u), use_reentrant=True)
    if how == "class":
        return nn.Linear.forward(model[2], model[:2](u))
    return BY_HAND[how](model[:2](u), model[2].weight)


def linear(h: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(h, w).tanh()


def embedding(index: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.embedding(index, w).tanh()


def in_region(function: Callable[..., Tensor], how: str, x: Tensor, w: Tensor) -> Tensor:
    """Calls a function as a region that the graph does not look into."""
    if how == "compiled":
        return torch.compile(function, backend="aot_eager")(x, w)
    region = torch.jit.script(function)
    for _ in range(3):  # it is compiled at the third call
        region(x.detach(), w).sum().backward()
    return region(x, w)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(h, w)
        return h @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return grad @ w, grad.T @ h


BY_HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "W.T, no bias": lambda h, w: h @ w.T,
    "W on the left": lambda h, w: (w @ h.T).T,
    "one vector": lambda h, w: w @ h[0],
    "one vector, added": lambda h, w: torch.addmv(w[:, 0].detach(), w, h[0]),
    "einsum": lambda h, w: torch.einsum("nm,dm->nd", h, w),
    "einsum from the left": lambda h, w: torch.einsum("dm,btm->bdt", w, h.view(2, 3, 5)),
    "baddbmm": lambda h, w: torch.baddbmm(h[0, 0].detach(), h.view(2, 3, 5), w.T.expand(2, 5, 3)),
    "sparse": lambda h, w: torch.sparse.mm(h.detach().to_sparse(), w.T),
    "bilinear": lambda h, w: F.bilinear(torch.ones(6, 1), h, w[:, None, :]),
    "scaled": lambda h, w: F.linear(h, 2 * w - 0.1 * w.detach().sin()),
    "sum of products": lambda h, w: (h[:, None] * w).sum(-1),
    "function": Product.apply,
    "scripted": lambda h, w: in_region(linear, "scripted", h, w),
    "compiled": lambda h, w: in_region(linear, "compiled", h, w),
}


UNSEEN = [
    "vmap",
    "forward",
    "reentrant checkpoint",
    "checkpoint of a sample",
    "class",
    *BY_HAND,
]


@pytest.mark.parametrize(("how", "bias"), [*((how, True) for how in UNSEEN), ("forward", False)])
def test_a_call_beside_an_observed_one_is_not_passed_over(how: str, bias: bool) -> None:
    model = mlp(bias)
    for mode in ("exact", "hutchinson"):
        with pytest.raises(
            RuntimeError, match=r"call that was not observed.*mode='hutchinson' or mode='full', which count"
        ):
            measured(lambda: CE(model(X), Y) + another(model, how).square().mean(), model[2], mode=mode)
    # The remedy, where torch has the derivatives.
    if how in ("vmap", "forward", "class"):
        loss = CE(model(X), Y) + another(model, how).square().mean()
        kappa = relative_flatness(loss, model[2].weight, mode="full")
        seen = true_kappa(lambda: CE(model(X), Y) + model(X + 1).square().mean(), model[2])
        assert_close([kappa], [seen], how, 1e-11)


def derivative_through_another_call(model: nn.Module, x: Tensor, how: str) -> Tensor:
    """One whose own output the loss does not depend on."""
    x = x.clone().requires_grad_()
    if how == "gradient":
        return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    if how == "two derivatives":  # of which the second is in the direction of the first: a jvp
        value = model(x)
        along = torch.ones_like(value, requires_grad=True)
        (back,) = torch.autograd.grad(value, x, along, create_graph=True)
        return torch.autograd.grad(back, along, torch.ones_like(x), create_graph=True)[0]
    if how == "jacobian":
        jacobian = torch.autograd.functional.jacobian
        return jacobian(lambda a: model(a).flatten(1).sum(0), x, create_graph=True)
    if how == "func.grad":
        return torch.func.grad(lambda a: model(a).sum())(x)
    if how == "vmap of grad":
        return torch.func.vmap(torch.func.grad(lambda a: model(a).sum()))(x)
    assert how == "jvp"
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


THROUGH = ["gradient", "two derivatives", "jacobian", "func.grad", "vmap of grad", "jvp"]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "convolution"])
@pytest.mark.parametrize("how", THROUGH)
def test_a_derivative_through_another_call_is_not_passed_over(how: str, kind: str, frozen: bool) -> None:
    """On a last layer: of the other call nothing but the weight is in the loss's graph."""
    torch.manual_seed(1)
    if kind == "convolution":
        model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Softplus(), nn.Conv1d(3, 2, 2))
        x = X.view(3, 2, 4)
    else:
        model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2, bias=kind == "linear"))
        x = X
    model[2].weight.requires_grad_(not frozen)

    def loss_of() -> Tensor:
        return derivative_through_another_call(model, x + 1, how).square().mean() + model(x).square().mean()

    for layer in (model[2],) if frozen else (model[2], model[0]):
        with pytest.raises(RuntimeError, match=r"(derivative|not observed).*mode='hutchinson'"):
            measured(loss_of, layer, mode="hutchinson")
    if not frozen and how in ("gradient", "jacobian"):  # the remedy, as far as the reference sees the calls
        kappa = relative_flatness(loss_of(), model[2].weight, mode="full")
        assert_close([kappa], [true_kappa(loss_of, model[2])], how, 1e-10)


@pytest.mark.parametrize("how", ["vmap", "forward", "gradient"])
@pytest.mark.parametrize("computed", ["weight_norm", "old weight_norm", "pruned", "spectral_norm"])
def test_a_use_of_a_computed_weight_is_not_passed_over(computed: str, how: str) -> None:
    """Every call computes a weight of its own; those that are computed alike are one."""
    model = mlp()
    make = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
    }[computed]
    with warnings_as("ignore"):
        model[2] = make(model[2])
    model.eval()

    def loss_of() -> Tensor:
        u = {
            "vmap": lambda: torch.func.vmap(model)(X + 1),
            "forward": lambda: model[2].forward(model[:2](X + 1)),
            "gradient": lambda: derivative_through_another_call(model, X + 1, "gradient"),
        }[how]()
        return CE(model(X), Y) + u.square().mean()

    with pytest.raises(RuntimeError, match=r"(derivative|not observed).*mode='hutchinson'"):
        measured(loss_of, model[2], mode="hutchinson")
    twice = measured(lambda: CE(model(X), Y) + model(X + 1).square().mean(), model[2])
    once = [measured(f, model[2]) for f in (lambda: CE(model(X), Y), lambda: model(X + 1).square().mean())]
    assert_close([twice], [once[0] + once[1]], "observed calls are added", 1e-12)


@pytest.mark.parametrize("how", ["vmap", "forward", "class", "left"])
def test_a_call_of_a_frozen_layer_is_not_passed_over(how: str) -> None:
    """A frozen weight is no part of the graph: it is known by where its numbers lie."""
    for number in (0, 2):
        model = mlp()
        model[number].weight.requires_grad_(False)
        x = X.clone().requires_grad_()  # or the lower layer's product were no part of it either

        def loss_of(model: nn.Sequential = model, x: Tensor = x, number: int = number) -> Tensor:
            h = model[:number](x + 1)
            z = {
                "vmap": lambda: torch.func.vmap(model[number])(h),
                "forward": lambda: model[number].forward(h),
                "class": lambda: nn.Linear.forward(model[number], h),
                "left": lambda: model[number].weight @ h.T,
            }[how]()
            return CE(model(x), Y) + z.square().mean()

        with pytest.raises(RuntimeError, match="call that was not observed"):
            measured(loss_of, model[number], mode="hutchinson")
        frozen = measured(lambda model=model, x=x: CE(model(x), Y), model[number], mode="full")
        model.requires_grad_()
        wanted = true_kappa(lambda model=model: CE(model(X), Y), model[number])
        assert_close([frozen], [wanted], "kappa", 1e-11)


@pytest.mark.parametrize("how", ["z @ W", "W.T", "mT", "transpose"])
def test_a_tied_decoder_is_no_derivative(how: str) -> None:
    """Another use of the weight, which does not count."""
    model = mlp()
    w = model[2].weight

    def loss_of(w: Tensor = w) -> Tensor:
        z = model(X)
        decoded = {
            "z @ W": lambda: z @ w,
            "W.T": lambda: F.linear(z, w.T),
            "mT": lambda: F.linear(z, w.mT),
            "transpose": lambda: F.linear(z, w.transpose(0, 1)),
        }[how]()
        return decoded.square().mean()

    kappa = measured(loss_of, model[2], mode="full")
    wanted = true_kappa(lambda: loss_of(w.detach().clone()), model[2])
    assert_close([kappa], [wanted], "kappa", 1e-11)


def test_a_call_of_one_layer_that_is_unseen_while_another_is_seen() -> None:
    model = mlp()
    fam = fam_on(model, [model[0], model[2]])
    with pytest.raises(RuntimeError, match="call that was not observed"):
        fam.regularize(CE(model[2].forward(model[1](model[0](X))), Y))


@pytest.mark.parametrize("where", ["beside", "below", "compiled", "scripted"])
def test_what_is_no_call_of_the_layer_is_no_false_refusal(where: str) -> None:
    """Calls without a graph, other uses of the weight, a reentrant checkpoint of what comes before."""
    model = mlp()
    weight = model[2].weight

    def loss_of() -> Tensor:
        with torch.no_grad():
            model(X)
        if where == "below":
            return CE(model[2](checkpoint(model[:2], X.clone().requires_grad_(), use_reentrant=True)), Y)
        if where in ("compiled", "scripted"):  # with an embedding that shares the weight
            return CE(model[2](in_region(embedding, where, Y, weight)), Y)
        x = X + 1
        decoded = F.linear(model(x), weight.T)
        return decoded.square().mean() + 0 * (weight @ weight.T - torch.eye(3)).square().sum()

    kappa = measured(loss_of, model[2], mode="full")
    if where == "below":
        wanted = true_kappa(lambda: CE(model(X), Y), model[2])
        assert_close([kappa], [wanted], "kappa", 1e-11)
    elif where != "beside":
        frozen = weight.detach().clone()
        wanted = true_kappa(lambda: CE(model[2](embedding(Y, frozen)), Y), model[2])
        assert_close([kappa], [wanted], "kappa", 1e-11)
    assert kappa.isfinite()


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "vector": (lambda: nn.Linear(4, 3), lambda x: x[0]),
    "sequence": (lambda: nn.Linear(4, 3), lambda x: x.view(2, 3, 4)),
    "not contiguous": (lambda: nn.Linear(3, 3), lambda x: x.view(2, 1, 3, 4).transpose(2, 3)),
    "expanded": (lambda: nn.Linear(4, 3), lambda x: x[:, None].expand(6, 2, 4)),
    "no bias": (lambda: nn.Linear(3, 3, bias=False), lambda x: x.view(2, 3, 4).mT),
    "convolution": (lambda: nn.Conv1d(2, 3, 2), lambda x: x.view(3, 2, 4)),
    "one image": (lambda: nn.Conv1d(6, 3, 2), lambda x: x),
    "padded": (lambda: nn.Conv1d(2, 3, 2, padding=1, padding_mode="circular"), lambda x: x.view(3, 2, 4)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2), lambda x: x.view(3, 2, 4)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_layers_input_is_seen(name: str) -> None:
    make, arrange = LAYOUTS[name]
    for requires_grad in (False, True):
        layer, x = make(), X.clone().requires_grad_(requires_grad)

        def loss_of(layer: nn.Module = layer, x: Tensor = x) -> Tensor:
            return layer(arrange(x)).tanh().square().mean() + layer(arrange(x + 1)).square().mean()

        kappa = measured(loss_of, layer, mode="full")
        assert_close([kappa], [true_kappa(loss_of, layer)], name, 1e-10)
        with torch.autocast("cpu", torch.bfloat16):
            assert measured(loss_of, layer, mode="hutchinson").isfinite()


def replaced(model: nn.Sequential, how: str) -> Any:
    layer = model[2]
    if how == "on the instance":
        layer.forward = lambda x: F.linear(x, 3 * layer.weight, layer.bias)
    elif how == "another input":
        layer.forward = lambda x: F.linear(x.detach() * 2, layer.weight, layer.bias)
    elif how == "global hook":
        return nn.modules.module.register_module_forward_hook(lambda m, a, z: 2 * z if m is layer else None)
    else:
        assert how == "hook put first"
        layer.register_forward_hook(lambda m, a, z: 2 * z, prepend=True)
    return None


@pytest.mark.parametrize("how", ["on the instance", "another input", "global hook", "hook put first"])
def test_a_forward_that_is_not_the_classs_is_refused(how: str) -> None:
    model = mlp()
    with observe(model[2]) as seen:
        handle = replaced(model, how)
        try:
            loss = CE(model(X), Y)
        finally:
            if handle is not None:
                handle.remove()
    with pytest.raises(TypeError, match=r"computes something else than Linear.*hutchinson"):
        relative_flatness(loss, seen)


def test_a_forward_replaced_by_the_same_is_taken() -> None:
    """As accelerate does, to move tensors between devices."""
    model = mlp()
    original = model[2].forward
    wanted = true_kappa(lambda: CE(model(X), Y), model[2])
    model[2].forward = functools.wraps(original)(lambda x: original(x))
    assert_close([measured(lambda: CE(model(X), Y), model[2])], [wanted], "kappa", 1e-12)


@pytest.mark.parametrize("kind", ["module", "several"])
def test_a_weight_changed_since_the_forward_is_refused(kind: str) -> None:
    layer = nn.Linear(4, 3)
    with observe(layer) as seen:
        loss = CE(layer(X), Y)
    with torch.no_grad():
        layer.weight.mul_(3)
    with pytest.raises(RuntimeError, match=r"weight of the observed layer.*modified in place.*regularise"):
        relative_flatness(loss, seen if kind == "module" else [seen])


def test_a_step_leaves_what_another_optimizer_needs() -> None:
    """Two FAMs on one layer, each with its loss of the same forward; neither trains the layer's weight."""
    model = mlp()
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    with warnings_as("ignore"):
        a, b = (FAM(m.parameters(), torch.optim.SGD, model[2], 0.1, lr=0.1) for m in (first, second))

    def loss(z: Tensor) -> Tensor:
        return CE(z, Y.roll(1)) + CE(second(model(X + 1)), Y)

    wanted = true_kappa(lambda: loss(model(X)), model[2])
    z = model(X)
    a.regularize(CE(first(z), Y)).backward(retain_graph=True)
    a.step()
    b.regularize(loss(z))
    assert_close([b.last_kappa], [wanted.detach()], "kappa", 1e-10)


# -------------------------------------------------------------------------- the same weight twice


def test_a_weight_named_twice_counts_once() -> None:
    model = mlp()
    with observe(model[2]) as one, observe(model[2]) as two:
        loss = CE(model(X), Y)
    kappa = relative_flatness(loss, one)
    for several in ([one, one], [one, two], [two, one, two]):
        assert_close([relative_flatness(loss, several)], [kappa], "kappa", 1e-12)
    weight = model[2].weight
    both = relative_flatness(loss, [one, weight], mode="full")
    assert_close([both], [relative_flatness(loss, weight, mode="full")], "kappa", 1e-12)
    for layers in ([model[2], model[2]], [weight, weight], [model[2], weight]):
        with pytest.raises(ValueError, match=r"different layers.*same one twice"):
            fam_on(model, layers, mode="full")


# --------------------------------------------------------- trained unregularised, or twice, in silence


def test_backpropagating_another_loss_than_regularize_returned_is_refused() -> None:
    model = mlp()
    fam = fam_on(model, model[2])
    loss = CE(model(X), Y)
    fam.regularize(loss)
    loss.backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Backpropagate what optimizer.regularize"):
        fam.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("order", ["plain last", "plain first"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen layer"])
def test_one_of_two_losses_without_its_penalty_is_refused(order: str, frozen: bool) -> None:
    model = mlp()
    model[2].requires_grad_(not frozen)
    with warnings_as("ignore"):
        fam = fam_on(model, model[2])
    plain, regularized = CE(model(X + 1), Y), fam.regularize(CE(model(X), Y))
    for value in (regularized, plain) if order == "plain last" else (plain, regularized):
        value.backward()
    with pytest.raises(RuntimeError, match="for every loss and micro-batch of a step"):
        fam.step()
    fam.zero_grad()  # what lay there is gone
    fam.regularize(CE(model(X), Y)).backward()
    fam.step()


@pytest.mark.parametrize("first", ["regularised", "other"])
def test_a_loss_may_be_added_that_alone_uses_another_layer(first: str) -> None:
    """As the remedy for losses that Gauss-Newton does not know says; its gradients may be there first."""
    trunk, head, other = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
    parameters = [p for m in (trunk, head, other) for p in m.parameters()]
    fam = FAM(parameters, torch.optim.SGD, [trunk, other], mode="hutchinson", lr=0.1)
    for _ in range(2):
        fam.zero_grad()
        h = trunk(X).tanh()
        beside = other(h).abs().mean() if first == "other" else None
        regularized = fam.regularize(CE(head(h), Y))
        (regularized + (other(h).abs().mean() if beside is None else beside)).backward()
        fam.step()


@pytest.mark.parametrize("how", ["no backward", "of a copy", "zeroed"])
def test_a_regularised_loss_that_leaves_no_gradient_is_refused(how: str) -> None:
    model = mlp()
    fam = fam_on(model, model[2])
    loss = fam.regularize(CE(model(X), Y))
    if how == "of a copy":
        loss.detach().requires_grad_().backward()
    elif how == "zeroed":
        loss.backward()
        fam.zero_grad()
    with pytest.raises(RuntimeError, match=r"nothing that is trained has a gradient.*before step\(\)"):
        fam.step()
    fam.regularize(CE(model(X), Y)).backward()
    fam.step()


@pytest.mark.parametrize("which", ["another FAM's step", "a plain backward"])
def test_a_closure_that_zeroes_what_it_backpropagated_is_refused(which: str) -> None:
    """What it returns is not backpropagated, as it called backward: nothing would be trained, in silence."""
    model = mlp()
    fam, other = fam_on(model, model[2]), fam_on(model, model[2])

    def closure() -> Tensor:
        if which == "a plain backward":
            CE(model(X), Y).backward()
        else:
            other.step(lambda: CE(model(X), Y))
        fam.zero_grad()
        return CE(model(X), Y)

    with pytest.raises(RuntimeError, match=r"left no gradients: they were zeroed after.*Expected zero_grad"):
        fam.step(closure)


def test_layers_that_are_trained_one_after_another() -> None:
    """A layer whose parameters join later is watched, and its gradients count, once the first is frozen."""
    model = nn.Sequential(mlp()[0], nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="not among the parameters"):
        fam = FAM(model[0].parameters(), torch.optim.SGD, [model[0], model[2]], lr=0.1, mode="hutchinson")
    model[0].requires_grad_(False)
    fam.add_param_group({"params": model[2].parameters()})
    before = model[2].weight.detach().clone()
    fam.step(lambda: CE(model(X), Y))
    assert not torch.equal(model[2].weight, before)
    fam.zero_grad()
    fam.regularize(CE(model(X), Y)).backward()
    CE(model(X + 1), Y).backward()
    with pytest.raises(RuntimeError, match="of a loss that was not regularised"):
        fam.step()


@pytest.mark.parametrize("number", [0, 2])
def test_layers_may_be_frozen_and_thawed_while_training(number: int) -> None:
    """Frozen they still regularise the others; thawed, a loss without its penalty is noticed again."""
    model = mlp()
    fam = fam_on(model, model[number])
    weight = model[number].weight
    for frozen in (True, False, True, False):
        weight.requires_grad_(not frozen)
        before = [p.detach().clone() for p in model.parameters()]
        trained = [p for p in model.parameters() if p.requires_grad]
        weight.requires_grad_(True)
        kappa = true_kappa(lambda: CE(model(X), Y), model[number])
        wanted = torch.autograd.grad(CE(model(X), Y) + fam.lam * kappa, trained)
        weight.requires_grad_(not frozen)
        fam.zero_grad()
        fam.step(lambda: CE(model(X), Y))
        moved = [b - p.detach() for p, b in zip(model.parameters(), before, strict=True) if p.requires_grad]
        assert_close([m / 0.1 for m in moved], list(wanted), f"frozen {frozen}", 1e-9)
        fam.zero_grad()
        fam.regularize(CE(model(X), Y)).backward()
        CE(model(X + 1), Y).backward()
        with pytest.raises(RuntimeError, match="of a loss that was not regularised"):
            fam.step()
        fam.zero_grad()


def test_gradients_assigned_by_hand_are_those_of_the_regularised_loss() -> None:
    model = mlp()
    fam = fam_on(model, model[2])
    loss = CE(model(X), Y)
    regularized = fam.regularize(loss)
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
        p.grad = g
    with pytest.raises(RuntimeError, match=r"Backpropagate what optimizer.regularize"):
        fam.step()
    fam.zero_grad()
    for p, g in zip(parameters, torch.autograd.grad(regularized, parameters), strict=True):
        p.grad = g
    fam.step()


@pytest.mark.parametrize("settings", [{"mode": "proximal"}, {"lam": 0.0}, {}], ids=["proximal", "lam=0", ""])
def test_a_closure_that_assigns_gradients_and_returns_the_loss_is_refused(settings: dict[str, Any]) -> None:
    """It would be trained on twice."""
    model = mlp()
    fam = FAM(model.parameters(), torch.optim.SGD, model[0], lr=0.1, **settings)
    parameters = list(model.parameters())

    def closure(regularize: bool) -> Tensor | None:
        loss = CE(model(X), Y)
        if regularize:
            loss = fam.regularize(loss)
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            p.grad = g
        return None if regularize else loss

    with pytest.raises(RuntimeError, match=r"assigned gradients.*backpropagated once more"):
        fam.step(lambda: closure(regularize=False))
    fam.zero_grad()
    fam.step(lambda: closure(regularize=True))


def combined(fam: FAM, model: nn.Module, how: str) -> Tensor:
    a, b = CE(model(X), Y), CE(model(X + 1), Y)
    if how == "stacked":
        return torch.stack([fam.regularize(a), fam.regularize(b)]).mean()
    if how == "averaged":
        return (fam.regularize(a) + fam.regularize(b)) / 2
    if how == "in a list":
        return torch.cat([fam.regularize(a)[None], fam.regularize(b)[None]]).mean()
    assert how == "weighed"
    return torch.stack([fam.regularize(a), fam.regularize(b)]) @ torch.tensor([0.5, 0.5])


@pytest.mark.parametrize("backward", [True, False], ids=["calls backward", "returns loss"])
@pytest.mark.parametrize("how", ["stacked", "averaged", "in a list", "weighed"])
def test_regularised_losses_are_known_however_they_are_put_together(how: str, backward: bool) -> None:
    model, plain = mlp(), mlp()
    fam = fam_on(model, model[2])

    def closure() -> Tensor:
        fam.zero_grad()
        total = combined(fam, model, how)
        if backward:
            total.backward()
        return total

    def loss() -> Tensor:
        return (CE(plain(X), Y) + CE(plain(X + 1), Y)) / 2

    returned = fam.step(closure)
    assert_close([returned], [loss().detach()], "the plain loss", 1e-12)
    set_gradients(loss() + 0.5 * true_kappa(loss, plain[2]), plain.parameters())
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_close(model.parameters(), plain.parameters(), "weights", 1e-12)


def test_a_loss_of_which_part_was_regularised_is_refused() -> None:
    model = mlp()
    fam = fam_on(model, model[2])

    def closure() -> Tensor:
        fam.zero_grad()
        total = fam.regularize(CE(model(X), Y)) + CE(model(X + 1), Y)
        total.backward()
        return total

    with pytest.raises(RuntimeError, match=r"part of it was not.*optimizer.regularize\(a \+ b\)"):
        fam.step(closure)
    with pytest.raises(RuntimeError, match="part of it was not"):
        fam.regularize(fam.regularize(CE(model(X), Y)) + CE(model(X + 1), Y))
    # A term that does not depend on the layer may be added.
    value = fam.regularize(CE(model(X), Y)) + model[0].weight.square().sum()
    assert fam.regularize(value) is value


BACKWARDS: dict[str, Callable[[Tensor], None]] = {
    "method": lambda loss: loss.backward(),
    "function": lambda loss: torch.autograd.backward(loss),
    "of a list": lambda loss: torch.autograd.backward([loss]),
    "from a gradient": lambda loss: torch.autograd.backward([loss], [torch.ones(())]),
}


@pytest.mark.parametrize("how", BACKWARDS.values(), ids=BACKWARDS)
def test_a_backward_in_a_closure_is_seen_in_every_spelling(how: Callable[[Tensor], None]) -> None:
    model, plain = mlp(), mlp()
    fam = fam_on(model, model[2])

    def closure() -> Tensor:
        fam.zero_grad()
        losses = [CE(model(X[half]), Y[half]) for half in (slice(3), slice(3, 6))]
        losses[0].backward()
        how(losses[1])
        return losses[0] + losses[1]

    def loss() -> Tensor:
        return CE(plain(X[:3]), Y[:3]) + CE(plain(X[3:]), Y[3:])

    fam.step(closure)
    set_gradients(loss() + 0.5 * true_kappa(loss, plain[2]), plain.parameters())
    assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], "gradient", 1e-12
    )


CHANGES: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "clipped": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1),
    "scaled": lambda parameters: [p.grad.mul_(0.5) for p in parameters if p.grad is not None],
    "replaced": lambda parameters: [setattr(p, "grad", p.grad * 1.0) for p in parameters],  # type: ignore[operator]
    "noise added": lambda parameters: [p.grad.add_(1e-3) for p in parameters if p.grad is not None],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("style", ["closure", "regularize"])
def test_changing_gradients_is_no_foreign_backward(style: str, change: Any) -> None:
    """After a step, and then a closure that adds to them, as SGD's would."""
    model = mlp()
    fam = fam_on(model, model[2], 0.1)
    for _ in range(3):
        if style == "closure":
            fam.step(lambda: CE(model(X), Y))
            change(list(model.parameters()))
        else:
            fam.regularize(CE(model(X), Y)).backward()
            change(list(model.parameters()))
            fam.step()


def test_a_checkpoint_in_the_tail_is_no_foreign_backward() -> None:
    """A reentrant one backpropagates by itself, within the step's backward."""
    model = mlp()
    fam = fam_on(model, model[2])
    for _ in range(2):
        fam.zero_grad()
        hidden = checkpoint(model[:2], X.clone().requires_grad_(), use_reentrant=True)
        fam.regularize(CE(model[2](hidden), Y)).backward()
        fam.step()


# -------------------------------------------------------------------------------- batches as they come


def test_layers_that_a_batch_does_not_use_are_left_out() -> None:
    """Tasks in turns: each step's gradient is that of its loss and the kappas of the layers that it used."""
    trunk, a, b = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 1)
    model = nn.ModuleList([trunk, a, b])
    twin = copy.deepcopy(model)
    fam = fam_on(model, [trunk, a, b])
    for step in range(4):

        def loss(of: Any, step: int = step) -> Tensor:
            h = of[0](X).tanh()
            return CE(of[1](h), Y) if step % 2 == 0 else of[2](h).square().mean()

        fam.zero_grad()
        if step < 2:
            fam.regularize(loss(model)).backward()
            fam.step()
        else:
            fam.step(lambda loss=loss: loss(model))
        used = [twin[0], twin[1 + step % 2]]
        value = loss(twin) + 0.5 * true_kappa(lambda loss=loss: loss(twin), *used)
        parameters = [p for m in used for p in m.parameters()]
        set_gradients(value, parameters)
        torch.optim.SGD(parameters, lr=0.1).step()
        assert_close(model.parameters(), twin.parameters(), f"weights after step {step}", 1e-9)
    with pytest.raises(RuntimeError, match="does not depend on an observed call"):
        fam.regularize((nn.Linear(4, 1)(X)).square().mean())


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_batch_without_samples_has_no_kappa(hidden: bool, curvature: str, mode: str) -> None:
    model = mlp()
    fam = fam_on(model, model[0 if hidden else 2], mode=mode, curvature=curvature)
    before = copy.deepcopy(list(model.parameters()))
    y = torch.zeros(0, dtype=torch.long)
    assert fam.step(lambda: CE(model(X[:0]), y, reduction="sum")) == 0
    assert fam.last_kappa == 0
    assert all(map(torch.equal, model.parameters(), before))


PACKED: dict[str, Callable[[Tensor, Tensor], tuple[Any, Any]]] = {
    "targets in a dict": lambda x, y: (x, {"y": y}),
    "inputs in a dict": lambda x, y: ({"ids": x}, {"y": y}),
    "tuples": lambda x, y: ((x, None), (y,)),
    "a number beside": lambda x, y: ((0.5, [x]), {"y": y}),
}


def unpacked(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        items = list(batch.values()) if isinstance(batch, dict) else batch
        batch = next(item for item in items if isinstance(item, (Tensor, list, tuple)))
    return batch


class Takes(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Any) -> Tensor:
        return self.net(unpacked(batch))


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_batches_are_weighed_by_their_samples_however_they_are_packed(pack: Any) -> None:
    net = nn.Linear(4, 3)
    parts = [pack(X[:5], Y[:5]), pack(X[5:], Y[5:]), pack(X[:0], Y[:0])]
    got = dataset_relative_flatness(Takes(net), net, lambda o, t: CE(o, unpacked(t)), parts)
    whole = dataset_relative_flatness(net, net, CE, [(X, Y)])
    assert_close([got], [whole], "kappa", 1e-12)


class Encoding(UserDict[str, Tensor]):
    """As a tokenizer's: a mapping whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self.data[name]


class Pair(NamedTuple):
    ids: Tensor
    length: int


@pytest.mark.parametrize("inputs", [Encoding(ids=X), Pair(X, 3)], ids=["encoding", "named tuple"])
def test_batches_keep_their_type(inputs: Any) -> None:
    class ById(nn.Module):
        def forward(self, batch: Any) -> Tensor:
            return self.net(batch.ids)

    net = nn.Linear(4, 3)
    by_id = ById()
    by_id.net = net
    got = dataset_relative_flatness(by_id, net, CE, [(inputs, Y)])
    assert_close([got], [dataset_relative_flatness(net, net, CE, [(X, Y)])], "kappa", 1e-12)
    assert evaluation._mapped(lambda t: t.to("meta"), inputs).ids.is_meta


def test_batches_are_weighed_by_what_the_user_says() -> None:
    """A mean over the tokens that are not ignored; a batch without any counts nothing."""
    net = nn.Linear(4, 3)
    y = torch.tensor([0, -100, -100, 2, 1, -100])
    parts = [(X[:2], y[:2]), (X[2:3], y[2:3]), (X[3:], y[3:])]
    kappa = dataset_relative_flatness(net, net, CE, parts, weight=lambda x, t: (t != -100).sum())
    assert_close([kappa], [dataset_relative_flatness(net, net, CE, [(X, y)])], "kappa", 1e-12)


def test_a_batch_without_tensors_is_refused_with_the_remedy() -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"by whose length the batch is weighed.*weight=lambda"):
        dataset_relative_flatness(net, net, lambda o, t: CE(net(X), Y), [(0.5, Y)])


@pytest.mark.parametrize("inputs", [{"classes": torch.ones(1), "x": X}, (X, torch.ones(4, 4))])
def test_inputs_without_a_sample_axis_in_common_are_refused_with_the_remedy(inputs: Any) -> None:
    net = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"one sample axis.*lengths \[\d, \d\].*weight=lambda"):
        dataset_relative_flatness(net, net, lambda o, t: CE(net(X), t), [(inputs, Y)])


BATCHES: dict[str, tuple[type[Exception], str, Any]] = {
    "dicts": (TypeError, r"pairs \(inputs, targets\), got a dict.*batch\['x'\]", [{"x": X, "y": Y}]),
    "three tensors": (TypeError, r"pairs .* got a tuple of length 3", [(X, Y, Y)]),
    "bare tensors": (TypeError, "pairs .* got a Tensor", [X, X[:2]]),
    "a batch of which all is ignored": (
        ValueError,
        "to be finite, got nan.*pass `weight`",
        [(X[:4], Y[:4]), (X[4:], torch.full((2,), -100))],
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_are_no_pairs_or_have_no_loss(name: str) -> None:
    error, message, batches = BATCHES[name]
    model = mlp()
    with pytest.raises(error, match=message):
        dataset_relative_flatness(model, model[2], CE, batches)


def test_numbers_beside_the_inputs_are_no_samples() -> None:
    model = mlp()
    owner = nn.Module()
    owner.net, owner.forward = model, lambda batch: model(batch["x"])  # type: ignore[method-assign]
    parts = [({"n": torch.tensor(len(x)), "x": x}, y) for x, y in ((X[:4], Y[:4]), (X[4:], Y[4:]))]
    kappa = dataset_relative_flatness(owner, model[2], CE, parts)
    assert_close([kappa], [dataset_relative_flatness(model, model[2], CE, [(X, Y)])], "kappa", 1e-12)


# ------------------------------------------------------------------------------------------- hooks


def test_hooks_on_a_weight_do_not_change_kappa() -> None:
    """Which freeze rows, or zero all of it; and the gradient of the step still passes them."""
    model = mlp()
    weight = model[2].weight
    settings = [{"mode": "full"}, {"mode": "full", "curvature": "gauss_newton"}]
    before = [relative_flatness(CE(model(X), Y), weight, **s) for s in settings]  # type: ignore[arg-type]
    seen: list[Tensor] = []
    keep = (torch.arange(3) > 0).double()[:, None]
    weight.register_hook(lambda g: (seen.append(g), g * keep)[1])
    for s, kappa in zip(settings, before, strict=True):
        assert_close([relative_flatness(CE(model(X), Y), weight, **s)], [kappa], "kappa", 1e-12)  # type: ignore[arg-type]
    assert not seen
    fam = fam_on(model, weight, mode="full")
    fam.regularize(CE(model(X), Y)).backward()
    assert len(seen) == 1 and weight.grad is not None and not weight.grad[0].any()


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_hooks_on_the_weight_of_a_convolution_do_not_change_kappa(mode: str, curvature: str) -> None:
    torch.manual_seed(1)
    conv, head = nn.Conv1d(1, 3, 2), nn.Linear(9, 3)
    kappas = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        kappas.append(
            measured(
                lambda: CE(head(conv(X[:, None]).tanh().flatten(1)), Y),
                conv,
                mode=mode,
                curvature=curvature,
                generator=generator,
            )
        )
        conv.weight.register_hook(torch.zeros_like)
    assert_close([kappas[1]], [kappas[0]], "kappa", 1e-12)


def test_hooks_behind_the_layer_that_were_set_after_regularize_see_the_steps_gradient_alone() -> None:
    """torch calls them at every derivative that passes; kappa's are taken within regularize."""
    norms = []
    for lam in (0.0, 1e-12):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        fam = fam_on(model, model[2], lam, mode="hutchinson")
        h = model[:4](X)
        seen: list[Tensor] = []
        early: list[Tensor] = []
        h.register_hook(early.append)
        regularized = fam.regularize(CE(model[4](h), Y))
        h.retain_grad()
        h.register_hook(seen.append)
        regularized.backward()
        assert len(seen) == 1 and h.grad is not None
        assert len(early) == 1 or lam, "what the manual says of hooks that were set before"
        norms.append(h.grad.norm())
    assert_close([norms[1]], [norms[0]], "gradient", 1e-9)


# ---------------------------------------------------------------------------------------- wrappers


def test_a_bases_own_decorated_step_runs_and_hooks_run_once() -> None:
    log: list[str] = []

    def counted(step: Any) -> Any:
        @functools.wraps(step)
        def own(self: Any, closure: Any = None) -> Any:
            log.append("step")
            return step(self, closure)

        return own

    class Decorated(torch.optim.SGD):
        step = counted(torch.optim.SGD.step)

    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)  # torch has wrapped its step by now
    model = mlp()
    fam = FAM(model.parameters(), Decorated, model[2], lr=0.1)
    fam.register_step_pre_hook(lambda *args: log.append("before"))
    fam.register_step_post_hook(lambda *args: log.append("after"))
    fam.step(lambda: CE(model(X), Y))
    assert log == ["before", "step", "after"]


def test_a_base_that_is_an_optimizer_in_name_alone() -> None:
    """As Lookahead and others are often written: without Optimizer.__init__, zero_grad without arguments."""

    class Around(torch.optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

        def zero_grad(self) -> None:  # type: ignore[override]
            self.inner.zero_grad()

    weights = []
    for mode in ("exact", "proximal"):
        for base in (torch.optim.SGD, lambda params, lr: Around(torch.optim.SGD(params, lr=lr))):
            model = mlp()
            fam = FAM(model.parameters(), base, model[2], lr=0.1, **MODES[mode])
            fam.zero_grad()
            fam.regularize(CE(model(X), Y)).backward()
            fam.step()
            fam.zero_grad()
            fam.step(lambda model=model: CE(model(X), Y))
            weights.append(model[2].weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])


def test_train_and_eval_of_a_schedule_free_base() -> None:
    from pytorch_optimizer import ScheduleFreeSGD

    model = mlp()
    fam = FAM(model.parameters(), ScheduleFreeSGD, model[2], 0.1, lr=1.0)
    twin = copy.deepcopy(fam)
    for optimizer in (fam, twin):
        assert hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    fam.train()
    fam.step(lambda: CE(model(X), Y))
    training = model[2].weight.detach().clone()
    fam.step(lambda: CE(model(X), Y))
    training = model[2].weight.detach().clone()
    fam.eval()
    assert not torch.equal(model[2].weight, training)
    fam.train()
    assert_close([model[2].weight], [training], "weights", 1e-12)
    plain = fam_on(model, model[2])
    assert not hasattr(plain, "train") and not hasattr(plain, "eval") and not hasattr(plain, "anything")


@pytest.mark.parametrize("name", ["mode", "measure", "n_samples", "layer", "lamda"])
def test_setting_what_is_no_attribute_is_an_error(name: str) -> None:
    fam = fam_on(mlp(), mlp()[2])
    with pytest.raises(AttributeError, match=f"no attribute '{name}' that can be set.*`lam`"):
        setattr(fam, name, "full")
    fam.lam = 0.2
    fam.defaults = {}


MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "full": {"mode": "full"},
    "hutchinson": {"mode": "hutchinson"},
    "gauss_newton": {"mode": "hutchinson", "curvature": "gauss_newton", "detach_hessian": True},
    "proximal": {"mode": "proximal", "every": 1},
}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_may_be_off_around_regularize(mode: str) -> None:
    """As in a base's step that evaluates its closure under no_grad: plain losses can be backpropagated."""
    weights = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        model = mlp()
        fam = fam_on(model, model[2], **MODES[mode])
        for _ in range(2):
            fam.zero_grad()
            loss = CE(model(X), Y)
            with context():
                regularized = fam.regularize(loss)
            regularized.backward()
            fam.step()
        weights.append(model[2].weight)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("mode", ["exact", "gauss_newton", "proximal"])
def test_as_many_derivatives_for_many_losses_as_for_few(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each walks over the whole graph: one for every time step's loss would cost the square of the steps."""
    counted = []
    own = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: counted.append(1) or own(*a, **k))
    counts = []
    for losses in (3, 30):
        model = mlp()
        fam = fam_on(model, model[2], **MODES[mode])
        loss = torch.stack([CE(model(X + i), Y) for i in range(losses)]).mean()
        counted.clear()
        fam.regularize(loss)
        counts.append(len(counted))
    assert counts[0] == counts[1] > 0


def test_sentences_where_torchs_own_came_through() -> None:
    model = mlp()
    fam = fam_on(model, model[2])
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"one without a graph.*torch.no_grad\(\)"):
        fam.regularize(CE(model(X), Y))
    embedding = nn.Embedding(7, 4, sparse=True)
    with pytest.raises(RuntimeError, match=r"sparse gradient.*sparse=False"):
        relative_flatness(embedding(Y).square().mean(), embedding.weight, mode="hutchinson")
    with pytest.raises(TypeError, match=r"str 'head'.*get_submodule"):
        fam_on(model, "head")


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)


C = nn.Linear(4, 3, dtype=torch.complex128)
ODD: dict[str, tuple[type[Exception], str, Callable[[nn.Sequential], Any]]] = {
    "FAM around FAM": (
        TypeError,
        r"a plain torch.optim.Optimizer, got a FAM.*layer=\[",
        lambda m: FAM(m.parameters(), lambda p: fam_on(m, m[2]), m[0]),
    ),
    "a number for a loss": (TypeError, "scalar tensor, got float", lambda m: fam_on(m, m[2]).regularize(1.0)),
    "a dict": (TypeError, "scalar tensor, got dict", lambda m: fam_on(m, m[2]).regularize({"loss": 1})),
    "a complex loss": (
        TypeError,
        r"to be real, got torch.complex128.*\.abs\(\)",
        lambda m: fam_on(m, m[2]).regularize(torch.complex(m(X).sum(), m(X).sum())),
    ),
    "no layer": (TypeError, "got NoneType", lambda m: relative_flatness(CE(m(X), Y), None)),  # type: ignore[arg-type]
    "a weight to observe": (
        TypeError,
        r"nn.Module, got Parameter of shape \(3, 5\).*itself to relative_flatness",
        lambda m: observe(m[2].weight),
    ),
    "lam as text": (ValueError, "`lam` to be finite.*'0.1'", lambda m: fam_on(m, m[2], "0.1")),  # type: ignore[arg-type]
    "lam in a list": (ValueError, r"`lam` to be finite.*\[0.1\]", lambda m: fam_on(m, m[2], [0.1])),  # type: ignore[arg-type]
    "a list for a model": (
        TypeError,
        "`model` to be an nn.Module, got a list",
        lambda m: FAM.for_model([m], torch.optim.SGD, lr=0.1),  # type: ignore[arg-type]
    ),
    "a seed for a generator": (
        TypeError,
        "`generator` to be a torch.Generator, got int",
        lambda m: fam_on(m, m[2], mode="proximal", generator=0),
    ),
    "a scripted layer": (
        TypeError,
        "`layer` to be nn.Linear",
        lambda m: fam_on(m, torch.jit.script(m[2]), mode="proximal"),
    ),
    "a loss for a closure": (
        TypeError,
        r"expected a closure.*got a Tensor.*optimizer.regularize\(loss\)",
        lambda m: fam_on(m, m[2]).step(CE(m(X), Y)),  # type: ignore[arg-type]
    ),
    "text for a switch": (TypeError, "True or False, got 'no'", lambda m: fam_on(m, m[2], normalize="no")),
    "a list for a measure": (ValueError, "`measure` to be one", lambda m: fam_on(m, m[2], measure=["a"])),
    "a complex layer": (
        TypeError,
        "a real weight.*two layers",
        lambda m: measured(lambda: C(X.to(torch.complex128)).abs().square().mean(), C),
    ),
    "a complex weight": (
        TypeError,
        "a real weight.*two layers",
        lambda m: relative_flatness(C(X.to(torch.complex128)).abs().mean(), C.weight, mode="full"),
    ),
    "a nested input": (
        TypeError,
        r"nested or sparse tensor \(torch.jagged\).*mode='hutchinson'",
        lambda m: measured(lambda: m(nested(X)).values().square().mean(), m[2]),
    ),
    "a sparse input": (
        TypeError,
        r"nested or sparse tensor \(torch.sparse_coo\).*to_dense",
        lambda m: measured(lambda: CE(m(X.to_sparse()), Y), m[0]),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_and_inputs_are_refused_in_a_sentence(name: str) -> None:
    error, message, call = ODD[name]
    with pytest.raises(error, match=message):
        call(mlp())


def test_the_weight_of_a_layer_with_a_sparse_input_is_right() -> None:
    """The remedy."""
    model, dense = mlp(), mlp()
    kappa = relative_flatness(CE(model(X.to_sparse()), Y), model[0].weight, mode="full")
    right = relative_flatness(CE(dense(X), Y), dense[0].weight, mode="full")
    assert_close([kappa], [right], "kappa", 1e-12)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_a_loss_that_was_backpropagated_already(number: int, curvature: str) -> None:
    model = mlp()
    with observe(model[number]) as seen:
        loss = CE(model(X), Y)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"backpropagated already: call regularize"):
        relative_flatness(loss, seen, curvature=curvature)


def test_leaving_a_layer_that_was_parametrised_meanwhile() -> None:
    layer = nn.Linear(4, 3)
    with observe(layer):
        nn.utils.parametrizations.weight_norm(layer)
    assert not layer._forward_hooks


# ---------------------------------------------------------------------------------- probes and logging


def test_probes_change_nothing_else_in_a_run_and_resume_bit_for_bit() -> None:
    def train(lam: float, steps: int, start: Any = None) -> tuple[nn.Module, FAM, list[Tensor]]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
        fam = FAM(model.parameters(), torch.optim.SGD, model[0], lam, "hutchinson", lr=0.1, momentum=0.9)
        if start is not None:
            model.load_state_dict(start[0])
            fam.load_state_dict(start[1])
            torch.set_rng_state(start[2])
        drawn = []
        for _ in range(steps):
            fam.zero_grad()
            fam.step(lambda: CE(model(X), Y))
            drawn.append(torch.rand(()))
        return model, fam, drawn

    assert all(map(torch.equal, train(0.0, 3)[2], train(0.3, 3)[2]))
    whole, _, _ = train(0.3, 4)
    half, fam, _ = train(0.3, 2)
    saved = copy.deepcopy((half.state_dict(), fam.state_dict(), torch.get_rng_state()))
    resumed, _, _ = train(0.3, 2, saved)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.filterwarnings("default:lam . kappa")
def test_last_penalty_and_one_warning_where_it_is_larger_than_the_loss() -> None:
    model = mlp()
    fam = fam_on(model, model[2], 0.1)
    assert fam.last_penalty is None
    with warnings_as("error"):
        fam.regularize(CE(model(X), Y))
    kappa = true_kappa(lambda: CE(model(X), Y), model[2]).detach()
    assert_close([fam.last_penalty], [0.1 * kappa], "penalty", 1e-12)
    fam.lam = 100.0
    assert_close([fam.last_penalty], [0.1 * kappa], "penalty", 1e-12)
    with pytest.warns(UserWarning, match="larger than the loss itself.*smaller lam"):
        fam.regularize(CE(model(X), Y))
    with warnings_as("error"):
        fam.regularize(CE(model(X), Y))


# ------------------------------------------------------------------------------ the layers of a model


def test_weight_layers_names_every_matrix_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4))
    tied[1].weight = tied[0].weight
    layers = weight_layers(tied)
    weights = [layer if isinstance(layer, nn.Parameter) else layer.weight for layer in layers]
    expected = [tied[0].weight, tied[2].in_proj_weight, tied[2].out_proj.weight]
    expected += [tied[3].weight_ih_l0, tied[3].weight_hh_l0]
    assert all(w is e for w, e in zip(weights, expected, strict=True))
    assert layers[0] is tied[0].weight, "shared by two modules: all their uses count"
    apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    assert len(weight_layers(apart)) == 4


def test_hugging_face_conv1d_is_a_layer() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    gpt = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )
    assert len(weight_layers(gpt)) == 2 * 4 + 1
    torch.manual_seed(0)
    layer = Conv1D(3, 4).double()
    twin = nn.Linear(4, 3)
    with torch.no_grad():
        nn.init.normal_(layer.weight)
        twin.weight.copy_(layer.weight.T)
        twin.bias.copy_(layer.bias)
    head = nn.Linear(3, 3)
    x = torch.randn(6, 2, 4)

    def loss(of: nn.Module, **call: Any) -> Tensor:
        return CE(head((of(**call) if call else of(x)).tanh()).mean(1), Y)

    for mode in ("full", "exact"):
        for measure in ("neuronwise", "layerwise"):
            kappas = []
            for of in (layer, twin):
                kappa = measured(lambda of=of: loss(of), of, mode=mode, measure=measure)
                (gradient,) = torch.autograd.grad(kappa, of.weight)
                kappas.append((kappa, gradient.T if of is layer else gradient))
            for got, wanted in zip(*kappas, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)
    by_keyword = measured(lambda: loss(layer, x=x), layer)
    assert_close([by_keyword], [measured(lambda: loss(twin), twin)], "called by keyword", 1e-12)
    with pytest.raises(RuntimeError, match="call that was not observed"):
        measured(lambda: loss(layer) + layer.forward(x).square().mean(), layer)
    twice = measured(lambda: loss(layer) + layer(x + 1).square().mean(), layer)
    assert_close([twice], [measured(lambda: loss(twin) + twin(x + 1).square().mean(), twin)], "twice", 1e-11)
    for trained in (True, False):
        layer.weight.requires_grad_(trained)

        def penalty() -> Tensor:
            at = x.clone().requires_grad_()
            z = layer(at)
            (slope,) = torch.autograd.grad(z.tanh().sum(), at, create_graph=True)
            return slope.square().mean() + z.square().mean()

        with pytest.raises(RuntimeError, match=r"derivative.*taken through `layer` Conv1D"):
            measured(penalty, layer)


def test_layer_flatness_against_brute_force() -> None:
    """The mean over many probes; where samples are few, over the seeds of one batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).train()
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    found = layer_flatness(net, CE, batches, n_samples=1000)
    assert list(found) == ["0", "2", "4"] and all(module.training for module in net.modules())
    for name, kappa in found.items():
        layer = net.get_submodule(name)
        exact = dataset_relative_flatness(net, layer, CE, batches, mode="exact", curvature="gauss_newton")
        wanted = reference.sum_of_kappas(reference.curvatures(lambda: CE(net(X), Y), [layer]), "neuronwise")
        assert_close([exact], [wanted.detach()], name, 1e-10)  # piecewise linear: the Hessian's
        assert abs(kappa - float(exact)) < 0.05 * float(exact), name
    assert layer_flatness(net, CE, batches) == layer_flatness(net, CE, batches), "the same probes"
    lines = repr(found).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1


def test_frozen_parameters_are_measured_and_stay_frozen() -> None:
    """Of a model that is only evaluated, attention's in-projection too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(8, 3))
    batches = [(X.view(3, 2, 4), Y[:3])]
    free = layer_flatness(net, CE, batches)
    assert "0.self_attn.in_proj_weight" in free
    net.requires_grad_(False)
    assert layer_flatness(net, CE, batches) == free
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("batch", [X[:2], {"x": X, "labels": Y}, (X, Y, Y)])
def test_loaders_of_other_things_than_pairs_are_refused(batch: Any) -> None:
    """Two rows, or the names of two tensors, would pass for a pair."""
    with pytest.raises(
        TypeError, match=rf"pairs \(inputs, targets\), got a {type(batch).__name__}.*Pass a generator"
    ):
        layer_flatness(mlp(), lambda z, y: z.square().mean(), [batch])


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_weights_of_batches_that_are_none_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="`weight` to give a number that is at least 0"):
        layer_flatness(mlp(), CE, [(X, Y)], weight=lambda x, y: weight)


def test_several_layers_by_name() -> None:
    net = mlp()
    batches = [(X[:4], Y[:4]), (X[4:], Y[4:])]
    several = dataset_relative_flatness(net, ["0", net[2]], CE, batches, mode="full")
    single = [dataset_relative_flatness(net, layer, CE, batches, mode="full") for layer in (net[0], "2")]
    assert_close(several, single, "kappas", 1e-12)
    with pytest.raises(ValueError, match=r"name a layer of the model, got 'head'.*0, 2"):
        dataset_relative_flatness(net, "head", CE, batches)
