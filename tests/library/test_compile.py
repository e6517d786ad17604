"""torch.compile: whole models, parts of them and what must be refused, against the definition.

A compiled region can be differentiated once. A softmax cross-entropy on the layer's output needs no more,
whatever is compiled up to there; other tails must stay uncompiled, and say so if they are not.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations

from fam_optim import FAM, dataset_relative_flatness, observe, relative_flatness
from tests import reference
from tests.support import (
    LAM,
    LR,
    TORCH,
    Style,
    assert_close,
    batch,
    by_style,
    calls_backward,
    penalised,
    recorded_calls,
    regularizes,
)

COMPILING = ["aot_eager", "inductor"]
BACKENDS = ["eager", *COMPILING]


@pytest.fixture(autouse=True)
def fresh(float64: None, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Float64, nothing compiled before, and nothing may be compiled twice."""
    caplog.set_level(logging.WARNING, "torch.__trace")  # thousands of lines beside a failure
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


COMPILES_LAYERS = TORCH >= (2, 7)
"""torch 2.6 compiles no module of torch.nn by itself: where a graph breaks at one, it stays uncompiled."""


class Body(nn.Sequential):
    """One that torch 2.6 compiles too, since its forward is written here."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class MiddleAndHead(nn.Module):
    """A layer to regularise in the middle and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Body(nn.Linear(5, 6), nn.Tanh())
        self.middle = nn.Linear(6, 4)
        self.after = nn.Tanh()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(self.middle(self.body(x))))


class Normed(MiddleAndHead):
    """A parametrised layer, whose weight is computed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.head)


class Auxiliary(nn.Module):
    """A second head in the region that ends with the features: both are outputs of one graph node."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.auxiliary = nn.Linear(6, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        second = self.auxiliary(features)
        return self.head(features), second


class Tokens(nn.Module):
    """A sequence model, whose head's output is a view of a product, with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(3, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        features = self.embedding((x > 0).long() + (x > 1).long())
        return self.head(features + torch.tanh(self.mix(features)))


def squares(z: Tensor, y: Tensor) -> Tensor:
    """A loss without a closed form."""
    return (z.softmax(-1) - F.one_hot(y, 3)).square().sum(1).mean()


def of_heads(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], y) + 0.5 * F.cross_entropy(outputs[1], y)


def of_tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y[:, None].expand(z.shape[:2]).flatten())


def build(model: Any, layer: Any, **settings: Any) -> FAM:
    return FAM(model.parameters(), torch.optim.SGD, layer, LAM, lr=LR, **settings)


def check_training(
    run: Any,
    model: nn.Module,
    optimizer: FAM,
    twin: nn.Module,
    layers: list[str],
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    style: Style | None = None,
) -> None:
    """Trains `model` through `run`, and an uncompiled twin on the gradient of its definition."""
    style = style or partial(regularizes, loss_fn=loss_fn)
    parameters = list(twin.parameters())
    for step in range(4):
        x, y = batch(step)
        style(run, optimizer, x, y)

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return loss_fn(twin(x), y)

        value = penalised(loss, *(twin.get_submodule(name) for name in layers))
        gradients = reference.gradient(value, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, gradients, strict=True):
                p.sub_(g, alpha=LR)
        assert_close(list(model.parameters()), parameters, f"weights after step {step}")
        if step == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and counters["stats"]["unique_graphs"] == graphs, "compiled in the first step alone"


# What works


@by_style
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_model_with_the_loss_outside(backend: str, style: Style) -> None:
    model = MiddleAndHead()
    optimizer = build(model, model.head)
    compiled = torch.compile(model, backend=backend)
    check_training(compiled, model, optimizer, MiddleAndHead(), ["head"], style=style)
    before_and_at_the_layer = 1 + COMPILES_LAYERS  # the graph breaks there and nowhere else
    assert counters["stats"]["unique_graphs"] == before_and_at_the_layer


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_before_fam_is_built(backend: str) -> None:
    model = MiddleAndHead()
    compiled: Any = torch.compile(model, backend=backend)
    check_training(compiled, model, build(compiled, compiled.head), MiddleAndHead(), ["head"])


@by_style
@pytest.mark.parametrize("backend", BACKENDS)
def test_backbone_with_fullgraph(backend: str, style: Style) -> None:
    model = MiddleAndHead()
    model.body.compile(backend=backend, fullgraph=True)
    optimizer = build(model, [model.middle, model.head])
    check_training(model, model, optimizer, MiddleAndHead(), ["middle", "head"], style=style)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_model_compiled_in_place(backend: str) -> None:
    model = MiddleAndHead()
    model.compile(backend=backend)
    check_training(model, model, build(model, model.head), MiddleAndHead(), ["head"])


@pytest.mark.skipif(not COMPILES_LAYERS, reason="torch 2.6 compiles no module of torch.nn by itself")
@pytest.mark.parametrize("how", ["in place", "wrapped"])
@pytest.mark.parametrize("backend", COMPILING)
def test_layer_compiled_by_itself(backend: str, how: str) -> None:
    model = MiddleAndHead()
    if how == "in place":
        model.head.compile(backend=backend)
    else:
        model.head = torch.compile(model.head, backend=backend)  # type: ignore[assignment]
    optimizer = build(model, model.head)
    check_training(model, model, optimizer, MiddleAndHead(), ["head"], squares)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [(MiddleAndHead, squares), (Normed, F.cross_entropy), (Auxiliary, of_heads), (Tokens, of_tokens)],
    ids=["another loss", "weight norm", "auxiliary head", "tied tokens"],
)
def test_models_and_losses(make: Callable[[], Any], loss_fn: Callable[..., Tensor], backend: str) -> None:
    model = make()
    optimizer = build(model, model.head)
    check_training(torch.compile(model, backend=backend), model, optimizer, make(), ["head"], loss_fn)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_in_the_middle_with_what_follows_left_out(backend: str) -> None:
    model = MiddleAndHead()
    optimizer = build(model, model.middle)
    for module in (model.after, model.head):
        module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    check_training(torch.compile(model, backend=backend), model, optimizer, MiddleAndHead(), ["middle"])


def test_back_end_without_aot_autograd_can_have_the_layer_anywhere() -> None:
    model = MiddleAndHead()
    optimizer = build(model, model.middle)
    check_training(
        torch.compile(model, backend="eager"), model, optimizer, MiddleAndHead(), ["middle"], squares
    )


def test_evaluation_between_epochs_compiles_once() -> None:
    model = MiddleAndHead()
    optimizer = build(model, model.head)
    compiled: Any = torch.compile(model, backend="aot_eager")
    graphs = []
    with torch._dynamo.config.patch(error_on_recompile=False):  # without gradients it is another graph
        for epoch in range(3):
            compiled.train()
            for step in range(2):
                regularizes(compiled, optimizer, *batch(step))
            compiled.eval()
            with torch.no_grad():
                compiled(batch(epoch)[0])
            x, y = batch(9)
            measured = dataset_relative_flatness(compiled, model.head, F.cross_entropy, [(x, y)])
            with observe(model.head) as layer:
                loss = F.cross_entropy(model(x), y)
            assert_close([measured], [relative_flatness(loss, layer).detach()], "kappa of the data set")
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2], graphs


@pytest.mark.parametrize("make", [MiddleAndHead, Normed], ids=["Net", "Normed"])
def test_evaluation_with_fullgraph(make: type[MiddleAndHead]) -> None:
    model = make()
    optimizer = build(model, model.head)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, y = batch(0)
    with torch.no_grad():
        assert_close([compiled(x)], [model(x)], "outputs")
    regularizes(model, optimizer, x, y)


@pytest.mark.parametrize("what", ["step", "step with a closure"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step(backend: str, what: str) -> None:
    model = MiddleAndHead()
    optimizer = build(model, model.head)

    def plain_step(run: Any, optimizer: FAM, x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.regularize(F.cross_entropy(run(x), y)).backward()
        step()

    def step() -> None:
        optimizer.step()

    def closure_step(run: Any, optimizer: FAM, x: Tensor, y: Tensor) -> None:
        calls_backward(run, optimizer, x, y)

    if what == "step":
        step = torch.compile(step, backend=backend)
        style: Any = plain_step
    else:
        style = torch.compile(closure_step, backend=backend)
    check_training(model, model, optimizer, MiddleAndHead(), ["head"], style=style)


def test_forwards_that_are_never_regularized_do_not_pile_up() -> None:
    model = MiddleAndHead()
    build_alive = build(model, model.head)
    compiled: Any = torch.compile(model, backend="aot_eager")

    def live() -> int:
        gc.collect()
        return sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects())

    compiled(batch(0)[0])
    before = live()
    for step in range(20):
        compiled(batch(step)[0])
    assert live() <= before
    assert not recorded_calls(model.head)
    regularizes(compiled, build_alive, *batch(0))
    assert live() <= before + sum(1 for p in model.parameters() if p.grad is not None) + 1


# What is refused

COMPILED_TAIL = r"region compiled by torch.compile has none.*model\.body\.compile\(\)"


def layer_in_the_middle(model: MiddleAndHead, backend: str, **settings: Any) -> None:
    optimizer = build(model, model.middle, **settings)
    regularizes(torch.compile(model, backend=backend), optimizer, *batch(0))


def parameter(model: MiddleAndHead, backend: str) -> None:
    optimizer = build(model, model.head.weight, mode="hutchinson")
    regularizes(torch.compile(model, backend=backend), optimizer, *batch(0))


def operation_behind_the_layer(model: MiddleAndHead, backend: str) -> None:
    optimizer = build(model, model.head)
    compiled: Any = torch.compile(lambda x: model(x) / 2, backend=backend)
    regularizes(compiled, optimizer, *batch(0))


def compiled_loss(model: MiddleAndHead, backend: str) -> None:
    optimizer = build(model, model.head)
    loss_fn = torch.compile(lambda z, y: F.cross_entropy(z, y), backend=backend)  # torch 2.6: not itself
    regularizes(model, optimizer, *batch(0), loss_fn=loss_fn)


def loss_in_the_model(model: MiddleAndHead, backend: str) -> None:
    optimizer = build(model, model.head)
    x, y = batch(0)
    forward = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=backend)
    optimizer.regularize(forward(x, y)).backward()
    optimizer.step()


def training_step(model: MiddleAndHead, backend: str) -> None:
    optimizer = build(model, model.head)
    torch.compile(partial(regularizes, model, optimizer), backend=backend)(*batch(0))


REFUSED = {
    "layer in the middle": layer_in_the_middle,
    "hutchinson": partial(layer_in_the_middle, mode="hutchinson"),
    "full": partial(layer_in_the_middle, mode="full"),
    "value alone": partial(layer_in_the_middle, detach_hessian=True),
    "parameter": parameter,
    "operation behind the layer": operation_behind_the_layer,
    "compiled loss": compiled_loss,
    "loss in the model": loss_in_the_model,
    "training step": training_step,
}


@pytest.mark.parametrize(
    ("attempt", "backend"),
    [pytest.param(attempt, "aot_eager", id=name) for name, attempt in REFUSED.items()]
    + [pytest.param(REFUSED[name], "inductor", id=f"{name}, inductor") for name in list(REFUSED)[::3]],
)
def test_compiled_tail_names_the_remedy(attempt: Callable[[MiddleAndHead, str], None], backend: str) -> None:
    model = MiddleAndHead()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=COMPILED_TAIL):
        attempt(model, backend)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.skipif(TORCH < (2, 8), reason="torch before 2.8 cannot be told why a graph breaks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_model_with_fullgraph_names_the_remedy(backend: str) -> None:
    model = MiddleAndHead()
    optimizer = build(model, model.head)
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match=r"fam_optim observes.*model\.body\.compile\(fullgraph=True\)"):
        regularizes(compiled, optimizer, *batch(0))


@pytest.mark.parametrize("backend", COMPILING)
def test_model_that_ran_compiled_before_names_the_remedy(backend: str) -> None:
    model = MiddleAndHead()
    compiled: Any = torch.compile(model, backend=backend)
    x, y = batch(0)
    compiled(x)
    optimizer = build(model, model.head)
    with pytest.raises(RuntimeError, match=r"ran compiled before.*torch\.compiler\.reset\(\).*_orig_mod"):
        regularizes(compiled, optimizer, x, y)
    with observe(model.head) as layer:  # the first remedy
        loss = F.cross_entropy(compiled._orig_mod(x), y)
    assert relative_flatness(loss, layer) > 0
    torch.compiler.reset()  # the second
    check_training(compiled, model, optimizer, MiddleAndHead(), ["head"])


def test_model_that_ran_compiled_in_a_closure_before_names_the_remedy() -> None:
    model = MiddleAndHead()
    compiled: Any = torch.compile(model, backend="aot_eager")
    earlier = FAM(model.parameters(), torch.optim.SGD, model.middle, 0.0, lr=LR)
    calls_backward(compiled, earlier, *batch(0))
    optimizer = build(model, model.head)
    with pytest.raises(RuntimeError, match=r"no loss.*depends on `layer`") as raised:
        calls_backward(compiled, optimizer, *batch(0))
    assert "torch.compiler.reset()" in str(raised.value.__cause__)
