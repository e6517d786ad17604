"""The study: its penalties against the library, its statistics on known numbers, its runs end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.study.penalties import kappa_of_head, partly_constant, share_of_gradient, share_of_loss
from recipes.study.samples import samples
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fam_optim import FAM, observe, relative_flatness
from recipes.study import __main__ as study
from recipes.study import protocol
from recipes.study.analysis import best_default, choose, difference, rank_correlation
from recipes.study.methods import CANDIDATES, METHODS
from recipes.study.trial import Stepper, Trial, run

DATA = Path("data")


@pytest.fixture
def head_and_batch() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    phi = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    return nn.Linear(7, 5, dtype=torch.float64), phi, torch.randint(0, 5, (9,))


def test_kappa_of_a_head_is_the_librarys(head_and_batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    head, phi, targets = head_and_batch
    with observe(head) as layer:
        logits = head(phi)
        loss = cross_entropy(logits, targets)
    inputs = [head.weight, head.bias, phi]
    ours, theirs = kappa_of_head(head.weight, phi, logits), relative_flatness(loss, layer)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(theirs, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), expected, rtol=1e-10, atol=1e-12)


def test_both_parts_constant_is_a_detached_hessian(head_and_batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    head, phi, targets = head_and_batch
    fam = FAM(head.parameters(), torch.optim.SGD, head, lam=0.3, detach_hessian=True, lr=0.1)
    fam.regularize(cross_entropy(head(phi), targets)).backward()
    expected = [p.grad for p in (head.weight, head.bias, phi)]
    logits = head(phi)
    penalized = partly_constant("p", "phi")(0.3, head, phi, logits, targets)
    actual = torch.autograd.grad(penalized, [head.weight, head.bias, phi])
    torch.testing.assert_close(list(actual), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", ["p", "phi"])
def test_a_constant_part_passes_no_gradient(
    head_and_batch: tuple[nn.Linear, Tensor, Tensor], part: str
) -> None:
    head, phi, _ = head_and_batch
    logits = head(phi).detach().requires_grad_()
    kappa = kappa_of_head(head.weight, phi, logits, (part,))
    by_logits, by_phi = torch.autograd.grad(kappa, [logits, phi], allow_unused=True)
    assert (by_logits is None) == (part == "p")
    assert (by_phi is None) == (part == "phi")


def test_shares_are_what_they_say(head_and_batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    head, phi, targets = head_and_batch
    loss = cross_entropy(head(phi), targets)
    (by_loss,) = torch.autograd.grad(loss, head.weight)
    of_gradient = share_of_gradient(0.3, head, phi, head(phi), targets)
    (by_both,) = torch.autograd.grad(of_gradient, head.weight)
    torch.testing.assert_close((by_both - by_loss).norm(), 0.3 * by_loss.norm())
    torch.testing.assert_close(share_of_loss(0.2, head, phi, head(phi), targets), 1.2 * loss)


def test_shares_of_nothing_are_finite(head_and_batch: tuple[nn.Linear, Tensor, Tensor]) -> None:
    head, phi, targets = head_and_batch
    with torch.no_grad():
        head.weight.zero_()  # kappa and its gradient are 0
    for form in (share_of_gradient, share_of_loss):
        penalized = form(0.3, head, phi, head(phi), targets)
        (by_weight,) = torch.autograd.grad(penalized, head.weight)
        assert by_weight.isfinite().all()


def test_all_grids_are_of_equal_size() -> None:
    assert {len(method.grid) for method in CANDIDATES.values()} == {5}


def row(**fields: Any) -> dict[str, Any]:
    return {"task": "t", "method": "m", "noise": 0.4, "tested": False, "seed": 0, **fields}


def test_selection_looks_at_validation_of_tuning_trials_only() -> None:
    results = [
        row(value=1, validation=50.0),
        row(value=1, validation=60.0, seed=1),
        row(value=2, validation=56.0),
        row(value=2, validation=56.0, seed=1),
        row(value=3, validation=99.0, tested=True),
        row(value=3, validation=99.0, noise=0.0),
    ]
    assert choose(results, "t", "m", 0.4) == 2
    with pytest.raises(ValueError, match="was not tuned"):
        choose(results, "t", "other", 0.4)


def test_paired_difference_has_students_interval() -> None:
    ours = [row(seed=seed, x=x) for seed, x in enumerate((3.0, 5.0, 7.0))]
    theirs = [row(seed=seed, x=x) for seed, x in reversed(list(enumerate((2.0, 2.0, 2.0))))]
    mean, half = difference(ours, theirs, "x")
    assert mean == 3
    assert half == pytest.approx(4.302653 * 2 / 3**0.5, rel=1e-5)  # t(0.975, 2) * s / sqrt(3)


def test_a_default_is_shared_by_all_conditions() -> None:
    ways = {"a": [{1: 70, 2: 80}, {1: 90, 2: 60}], "b": [{5: 75}, {5: 85, 6: 100}]}
    found = best_default(ways)
    assert found["a"] == (1, [10, 10], [10, 0])
    assert found["b"] == (5, [5, 15], [0, 15])


def test_rank_correlation_leaves_diverged_networks_out() -> None:
    results = [
        {"train_nll": 0.0, "test_nll": gap, "kappa": kappa}
        for gap, kappa in ((1, 1), (2, 2), (3, 4), (4, 3), (None, 0))
    ]
    assert rank_correlation(results, "kappa", "loss")[0] == pytest.approx(2 / 3)  # 5 pairs in order, 1 not


def test_noise_never_hits_the_test_labels() -> None:
    clean, noisy = (samples("digits", noise, 0, DATA) for noise in (0.0, 0.4))
    assert torch.equal(clean.evaluation["test"][:][1], noisy.evaluation["test"][:][1])
    wrong = (clean.train[:][1] != noisy.train[:][1]).sum() + (
        clean.evaluation["validation"][:][1] != noisy.evaluation["validation"][:][1]
    ).sum()
    assert wrong == round(0.4 * 1200)
    assert torch.equal(clean.train[:][0], noisy.train[:][0])


def test_a_trial_repeats_bit_for_bit() -> None:
    trial = Trial("digits", "fam detached", 0.03, 0.4, 0, 2, 0.05, tested=True)
    first, second = (run(trial, DATA) for _ in range(2))
    assert first.pop("seconds") > 0 < second.pop("seconds")
    assert first == second
    assert {"test_accuracy", "test_ece", "kappa", "weight_norm", "best_test_accuracy"} <= first.keys()


def test_test_data_stay_out_of_tuning() -> None:
    result = run(Trial("digits", "plain", 0.05, 0.0, 0, 1, 0.05), DATA)
    assert not [name for name in result if "test" in name and name != "tested"]


def test_warm_up_reaches_lam() -> None:
    stepper = Stepper(Trial("digits", "fixed, warm-up", 0.064, 0.0, 0, 1, 0.05))
    assert isinstance(stepper.optimizer, FAM)
    lams = []
    for progress in (0, 0.1, 0.2, 0.9):
        stepper.warm_up(progress)
        lams.append(stepper.optimizer.lam)
    assert lams == pytest.approx([0, 0.032, 0.064, 0.064])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_step(method: str) -> None:
    torch.manual_seed(0)
    stepper = Stepper(protocol.trial("digits", method, METHODS[method].grid[0], 0.4, 0, 0.05))
    before = [p.clone() for p in stepper.evaluated.parameters()]
    stepper.step(torch.rand(8, 64), torch.arange(8))
    assert any(not torch.equal(a, b) for a, b in zip(before, stepper.evaluated.parameters(), strict=True))


@pytest.mark.slow
def test_the_study_runs_goes_on_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "TUNED", ("digits",))
    monkeypatch.setattr(protocol, "NOISES", (0.4,))
    monkeypatch.setattr(protocol, "SEEDS", (0, 1))
    monkeypatch.setattr(protocol, "EPOCHS", dict.fromkeys(protocol.EPOCHS, 1))
    small = {name: CANDIDATES[name] for name in ("plain", "fam detached")}
    monkeypatch.setattr(protocol, "CANDIDATES", small)
    stages = ["learning_rates", "tuning", "comparison"]
    command = ["--workers", "1", "--out", str(tmp_path), "--stages", *stages]
    study.main(command)
    path = tmp_path / "comparison.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines].count("fam detached") == 2
    path.write_text("\n".join([*lines[1:], lines[0][:30]]))  # one trial lost, half a line left behind
    study.main(command)
    assert sorted(json.loads(line)["seed"] for line in path.read_text().splitlines()) == [0, 0, 1, 1]
    study.main(["--report", str(tmp_path)])
    assert "fam detached" in (tmp_path / "tables.md").read_text()
    assert "weightings: not complete" in capsys.readouterr().out
