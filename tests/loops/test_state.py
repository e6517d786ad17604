"""torch.distributed.checkpoint: the state is the base's, by parameter names, even before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from fam_optim import FAM
from tests.support import LAM, samples, seeded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is, on purpose

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full on the CPU": {"full_state_dict": True, "cpu_offload": True},
}
by_base = pytest.mark.parametrize("base", BASES)
by_base_and_options = pytest.mark.parametrize(
    ("base", "options"),
    [
        pytest.param(base, options, id=f"{base}, {name}")
        for base in BASES
        for name, options in OPTIONS.items()
        if base != "SGD" or name == "default"  # torch's other ways need a state to find the device by
    ],
)


@pytest.fixture(params=["no process group", "gloo"])
def process_group(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """A single process, alone or as a group of one."""
    if request.param == "gloo":
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if request.param == "gloo":
        dist.destroy_process_group()


def build_net(seed: int) -> nn.Sequential:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    return seeded(network, seed).double()


def groups(net: nn.Sequential) -> list[dict[str, Any]]:
    return [
        {"params": net[:3].parameters()},
        {"params": net[3].parameters(), "weight_decay": 0.01},
    ]


def build_fam(base: str, seed: int = 0, lam: float = LAM, **settings: Any) -> tuple[nn.Sequential, FAM]:
    make, kwargs = BASES[base]
    net = build_net(seed)
    return net, FAM(groups(net), make, net[3], lam, **settings, **kwargs)


def build_plain(base: str, seed: int = 0) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    make, kwargs = BASES[base]
    net = build_net(seed)
    return net, make(groups(net), **kwargs)


def train(net: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        x, y = samples(step, 8, dtype=torch.float64)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        (optimizer.regularize(loss) if isinstance(optimizer, FAM) else loss).backward()
        optimizer.step()


def assert_same_throughout(actual: Any, expected: Any, where: str) -> None:
    """Equal to the last bit, all the way down."""
    if isinstance(expected, dict):
        assert list(map(str, actual)) == list(map(str, expected)), f"{where}: other keys"
        for key in expected:
            assert_same_throughout(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):  # torch makes lists of Adam's betas
        assert len(actual) == len(expected), f"{where}: other length"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same_throughout(a, e, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected), f"{where}: differs by {(actual - expected).abs().max():.1e}"
    else:
        assert actual == expected, f"{where}: {actual} instead of {expected}"


def through_a_file(state: dict[str, Any], empty: dict[str, Any], path: Path) -> dict[str, Any]:
    """Saved by torch.distributed.checkpoint and loaded into a state of the same form."""
    dcp.save(state, checkpoint_id=path)
    dcp.load(empty, checkpoint_id=path)
    return empty


@by_base_and_options
@pytest.mark.usefixtures("process_group")
def test_state_before_the_first_step_is_the_bases(base: str, options: dict[str, Any]) -> None:
    """torch makes the state by a step at rate zero, which trains nothing, regularised or not."""
    net, fam = build_fam(base)
    plain, optimizer = build_plain(base)
    start = copy.deepcopy(net.state_dict())
    state = get_optimizer_state_dict(net, fam, options=StateDictOptions(**options))
    assert_same_throughout(
        state, get_optimizer_state_dict(plain, optimizer, options=StateDictOptions(**options)), "state"
    )
    assert_same_throughout(net.state_dict(), start, "model")
    assert [g["lr"] for g in fam.param_groups] == [BASES[base][1]["lr"]] * 2
    assert all(p.grad is None for p in net.parameters())
    # The protection against steps without kappa is as it was.
    net(torch.randn(8, 5, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match="regularize"):
        fam.step()


@by_base_and_options
@pytest.mark.usefixtures("process_group")
def test_resume_is_bit_for_bit(base: str, options: dict[str, Any], tmp_path: Path) -> None:
    net, fam = build_fam(base)
    train(net, fam, range(3))
    fam.param_groups[1]["lr"] = 0.03  # as a scheduler would
    state = {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, fam, options=StateDictOptions(**options)),
    }
    resumed, other = build_fam(base, seed=1)
    empty = {
        "model": get_model_state_dict(resumed),
        "optimizer": get_optimizer_state_dict(resumed, other, options=StateDictOptions(**options)),
    }
    loaded = through_a_file(state, empty, tmp_path / "checkpoint")
    set_model_state_dict(resumed, loaded["model"])
    set_optimizer_state_dict(resumed, other, loaded["optimizer"], options=StateDictOptions(**options))
    assert other.param_groups[1]["lr"] == 0.03
    train(net, fam, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_same_throughout(resumed.state_dict(), net.state_dict(), "model")
    assert_same_throughout(other.state_dict(), fam.state_dict(), "optimizer")


@by_base
@pytest.mark.usefixtures("process_group")
def test_model_and_optimizer_in_one_call(base: str) -> None:
    net, fam = build_fam(base)
    train(net, fam, range(2))
    model_state, optimizer_state = copy.deepcopy(get_state_dict(net, fam))
    resumed, other = build_fam(base, seed=1)
    set_state_dict(resumed, other, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(net, fam, range(2, 4))
    train(resumed, other, range(2, 4))
    assert_same_throughout(resumed.state_dict(), net.state_dict(), "model")


@by_base_and_options
@pytest.mark.parametrize("into", ["FAM", "base"])
@pytest.mark.usefixtures("process_group")
def test_checkpoints_pass_between_fam_and_its_base(base: str, options: dict[str, Any], into: str) -> None:
    """A run without FAM goes on with it, and the reverse: both states have the same form."""
    source: Callable[..., tuple[nn.Sequential, Any]] = build_plain if into == "FAM" else build_fam
    net, trained = source(base)
    train(net, trained, range(3))
    # At lam = 0 FAM is its base bit for bit, so one continuation serves both directions.
    other_net, other = build_fam(base, seed=1, lam=0.0) if into == "FAM" else build_plain(base, seed=1)
    set_model_state_dict(other_net, get_model_state_dict(net))
    state = get_optimizer_state_dict(net, trained, options=StateDictOptions(**options))
    set_optimizer_state_dict(other_net, other, copy.deepcopy(state), options=StateDictOptions(**options))
    if isinstance(trained, FAM):
        trained.lam = 0.0
    train(net, trained, range(3, 6))
    train(other_net, other, range(3, 6))
    assert_same_throughout(other_net.state_dict(), net.state_dict(), "model")
    if isinstance(other, FAM):
        other.lam = LAM
        before = copy.deepcopy(other_net.state_dict())
        train(other_net, other, range(6, 7))
        assert other.last_kappa is not None and not torch.equal(other_net[3].weight, before["3.weight"]), (
            "it does not train on"
        )


@pytest.mark.parametrize("settings", [{"mode": "hutchinson"}, {"mode": "proximal", "every": 2}], ids=str)
@pytest.mark.usefixtures("process_group")
def test_lam_and_generator_are_saved_beside_it(settings: dict[str, Any], tmp_path: Path) -> None:
    """The distributed state is the base's alone; what FAM adds to `state_dict` has a name of its own."""

    def build(seed: int, lam: float) -> tuple[nn.Sequential, FAM]:
        generator = torch.Generator().manual_seed(seed)
        return build_fam("Adam", seed, lam, generator=generator, **settings)

    net, fam = build(0, lam=0.7)
    train(net, fam, range(3))
    state = {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, fam),
        "fam": fam.state_dict()["fam"],
    }
    assert set(state["optimizer"]) == {"state", "param_groups"}
    resumed, other = build(1, lam=0.1)
    empty = {
        "model": get_model_state_dict(resumed),
        "optimizer": get_optimizer_state_dict(resumed, other),
        "fam": other.state_dict()["fam"],
    }
    loaded = through_a_file(state, empty, tmp_path / "checkpoint")
    set_model_state_dict(resumed, loaded["model"])
    set_optimizer_state_dict(resumed, other, loaded["optimizer"])
    assert other.lam == 0.1, "the distributed state has no lam"
    other.load_state_dict({**other.state_dict(), "fam": loaded["fam"]})
    assert other.lam == 0.7
    train(net, fam, range(3, 6))
    train(resumed, other, range(3, 6))
    assert_same_throughout(resumed.state_dict(), net.state_dict(), "model")


def test_saving_is_no_step() -> None:
    """torch makes its step at rate zero before every save of a base that has no state, such as plain SGD."""
    plain, saved = (build_fam("SGD", lam=1.0, mode="proximal", every=3) for _ in range(2))
    for step in range(6):
        train(*plain, range(step, step + 1))
        train(*saved, range(step, step + 1))
        saved[1].zero_grad()
        get_optimizer_state_dict(*saved)
    assert_same_throughout(saved[0].state_dict(), plain[0].state_dict(), "model")
    assert_same_throughout(saved[1].state_dict(), plain[1].state_dict(), "optimizer")


@pytest.mark.usefixtures("process_group")
def test_a_frozen_body() -> None:
    net, _ = build_fam("Adam")
    net[:3].requires_grad_(False)
    fam = FAM(net[3].parameters(), torch.optim.Adam, net[3], LAM, lr=0.01)
    state = get_optimizer_state_dict(net, fam)
    assert set(state["state"]) == {"3.weight", "3.bias"}
    train(net, fam, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(net, fam))
    resumed = copy.deepcopy(net)
    other = FAM(resumed[3].parameters(), torch.optim.Adam, resumed[3], LAM, lr=0.5)
    set_optimizer_state_dict(resumed, other, saved)
    train(net, fam, range(2, 4))
    train(resumed, other, range(2, 4))
    assert_same_throughout(resumed.state_dict(), net.state_dict(), "model")


def test_two_optimizers_on_one_model() -> None:
    """torch merges the states of several optimizers into one, by parameter names."""
    net = build_net(0)
    body = FAM(net[:3].parameters(), torch.optim.Adam, net[0], 0.01, mode="hutchinson", lr=0.01)
    head = FAM(net[3].parameters(), torch.optim.SGD, net[3], 0.1, lr=0.1, momentum=0.9)
    state = get_optimizer_state_dict(net, (body, head))
    assert set(state["state"]) == {name for name, _ in net.named_parameters()}
    assert "exp_avg" in state["state"]["0.weight"] and "momentum_buffer" in state["state"]["3.weight"]
    state = copy.deepcopy(state)
    state["state"]["3.weight"]["momentum_buffer"].fill_(0.25)
    state["state"]["0.weight"]["exp_avg"].fill_(0.5)
    set_optimizer_state_dict(net, (body, head), state)
    assert (head.state[net[3].weight]["momentum_buffer"] == 0.25).all()
    assert (body.state[net[0].weight]["exp_avg"] == 0.5).all()
