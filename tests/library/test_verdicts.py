"""What is found out about one tail is never applied to another, and never outlives the numbers it was of.

Nothing is reset between these models: they meet in one process, as a user's do.
"""

from __future__ import annotations

import copy
import gc
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fam_optim import observe, relative_flatness
from fam_optim.estimators import exact as exact_module
from fam_optim.estimators import rows
from fam_optim.estimators.curvature import Curvature
from fam_optim.graph import flags, verdicts

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("float64")


class Coupled(nn.Module):
    """``tanh(z + w * mean of z)`` over the classes (axis 1) or over the samples (axis 0).

    With w trained samples interact even where w is 0, in the gradient; with w fixed they then do not.
    """

    def __init__(self, axis: int, w: float, size: int = 4, train: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(size, size)
        self.w, self.axis = nn.Parameter(torch.tensor(w), requires_grad=train), axis

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return torch.tanh(z + self.w * z.mean(self.axis, keepdim=True))


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3])


def kappa(model: Coupled, mode: str = "exact", x: Tensor = X) -> Tensor:
    with observe(model.layer) as layer:
        loss = F.cross_entropy(model(x), torch.arange(len(x)) % 4)
    return relative_flatness(loss, layer, mode=mode)


def assert_as_full(model: Coupled, mode: str = "exact") -> None:
    """Value and gradient, in all parameters, of the definition."""
    results = []
    for one in (mode, "full"):
        value = kappa(model, one)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(value, trained, allow_unused=True)
        results.append([value.detach(), *(g for g in gradient if g is not None)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


def test_a_tail_of_the_same_operations_along_another_axis() -> None:
    """The samples of the second model interact, with a weight that is zero and a gradient that is not."""
    assert_as_full(Coupled(axis=1, w=0.5))
    assert_as_full(Coupled(axis=0, w=0.0))


def test_a_coupled_model_does_not_make_an_independent_one_fail() -> None:
    x = torch.randn(32, 64)
    with pytest.raises(RuntimeError, match="takes 2048 Hessian-vector products"):
        kappa(Coupled(axis=0, w=0.5, size=64, train=False), x=x)
    assert kappa(Coupled(axis=1, w=0.5, size=64, train=False), x=x).isfinite()
    assert kappa(Coupled(axis=0, w=0.0, size=64, train=False), x=x).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_says_nothing(bad: float) -> None:
    model = Coupled(axis=0, w=0.0)
    x = X.clone()
    x[0, 0] = bad
    assert not kappa(model, x=x).isfinite()
    assert_as_full(model)


def test_models_that_take_turns() -> None:
    """Two models of one kind; one begins to couple its rows."""
    first, second = (Coupled(axis=0, w=0.0, train=False) for _ in range(2))
    for step in range(40):
        if step == 20:
            second.w.data.fill_(0.9)
        assert_as_full(first)
        assert_as_full(second)


def test_a_copy_is_another_model() -> None:
    model = Coupled(axis=0, w=0.0, train=False)
    assert_as_full(model)
    other = copy.deepcopy(model)
    other.w.data.fill_(0.9)
    assert_as_full(other)


def test_another_number_of_samples_is_another_kind_of_tail() -> None:
    """``z[:, :2]`` and ``z[:2]`` are one sequence of operations."""

    class Sliced(Coupled):
        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            return torch.tanh(z + self.w * (z[:, :1] if len(x) < 4 else z[:1]))

    model = Sliced(axis=0, w=0.7)
    for n in (3, 4, 3, 2, 4):
        values = [kappa(model, mode, x=X[:n]) for mode in ("exact", "full")]
        torch.testing.assert_close(*values, rtol=1e-9, atol=0)


def test_a_refusal_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that cease to interact: the error of the first evaluation is not that of the second."""
    monkeypatch.setattr(exact_module, "MAX_PRODUCTS", 4)
    model = Coupled(axis=0, w=0.9, train=False)
    with pytest.raises(RuntimeError, match="takes 16 Hessian-vector products"):
        kappa(model)
    model.w.data.zero_()
    assert kappa(model).isfinite()


def test_a_verdict_that_rows_interact_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    products = 0
    original = Curvature.hvp

    def counted(self: Curvature, *args: Any, **kwargs: Any) -> list[Tensor]:
        nonlocal products
        products += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Curvature, "hvp", counted)
    model = Coupled(axis=0, w=0.9, train=False)
    kappa(model)
    model.w.zero_()
    looked = []
    for _ in range(verdicts.RETRIED_EVERY + 2):
        products = 0
        kappa(model)
        looked.append(products > 0)  # the slow way multiplies in weight space
    assert looked.index(True) == verdicts.RETRIED_EVERY - 1
    assert looked[-1], "and is fast from then on"


def test_memory_dies_with_the_layer_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "CAPACITY", 3)
    gc.collect()
    before = len(verdicts._memories)
    model = Coupled(axis=0, w=0.0, train=False)
    for n in (4, 3, 2, 4, 3, 2):
        for wide in (1, 2):
            x = X[:n]
            with observe(model.layer) as layer:
                z = model(x)
                loss = F.cross_entropy(z.repeat(1, wide), Y[:n])
            relative_flatness(loss, layer)
    memory = verdicts.of(model.layer)
    assert 1 <= len(memory._entries) <= 3
    assert all(len(key) <= 32 for key in memory._entries)
    del model, memory, layer, loss, z
    gc.collect()
    assert len(verdicts._memories) == before


def test_on_an_accelerator_a_failed_check_is_said_at_the_next_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There nobody waits for the check: kappa of one evaluation may be wrong, but not in silence."""
    model = Coupled(axis=0, w=0.0, train=False)
    assert_as_full(model)
    monkeypatch.setattr(flags, "reading_waits", lambda tensor: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kappa(model)
    model.w.data.fill_(0.9)
    kappa(model)
    with pytest.warns(UserWarning, match=r"last kappa of `layer` Linear\(in_features=4.*was not exact"):
        again = kappa(model)
    torch.testing.assert_close(again, kappa(model, "full"), rtol=1e-9, atol=0)
    assert_as_full(model)


def test_no_device_assertion(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the CUDA context."""
    monkeypatch.setattr(torch, "_assert_async", None)
    monkeypatch.setattr(flags, "reading_waits", lambda tensor: True)
    model = Coupled(axis=0, w=0.0, train=False)
    for w in (0.0, 0.0, 0.9):
        model.w.data.fill_(w)
        kappa(model)


class Unsteady(torch.autograd.Function):
    """tanh, whose backward rounds differently each time, as a kernel with atomic additions does."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return grad * (1 - z.tanh().square()) * (1 + 1e-13 * torch.randn_like(grad))  # some 500 roundings


@pytest.mark.parametrize("waits", [False, True], ids=["read at once", "read later"])
def test_kernels_that_round_differently_each_time(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "reading_waits", lambda tensor: waits)
    monkeypatch.setattr(exact_module, "MAX_PRODUCTS", 4)
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if not waits else "ignore")
        for _ in range(20):
            with observe(layer) as observed:
                loss = F.cross_entropy(Unsteady.apply(layer(X)), Y)
            relative_flatness(loss.detach() + (loss - loss.detach()), observed)


OUT_OF_MEMORY: dict[str, Callable[[], RuntimeError]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
@pytest.mark.parametrize("where", ["vmap", "derivatives"])
def test_out_of_memory_is_no_verdict(
    error: Callable[[], RuntimeError], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error()

    model = Coupled(axis=0, w=0.0) if where == "derivatives" else Coupled(axis=1, w=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(*((torch, "vmap") if where == "vmap" else (rows, "_derivatives")), fail)
        with pytest.raises(type(error()), match="memory"):
            kappa(model)
    assert_as_full(model)


def test_computed_weights_of_two_calls() -> None:
    """Calls with different weights are refused whenever it happens, and not for ever."""
    layer = nn.Linear(4, 4)

    def loss(other: bool) -> Tensor:
        weights = [torch.randn(4, 4, requires_grad=True) if other else layer.weight * 1 for _ in range(2)]
        if not other:
            weights[1] = weights[0] * 1
        z = sum(torch.func.functional_call(layer, {"weight": w, "bias": layer.bias}, (X,)) for w in weights)
        return F.cross_entropy(torch.tanh(z), Y)

    for other in (False, True, False):
        with observe(layer) as observed:
            value = loss(other)
        if other:
            with pytest.raises(RuntimeError, match="made with different weights"):
                relative_flatness(value, observed)
        else:
            assert relative_flatness(value, observed).isfinite()
