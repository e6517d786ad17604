"""Layers that fight back: whatever computes the weight, hides the graph or changes the output.

One step of FAM in each situation must be the step that the definition gives (`tests.reference`, by
nested loops), on a model that is built the same way but runs plainly; or end in an error that says
what to do.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import warnings
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune, stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fam_optim import FAM, observation, observe, relative_flatness
from tests import reference
from tests.cases import LowRankUpdate

if TYPE_CHECKING:
    from collections.abc import Callable

LAM, LR = 0.05, 0.1
TOLERANCE = 1e-10


pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """body -> layer -> tail. The regularised layer is in the middle or, with `head`, the last one."""

    def __init__(self, head: bool = False, make: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.layer = make(6, 3 if head else 4)
        self.tail = nn.Identity() if head else nn.Sequential(nn.GELU(), nn.Linear(4, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.layer(self.body(x)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def data(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def loss_of(model: nn.Module) -> Tensor:
    """The plain way to the loss."""
    x, y = data()
    return F.cross_entropy(model(x), y)


def fam_on(model: nn.Module, mode: str = "exact", **kwargs: Any) -> FAM:
    """FAM on model.layer; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return FAM(model.parameters(), torch.optim.SGD, model.layer, LAM, mode, lr=LR, **kwargs)


def definition(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor], path: str = "layer"
) -> tuple[Tensor, dict[str, Tensor]]:
    """kappa by the definition, and every parameter after one SGD step on loss + lam * kappa."""
    model, twin = seeded(build), seeded(build)  # one forward each: some layers change with every forward
    curvatures = reference.curvatures(lambda: run(twin), [twin.get_submodule(path)], create_graph=True)
    kappa = reference.sum_of_kappas(curvatures, "neuronwise")
    weights = dict(model.named_parameters())
    trained = [name for name, p in weights.items() if p.requires_grad]
    by_loss = reference.gradient(run(model), [weights[name] for name in trained])
    by_kappa = reference.gradient(kappa, [dict(twin.named_parameters())[name] for name in trained])
    moved = {name: p.detach().clone() for name, p in weights.items()}
    for name, g, h in zip(trained, by_loss, by_kappa, strict=True):
        moved[name] -= LR * (g + LAM * h)
    return kappa.detach(), moved


def assert_step(model: nn.Module, fam: FAM, kappa: Tensor, moved: dict[str, Tensor]) -> None:
    assert fam.last_kappa is not None
    error = ((fam.last_kappa - kappa) / kappa).abs()
    assert error <= TOLERANCE, f"kappa is {fam.last_kappa:.12g}, expected {kappa:.12g}"
    assert kappa.abs() > 1e-4, "a case with nothing to regularise proves nothing"
    for name, p in model.named_parameters():
        error = (p.detach() - moved[name]).norm() / moved[name].norm().clamp_min(1e-300)
        assert error <= TOLERANCE, f"{name} after the step: relative error {error:.1e}"


def check(
    build: Callable[[], nn.Module],
    run: Callable[[nn.Module], Tensor] = loss_of,
    plain: Callable[[nn.Module], Tensor] | None = None,
    mode: str = "exact",
) -> nn.Module:
    """One step with `run` is the step by the definition with `plain`."""
    kappa, moved = definition(build, plain or run)
    model = seeded(build)
    fam = fam_on(model, mode)
    fam.step(lambda: run(model))
    assert_step(model, fam, kappa, moved)
    return model


MODES = pytest.mark.parametrize("mode", ["exact", "full"])
WHERE = pytest.mark.parametrize("head", [False, True], ids=["middle", "head"])


# ------------------------------------------------------------------------------ activation checkpoints


def checkpointed(part: str, reentrant: bool) -> Callable[[nn.Module], Tensor]:
    """The loss, with one part of the way to it under an activation checkpoint."""
    x, y = data()
    x.requires_grad_()  # what a reentrant checkpoint must get
    save = partial(checkpoint, use_reentrant=reentrant)

    def run(model: nn.Module) -> Tensor:
        if part == "body":
            return F.cross_entropy(model.tail(model.layer(save(model.body, x))), y)
        if part == "layer":
            return F.cross_entropy(model.tail(save(model.layer, model.body(x))), y)
        if part == "tail":
            return F.cross_entropy(save(model.tail, model.layer(model.body(x))), y)
        if part == "loss":
            return save(lambda z: F.cross_entropy(model.tail(z), y), model.layer(model.body(x)))
        return save(lambda x: F.cross_entropy(model(x), y), x)

    return run


@MODES
@WHERE
@pytest.mark.parametrize(
    ("part", "reentrant"),
    [
        *[(part, False) for part in ("body", "layer", "tail", "loss", "everything")],
        ("body", True),
    ],
)
def test_activation_checkpoint_changes_nothing(part: str, reentrant: bool, head: bool, mode: str) -> None:
    model = check(partial(Net, head), checkpointed(part, reentrant), loss_of, mode)
    plain = seeded(partial(Net, head))
    fam_on(plain, mode).step(lambda: loss_of(plain))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q), (
            f"{name} differs from the run without checkpoint by {(p - q).abs().max():.1e}"
        )


@MODES
@WHERE
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layer", r"`layer` Linear\(in_features=6.* outside reentrant.*use_reentrant=False"),
        ("everything", r"`layer` Linear\(in_features=6.* outside reentrant.*use_reentrant=False"),
        ("loss", r"Reentrant activation checkpointing.*use_reentrant=False"),
    ],
)
def test_reentrant_checkpoint_over_the_layer_or_its_tail_is_refused(
    part: str, message: str, head: bool, mode: str
) -> None:
    model = seeded(partial(Net, head))
    before = copy.deepcopy(model.state_dict())
    fam, run = fam_on(model, mode), checkpointed(part, True)
    with pytest.raises(RuntimeError, match=message):
        fam.step(lambda: run(model))
    with pytest.raises(RuntimeError, match=message):
        fam.regularize(run(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_reentrant_checkpoint_over_a_bare_parameter_is_refused() -> None:
    model = seeded(Net)
    fam = FAM(model.parameters(), torch.optim.SGD, model.layer.weight, LAM, "full", lr=LR)
    with pytest.raises(RuntimeError, match=r"Parameter of shape \(4, 6\) outside reentrant"):
        fam.regularize(checkpointed("layer", True)(model))


def test_checkpointed_dropout_is_recomputed_alike() -> None:
    """The masks of body and tail are drawn once, whatever is recomputed for kappa."""

    class Dropped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body.append(nn.Dropout(0.3))
            self.tail.append(nn.Dropout(0.3))

    def run(model: nn.Module, save: bool) -> Tensor:
        torch.manual_seed(3)
        return (checkpointed("everything", False) if save else loss_of)(model)

    check(Dropped, partial(run, save=True), partial(run, save=False))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_segments_of_the_body(reentrant: bool) -> None:
    x, y = data()
    x.requires_grad_()

    def run(model: nn.Module) -> Tensor:
        phi = checkpoint_sequential(model.body, 2, x, use_reentrant=reentrant)
        return F.cross_entropy(model.tail(model.layer(phi)), y)

    check(Net, run, loss_of)


# ------------------------------------------------------------------------------- activation offloading


def to_file(t: Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(t.detach(), file)
    return file


def from_file(file: io.BytesIO) -> Tensor:
    file.seek(0)
    return torch.load(file)


OFFLOADING: dict[str, Callable[[], Any]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "own hooks": partial(torch.autograd.graph.saved_tensors_hooks, to_file, from_file),
}


@MODES
@WHERE
@pytest.mark.parametrize("offload", OFFLOADING.values(), ids=OFFLOADING)
def test_offloaded_activations(offload: Callable[[], Any], head: bool, mode: str) -> None:
    def run(model: nn.Module) -> Tensor:
        with offload():
            return loss_of(model)

    check(partial(Net, head), run, loss_of, mode)


# ------------------------------------------------------------------------------------ computed weights


def old_weight_norm(m: int, d: int) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still everywhere
        return nn.utils.weight_norm(nn.Linear(m, d))


def pruned(m: int, d: int) -> nn.Module:
    return prune.l1_unstructured(nn.Linear(m, d), "weight", 0.5)


def pruned_twice(m: int, d: int) -> nn.Module:
    return prune.random_structured(pruned(m, d), "weight", 0.3, dim=0)


def lora(m: int, d: int) -> nn.Module:
    layer = nn.Linear(m, d)
    layer.weight.requires_grad_(False)
    return parametrize.register_parametrization(layer, "weight", LowRankUpdate(d, m))


def lora_on_weight_norm(m: int, d: int) -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(m, d))
    return parametrize.register_parametrization(layer, "weight", LowRankUpdate(d, m))


COMPUTED: dict[str, Callable[[int, int], nn.Module]] = {
    "weight_norm": lambda m, d: parametrizations.weight_norm(nn.Linear(m, d)),
    "spectral_norm": lambda m, d: parametrizations.spectral_norm(nn.Linear(m, d)),
    "spectral_norm in eval mode": lambda m, d: parametrizations.spectral_norm(nn.Linear(m, d)).eval(),
    "orthogonal": lambda m, d: parametrizations.orthogonal(nn.Linear(m, d)),
    "old weight_norm": old_weight_norm,
    "old spectral_norm": lambda m, d: nn.utils.spectral_norm(nn.Linear(m, d)),
    "pruned": pruned,
    "pruned twice": pruned_twice,
    "LoRA": lora,
    "LoRA on weight_norm": lora_on_weight_norm,
}


@MODES
@WHERE
@pytest.mark.parametrize("make", COMPUTED.values(), ids=COMPUTED)
def test_computed_weight_counts_as_computed(
    make: Callable[[int, int], nn.Module], head: bool, mode: str
) -> None:
    check(partial(Net, head, make), mode=mode)


@pytest.mark.parametrize("name", ["spectral_norm", "old spectral_norm"])
@pytest.mark.parametrize("save", [False, True], ids=["", "body checkpointed"])
def test_state_of_a_computed_weight_advances_as_in_a_plain_run(name: str, save: bool) -> None:
    """Power iterations happen in forwards alone: with weights that do not move, all runs agree."""
    models = [seeded(partial(Net, make=COMPUTED[name])) for _ in range(2)]
    run = checkpointed("body", False) if save else loss_of
    optimizers = [
        FAM(models[0].parameters(), torch.optim.SGD, models[0].layer, LAM, lr=0.0),
        torch.optim.SGD(models[1].parameters(), lr=0.0),
    ]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = run(model)
                loss.backward()
                return loss

            optimizer.step(closure)
        fam, plain = (dict(model.layer.named_buffers()) for model in models)
        assert len(plain) == 2
        for key, vector in plain.items():
            assert torch.equal(fam[key], vector), f"{key} is not that of a run without FAM"


def test_pruned_entries_stay_pruned() -> None:
    model = seeded(partial(Net, make=pruned))
    fam_on(model).step(lambda: loss_of(model))
    zero = model.layer.weight_mask == 0
    assert zero.sum() == 12
    assert not model.layer.weight_orig.grad[zero].any()
    assert model.layer.weight_orig.grad[~zero].all()


def test_parametrised_after_it_was_observed() -> None:
    model = seeded(Net)
    fam = fam_on(model)
    parametrizations.spectral_norm(model.layer)
    with pytest.raises(RuntimeError, match=r"parametrised after it was observed.*before building FAM"):
        fam.step(lambda: loss_of(model))


@pytest.mark.parametrize("name", [n for n in COMPUTED if n != "spectral_norm in eval mode"])
def test_untrained_computed_weight_warns(name: str) -> None:
    model = seeded(partial(Net, make=COMPUTED[name]))
    with pytest.warns(UserWarning, match="not among the parameters given to FAM"):
        FAM(model.body.parameters(), torch.optim.SGD, model.layer, LAM, lr=LR)


@pytest.mark.parametrize("before", [False, True], ids=["FAM after", "FAM before"])
def test_lazy_linear(before: bool) -> None:
    def lazy() -> nn.Module:
        return Net(make=lambda m, d: nn.LazyLinear(d))

    def built() -> nn.Module:
        model = lazy()
        torch.manual_seed(2)
        model(data()[0])  # a dry run
        return model

    kappa, moved = definition(built, loss_of)
    model = seeded(lazy)
    fam = fam_on(model) if before else None
    torch.manual_seed(2)
    if before:
        model(data()[0])
    else:
        model = seeded(built)
    fam = fam or fam_on(model)
    fam.step(lambda: loss_of(model))
    assert_step(model, fam, kappa, moved)


# ------------------------------------------------------------------------------------- shared and frozen


class Tied(nn.Module):
    """A language model whose head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.layer = nn.Linear(4, 7, bias=False)
        self.layer.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.mix(self.embedding(tokens))))


def next_token_loss(model: nn.Module) -> Tensor:
    tokens = torch.tensor([[0, 3, 2, 6, 1], [5, 5, 4, 0, 2]])
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@MODES
def test_tied_embedding_counts_in_the_head_alone(mode: str) -> None:
    """kappa sees the head's use of the weight; its gradient reaches the weight through both uses."""
    model = check(Tied, next_token_loss, mode=mode)
    assert model.layer.weight is model.embedding.weight
    untied = seeded(Tied)
    untied.layer.weight = nn.Parameter(untied.embedding.weight.detach().clone())
    fam = fam_on(untied, mode)
    fam.step(lambda: next_token_loss(untied))
    tied = seeded(Tied)
    fam_on(tied, mode).step(lambda: next_token_loss(tied))
    both = untied.embedding.weight.grad + untied.layer.weight.grad
    torch.testing.assert_close(tied.layer.weight.grad, both, rtol=1e-12, atol=1e-15)


def test_tied_embedding_as_a_parameter_counts_in_every_use() -> None:
    model = seeded(Tied)
    loss = next_token_loss(model)
    hessian = reference.brute_force_hessian(loss, model.layer.weight).reshape(7, 4, 7, 4)
    wanted = reference.kappa(model.layer.weight, hessian, "neuronwise")
    kappa = relative_flatness(loss, model.layer.weight, mode="full")
    torch.testing.assert_close(kappa, wanted, rtol=1e-10, atol=0)
    with observe(model.layer) as layer:
        alone = relative_flatness(next_token_loss(model), layer)
    assert (kappa - alone).abs() > 1e-2 * kappa.abs()


FROZEN = {
    "body": ("body",),
    "layer": ("layer",),
    "weight": ("layer.weight",),
    "tail": ("tail",),
    "body and layer": ("body", "layer"),
    "body and tail": ("body", "tail"),
}


@MODES
@pytest.mark.parametrize("names", FROZEN.values(), ids=FROZEN)
def test_frozen_parts_stay_as_they_are(names: tuple[str, ...], mode: str) -> None:
    def build() -> nn.Module:
        model = Net()
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(names))
        return model

    before = seeded(build).state_dict()
    model = check(build, mode=mode)
    for name, p in model.named_parameters():
        assert p.requires_grad is not name.startswith(names)
        if not p.requires_grad:
            assert p.grad is None and torch.equal(p, before[name]), name


# ------------------------------------------------------------------------- what is called, and how it is


def substituted(call: Callable[..., Tensor]) -> Callable[[nn.Module], Tensor]:
    """The model called with other parameters, which depend on its own."""

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        others = {name: p.tanh() + 0.1 for name, p in model.named_parameters()}
        return F.cross_entropy(call(model, others, (x,)), y)

    return run


FUNCTIONAL = {"torch.func": torch.func.functional_call, "stateless": stateless.functional_call}


@MODES
@WHERE
@pytest.mark.parametrize("call", FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_call_counts_the_weight_that_it_substitutes(
    call: Callable[..., Tensor], head: bool, mode: str
) -> None:
    with warnings.catch_warnings(action="ignore"):  # stateless is deprecated
        check(partial(Net, head), substituted(call), mode=mode)


def adapted(model: nn.Module) -> dict[str, Tensor]:
    """The parameters after one differentiable inner step, as MAML makes it."""
    x, y = data()
    weights = dict(model.named_parameters())
    inner = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    return {name: w - 0.5 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}


@MODES
def test_kappa_at_adapted_weights(mode: str) -> None:
    """Observed around the outer call alone: kappa at the adapted weights, differentiated through the step."""
    model = seeded(Net)
    parameters = list(model.parameters())
    x, y = data()
    weights = adapted(model)

    def outer() -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (x + 0.3,)), y)

    with observe(model.layer) as layer:
        kappa = relative_flatness(outer(), layer, mode=mode)
    curvatures = reference.curvatures(outer, [model.layer], create_graph=True)
    wanted = reference.sum_of_kappas(curvatures, "neuronwise")
    torch.testing.assert_close(kappa, wanted, rtol=1e-9, atol=0)
    for got, g in zip(
        reference.gradient(kappa, parameters), reference.gradient(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(got, g, rtol=1e-8, atol=1e-12)


def two_calls(model: nn.Module, cache: bool = False) -> Tensor:
    x, y = data()
    with parametrize.cached() if cache else nullcontext():
        return F.cross_entropy(
            model.tail(model.layer(model.body(x)) + model.layer(x.sin().repeat(1, 2)[:, :6])), y
        )


@pytest.mark.parametrize("mode", ["exact", "full", "hutchinson"])
def test_calls_with_different_weights_are_refused(mode: str) -> None:
    message = r"different weights.*spectral_norm.*concatenated inputs.*parametrize.cached"
    model = seeded(partial(Net, make=COMPUTED["spectral_norm"]))
    with pytest.raises(RuntimeError, match=message):
        fam_on(model, mode).step(lambda: two_calls(model))
    plain = seeded(Net)
    x, y = data()

    def interpolated() -> Tensor:
        other = {name: 0.9 * p for name, p in plain.named_parameters()}
        return F.cross_entropy(plain(x) + torch.func.functional_call(plain, other, (x,)), y)

    fam = fam_on(plain, mode)
    with pytest.raises(RuntimeError, match=message):
        fam.step(interpolated)
    with pytest.raises(RuntimeError, match=r"derivative.*cannot be followed"):  # MAML, inner call and all
        fam.step(lambda: F.cross_entropy(torch.func.functional_call(plain, adapted(plain), (x,)), y))


@MODES
@pytest.mark.parametrize("name", ["weight_norm", "old weight_norm", "pruned", "LoRA"])
def test_weight_computed_anew_at_every_call(name: str, mode: str) -> None:
    check(partial(Net, make=COMPUTED[name]), two_calls, mode=mode)


@MODES
def test_spectral_norm_cached_over_two_calls(mode: str) -> None:
    """The remedy of the message; the reference takes the first call's weight for both."""
    check(partial(Net, make=COMPUTED["spectral_norm"]), partial(two_calls, cache=True), mode=mode)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "per-sample gradients": lambda f, x: torch.func.vmap(torch.func.grad(lambda a: f(a).sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x[0]),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "hessian": lambda f, x: torch.func.hessian(lambda a: f(a).sum())(x[0]),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_function_transforms_work_on_an_observed_model(transform: Callable[..., Any], frozen: bool) -> None:
    model = seeded(Net)
    model.body[3] = nn.ReLU()
    model.requires_grad_(not frozen)
    x, _ = data()
    plain = transform(model, x)
    with observe(model.layer):
        assert torch.equal(transform(model, x), plain)
    assert not observation._live.get(model.layer)


def test_loss_through_vmap_is_refused() -> None:
    model = seeded(Net)
    model.body[3] = nn.ReLU()
    fam, (x, y) = fam_on(model), data()
    with pytest.raises(RuntimeError, match=r"does not depend on an observed call of `layer` Linear"):
        fam.step(lambda: F.cross_entropy(torch.func.vmap(model)(x), y))


@MODES
@pytest.mark.parametrize("first", ["the user's hook", "FAM"])
def test_output_modified_by_a_forward_hook_belongs_to_the_tail(first: str, mode: str) -> None:
    def modify(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 2 * output + output.square()

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        z = model.layer(model.body(x))
        return F.cross_entropy(model.tail(2 * z + z.square()), y)

    kappa, moved = definition(Net, run)
    model = seeded(Net)
    if first == "FAM":
        fam = fam_on(model, mode)
        model.layer.register_forward_hook(modify)
    else:
        model.layer.register_forward_hook(modify)
        fam = fam_on(model, mode)
    fam.step(lambda: loss_of(model))
    assert_step(model, fam, kappa, moved)


def test_input_modified_by_a_forward_pre_hook_is_the_input() -> None:
    def build(how: str = "") -> nn.Module:
        model = Net()
        if how == "args":
            model.layer.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
        if how == "kwargs":
            model.layer.register_forward_pre_hook(
                lambda module, args, kwargs: ((), {"input": args[0].sin()}), with_kwargs=True
            )
        return model

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        return F.cross_entropy(model.tail(model.layer(model.body(x).sin())), y)

    for how in ("args", "kwargs"):
        kappa, moved = definition(build, run)
        model = seeded(partial(build, how))
        fam = fam_on(model)
        fam.step(lambda model=model: loss_of(model))
        assert_step(model, fam, kappa, moved)


@pytest.mark.parametrize("where", ["layer", "tail", "body"])
def test_full_backward_hooks_change_nothing(where: str) -> None:
    def build(hook: bool = True) -> nn.Module:
        model = Net()
        model.body[3] = nn.ReLU()  # torch forbids such hooks together with in-place operations
        if hook:
            getattr(model, where).register_full_backward_hook(lambda *args: None)
            getattr(model, where).register_full_backward_pre_hook(lambda *args: None)
        return model

    kappa, moved = definition(partial(build, False), loss_of)
    model = seeded(build)
    fam = fam_on(model)
    x, y = data()
    fam.step(lambda: F.cross_entropy(model(x.requires_grad_()), y))  # or the body's hook warns
    assert_step(model, fam, kappa, moved)


def test_layer_called_with_a_keyword() -> None:
    def run(model: nn.Module) -> Tensor:
        x, y = data()
        return F.cross_entropy(model.tail(model.layer(input=model.body(x))), y)

    check(Net, run, loss_of)


@pytest.mark.parametrize("make", [nn.Linear, COMPUTED["weight_norm"]], ids=["plain", "weight_norm"])
def test_calls_in_several_threads(make: Callable[[int, int], nn.Module]) -> None:
    """As nn.parallel.parallel_apply does it: one chunk of the batch in each thread."""
    x, y = data()

    def run(model: nn.Module) -> Tensor:
        outputs: dict[int, Tensor] = {}

        def work(i: int, chunk: Tensor) -> None:
            outputs[i] = model(chunk)

        threads = [threading.Thread(target=work, args=(i, c)) for i, c in enumerate(x.chunk(3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return F.cross_entropy(torch.cat([outputs[i] for i in range(3)]), y)

    check(partial(Net, make=make), run, loss_of)


def test_replicas_of_data_parallel_are_refused() -> None:
    model = seeded(Net)
    fam_on(model)
    replica = model._replicate_for_data_parallel()
    replica.layer = model.layer._replicate_for_data_parallel()
    replica.layer.weight, replica.layer.bias = model.layer.weight * 1, model.layer.bias * 1
    with observe(model.layer), pytest.raises(RuntimeError, match=r"DataParallel.*DistributedDataParallel"):
        replica(data()[0])
    with observe(model.layer), torch.no_grad():  # evaluation is fine
        torch.testing.assert_close(replica(data()[0]), model(data()[0]), rtol=0, atol=0)


# --------------------------------------------------------------------------------- copies of the model


def test_averaged_model_is_a_model_like_any_other() -> None:
    """A copy of an observed layer (EMA, SWA) carries the hook, which must do nothing there."""
    model, plain = seeded(Net), seeded(Net)
    fam = fam_on(model)
    average, expected = (AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for m in (model, plain))
    for _ in range(3):
        fam.zero_grad()
        fam.step(lambda: loss_of(model))
        average.update_parameters(model)
        plain.load_state_dict(model.state_dict())
        expected.update_parameters(plain)
    x, _ = data()
    for copied in (average, copy.deepcopy(average)):
        copied.eval().requires_grad_(False)
        output = copied(x)
        assert not output.requires_grad, "the copy's output would keep a graph that nobody asked for"
        assert torch.equal(output, expected(x))
        assert not observation._live.get(copied.module.layer)
        with torch.inference_mode():
            assert torch.equal(copied(x), output)
    trained = copy.deepcopy(average).requires_grad_(True)
    fam = FAM(trained.parameters(), torch.optim.SGD, trained.module.layer, LAM, lr=LR)
    fam.regularize(loss_of(trained))
    with observe(expected.module.layer) as layer:
        wanted = relative_flatness(loss_of(expected), layer)
    assert fam.last_kappa is not None
    torch.testing.assert_close(fam.last_kappa, wanted.detach(), rtol=0, atol=0)


def test_loss_of_student_and_averaged_teacher() -> None:
    """The teacher is a copy of the observed student: its calls are not the layer's."""

    def run(model: nn.Module, copier: Callable[[nn.Module], nn.Module]) -> Tensor:
        x, _ = data()
        return F.cross_entropy(model(x), copier(model)(x + 0.1).softmax(1).detach())

    def rebuilt(model: nn.Module) -> nn.Module:
        other = Net()
        other.load_state_dict(model.state_dict())
        return other

    check(Net, partial(run, copier=copy.deepcopy), partial(run, copier=rebuilt))


# ------------------------------------------------------------------------------- without gradient mode


def test_evaluation_leaves_no_trace() -> None:
    model = seeded(Net)
    fam = fam_on(model)
    kappa, moved = definition(Net, loss_of)
    x, _ = data()
    loss = loss_of(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(x)
            assert len(observation._live[model.layer]) == 1
    fam.regularize(loss).backward()
    fam.step()
    assert_step(model, fam, kappa, moved)
    del loss
    gc.collect()
    assert not observation._live[model.layer]


@MODES
def test_outputs_partly_used_without_gradient(mode: str) -> None:
    def run(model: nn.Module) -> Tensor:
        x, y = data()
        z = model.layer(model.body(x))
        with torch.no_grad():
            certain = z.softmax(1).amax(1)
            model.layer(model.body(2 * x))
        mixed = torch.cat([3 * z[:3], z[3:].detach()])
        return (certain * F.cross_entropy(model.tail(mixed), y, reduction="none")).mean()

    check(Net, run, mode=mode)


def test_features_from_inference_mode() -> None:
    """A body run in inference mode, as for a linear probe; torch wants its output cloned."""

    def build() -> nn.Module:
        model = Net()
        model.body.requires_grad_(False)
        return model

    def run(model: nn.Module) -> Tensor:
        x, y = data()
        with torch.inference_mode():
            phi = model.body(x)
        return F.cross_entropy(model.tail(model.layer(phi.clone())), y)

    check(build, run, loss_of)


# ------------------------------------------------------------------------------- layers that are refused


class Adapted(nn.Module):
    """How PEFT wraps a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 4)
        self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LoRA wrapper": (Adapted, r"wrapper Adapted.*layer.base_layer.*torch.nn.utils.parametrize"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), r"`layer`.*got MultiheadAttention,.*hutchinson"),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), r"got Bilinear\(.*hutchinson"),
    "recurrent": (lambda: nn.LSTM(2, 3), r"got LSTM\(2, 3\).*hutchinson"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_when_named(make: Callable[[], nn.Module], message: str) -> None:
    layer = make()
    with pytest.raises(TypeError, match=message):
        FAM(layer.parameters(), torch.optim.SGD, layer, LAM, lr=LR)
    with pytest.raises(TypeError, match=message):
        observe(layer)
    assert not layer._forward_hooks


def test_base_of_a_lora_wrapper_is_accepted() -> None:
    """As the message says: its own weight counts, the adapter's output is a part of what follows."""

    class Model(Net):
        def __init__(self) -> None:
            super().__init__(make=lambda m, d: Adapted())

    kappa, moved = definition(Model, loss_of, "layer.base_layer")
    model = seeded(Model)
    fam = FAM(model.parameters(), torch.optim.SGD, model.layer.base_layer, LAM, lr=LR)
    fam.step(lambda: loss_of(model))
    assert_step(model, fam, kappa, moved)


# ---------------------------------------------------------------------------- tails without derivatives


class Attending(nn.Module):
    """The layer feeds a transformer block, and the body contains one."""

    def __init__(self) -> None:
        super().__init__()
        block = partial(nn.TransformerEncoderLayer, 4, 2, 8, dropout=0.0, batch_first=True)
        self.body, self.layer, self.tail, self.head = block(), nn.Linear(4, 4), block(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.layer(self.body(x))).mean(1))


def attention_loss(model: nn.Module, tail_only: bool = False, fused: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(3, 4, 4, generator=generator), torch.tensor([0, 2, 1])
    with nullcontext() if fused or tail_only else sdpa_kernel(SDPBackend.MATH):
        z = model.layer(model.body(x))
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        return F.cross_entropy(model.head(model.tail(z).mean(1)), y)


def operations(loss: Tensor) -> str:
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [below for below, _ in node.next_functions]
    return " ".join(node.name() for node in seen)


@MODES
def test_fused_attention_behind_the_layer_names_the_math_kernel(mode: str) -> None:
    model = seeded(Attending)
    fam = fam_on(model, mode)
    assert "FlashAttention" in operations(attention_loss(model, fused=True))
    with pytest.raises(RuntimeError, match=r"torch.nn.attention.sdpa_kernel\(SDPBackend.MATH\)"):
        fam.step(lambda: attention_loss(model, fused=True))


@pytest.mark.parametrize("mode", ["exact", pytest.param("full", marks=pytest.mark.slow)])
def test_math_attention_behind_the_layer(mode: str) -> None:
    """With the remedy, also where attention before the layer stays fused."""
    run = partial(attention_loss, tail_only=True)
    kappa, moved = definition(Attending, attention_loss)
    model = seeded(Attending)
    assert "FlashAttention" in operations(run(model))
    fam = fam_on(model, mode)
    fam.step(lambda: run(model))
    assert_step(model, fam, kappa, moved)


def test_output_of_multihead_attention_is_never_called() -> None:
    model = seeded(Attending)
    fam = FAM(model.parameters(), torch.optim.SGD, model.tail.self_attn.out_proj, LAM, lr=LR)
    with pytest.raises(RuntimeError, match=r"although on its weight.*out_proj.weight.*hutchinson"):
        fam.step(lambda: attention_loss(model))
    weight = model.tail.self_attn.out_proj.weight
    fam = FAM(model.parameters(), torch.optim.SGD, weight, LAM, "full", lr=LR)
    loss = attention_loss(model)
    hessian = reference.brute_force_hessian(loss, weight).reshape(4, 4, 4, 4)
    fam.regularize(loss)
    assert fam.last_kappa is not None
    wanted = reference.kappa(weight, hessian, "neuronwise").detach()
    torch.testing.assert_close(fam.last_kappa, wanted, rtol=1e-9, atol=0)


# ----------------------------------------------------------------------- losses with derivatives in them


def gradient_penalty(model: nn.Module, at: str) -> Tensor:
    """The cross-entropy and the square of its gradient, in the input or in something behind the layer."""
    x, y = data()
    x.requires_grad_()
    z = model.layer(model.body(x))
    h = model.tail[0](z)
    loss = F.cross_entropy(model.tail[1:](h), y)
    (gradient,) = torch.autograd.grad(loss, {"x": x, "z": z, "h": h}[at], create_graph=True)
    return loss + 10 * gradient.square().sum()


@MODES
@pytest.mark.parametrize("at", ["x", "z", "h"])
@pytest.mark.parametrize(
    "make", [nn.Linear, COMPUTED["weight_norm"], pruned], ids=["", "weight_norm", "pruned"]
)
def test_gradient_penalty(make: Callable[[int, int], nn.Module], at: str, mode: str) -> None:
    """Taken through the layer, the gradient multiplies with its weight once more."""
    check(partial(Net, make=make), partial(gradient_penalty, at=at), mode=mode)


def test_gradient_penalty_in_hutchinson_averages_to_kappa() -> None:
    model = seeded(Net)
    with observe(model.layer) as layer:
        loss = gradient_penalty(model, "x")
    kappa = relative_flatness(loss, layer, mode="full")
    settings: dict[str, Any] = {"mode": "hutchinson", "n_samples": 50}
    estimates = torch.stack([relative_flatness(loss, layer, **settings) for _ in range(20)]).detach()
    error = (estimates.mean() - kappa).abs() / (estimates.std() / 20**0.5)
    assert error < 4, f"{error:.1f} standard errors from {kappa}"


def test_gradient_penalty_through_a_weight_that_cannot_be_followed() -> None:
    def twice(model: nn.Module) -> Tensor:
        return gradient_penalty(model, "x") + two_calls(model)

    message = r"`loss` contains a derivative.*frozen.*requires_grad_\(\).*parametrize.cached\(\)"
    frozen = seeded(Net)
    frozen.layer.requires_grad_(False)
    with pytest.raises(RuntimeError, match=message):
        fam_on(frozen).step(lambda: gradient_penalty(frozen, "x"))
    computed = seeded(partial(Net, make=COMPUTED["weight_norm"]))
    with pytest.raises(RuntimeError, match=message):
        fam_on(computed).step(lambda: twice(computed))
    # the remedies
    frozen.layer.requires_grad_(True)
    trained = [p for name, p in frozen.named_parameters() if name != "layer.weight"]
    with pytest.warns(UserWarning, match="not among the parameters given to FAM"):
        fam = FAM(trained, torch.optim.SGD, frozen.layer, LAM, lr=LR)
    before = frozen.layer.weight.detach().clone()
    fam.step(lambda: gradient_penalty(frozen, "x"))
    assert torch.equal(frozen.layer.weight, before)

    def cached(model: nn.Module) -> Tensor:
        with parametrize.cached():
            return twice(model)

    check(partial(Net, make=COMPUTED["weight_norm"]), cached, mode="full")


def test_gradient_penalty_through_a_transposed_convolution_is_refused() -> None:
    layer = nn.ConvTranspose1d(2, 3, 2)
    fam = FAM(layer.parameters(), torch.optim.SGD, layer, LAM, lr=LR)
    x = torch.randn(4, 2, 3, requires_grad=True)
    z = layer(x).tanh()
    (gradient,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"through `layer` ConvTranspose1d.*does not support"):
        fam.regularize(z.square().sum() + gradient.square().sum())


@pytest.mark.parametrize("at", ["x", "z"])
def test_gradient_penalty_through_layer_norm_is_refused(at: str) -> None:
    model = seeded(Net)
    model.tail.insert(1, nn.LayerNorm(4))
    for layer in (model.layer, model.layer.weight):
        fam = FAM(model.parameters(), torch.optim.SGD, layer, LAM, "full", lr=LR)
        with pytest.raises(RuntimeError, match=r"derivative through nn.LayerNorm.*elementary operations"):
            fam.regularize(gradient_penalty(model, at))


class Recurrent(nn.Module):
    """The layer feeds a recurrent network."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.recurrent, self.head = nn.Linear(4, 4), kind(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.layer(x))[0][:, -1])


def recurrent_loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    like = model.layer.weight
    x = torch.randn(3, 4, 4, generator=generator).to(like)
    return F.cross_entropy(model(x), torch.tensor([0, 2, 1], device=like.device))


KINDS = pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])


@KINDS
def test_recurrent_tail(kind: type[nn.RNNBase]) -> None:
    check(partial(Recurrent, kind), recurrent_loss)


@KINDS
def test_recurrent_tail_in_single_precision(kind: type[nn.RNNBase], device: str) -> None:
    """Single precision is what fused kernels exist for; an accelerator needs the remedy of the message."""
    kappa, _ = definition(partial(Recurrent, kind), recurrent_loss)
    model = seeded(partial(Recurrent, kind)).to(device, torch.float32)
    fam = fam_on(model)
    if device == "cuda":
        with pytest.raises(RuntimeError, match=r"torch.backends.cudnn.flags\(enabled=False\)"):
            fam.regularize(recurrent_loss(model))
    with torch.backends.cudnn.flags(enabled=False):
        loss = recurrent_loss(model)
    fam.regularize(loss).backward()
    assert fam.last_kappa is not None
    torch.testing.assert_close(fam.last_kappa.cpu().double(), kappa, rtol=1e-4, atol=0)


class CuDnn(torch.autograd.Function):
    """tanh, which has a derivative but no second one, and says so in the words of a cuDNN RNN."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _CuDnnBackward.apply(gradient, *ctx.saved_tensors)


class _CuDnnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, z: Tensor) -> Tensor:
        return gradient * (1 - z.tanh().square())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "the derivative for '_cudnn_rnn_backward' is not implemented. Double backwards is not supported "
            "for CuDNN RNNs due to limitations in the CuDNN API."
        )


@MODES
def test_cudnn_recurrence_names_the_flag(mode: str) -> None:
    model = seeded(Net)
    fam, (x, y) = fam_on(model, mode), data()
    with pytest.raises(
        RuntimeError, match=r"second derivatives.*torch.backends.cudnn.flags\(enabled=False\)"
    ):
        fam.step(lambda: F.cross_entropy(model.tail(CuDnn.apply(model.layer(model.body(x)))), y))
    fam_on(model).step(lambda: F.cross_entropy(model(CuDnn.apply(x)), y))  # before the layer it is welcome
