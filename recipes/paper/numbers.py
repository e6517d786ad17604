"""The paper's own numbers, as it prints them, with the table and section where they stand.

Source: Adilova et al., FAM: Relative Flatness Aware Minimization, TAG-ML at ICML 2023 (arXiv 2307.02337).
What follows a ± in Table 1 (standard deviation or error), its number of seeds, and HD's unit are not stated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = ("sgd", "nesterov", "adam")  # the optimizers here that are the paper's "baseline"


@dataclass(frozen=True)
class Row:
    """A line of one of the paper's tables."""

    experiment: str  # the task of the recipes that has its settings
    where: str
    name: str
    optimizers: tuple[str, ...]  # of the recipes that are this line
    numbers: Mapping[str, str]  # by the name of the quantity in a run's records, as printed
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the optimizer, which make it this line
    part: float = 1  # of the training, after which it was measured
    scale: float = 1  # from the unit of the records to the paper's


def _accuracies(experiment: str, where: str, quantity: str, numbers: str, scale: float = 1) -> list[Row]:
    """Baseline, SAM where there is one, FAM."""
    values = numbers.split(", ")
    lines = [("baseline", BASELINE), ("SAM", ("sam",)), ("FAM", ("fam",))]
    lines = lines if len(values) == 3 else lines[::2]
    return [
        Row(experiment, where, name, optimizers, {quantity: value}, scale=scale)
        for (name, optimizers), value in zip(lines, values, strict=True)
    ]


def _skulls(lam: float, numbers: str) -> list[Row]:
    """DSC, HD and HD95, each after epoch 200 and after epoch 100, on set 1, then all on set 2."""
    values = iter(numbers.split())
    half, end = {}, {}
    for defect in ("same_defect", "other_defect"):  # the training kind is set 1
        for metric in ("dsc", "hd", "hd95"):
            end[f"{defect}_{metric}"], half[f"{defect}_{metric}"] = next(values), next(values)
    name, optimizers = (f"lambda {lam}", ("fam",)) if lam else ("baseline", BASELINE)
    settings = {"lam": lam} if lam else {}
    where = "Table 2, section 4.2"
    return [
        Row("skulls", where, name, optimizers, found, settings, part)
        for found, part in ((half, 0.5), (end, 1))
    ]


TEST = "test_accuracy"
ROWS = [
    *_accuracies("cifar10", "Table 1, section 4.1.1", TEST, "95.53 ± 0.0001, 95.61 ± 0.001, 95.62 ± 0.002"),
    *_accuracies("cifar100", "Table 1, section 4.1.2", TEST, "84.48 ± 0.12, 85.72 ± 0.08, 87.2 ± 0.05"),
    *_accuracies("svhn", "Table 1, section 4.1.3", TEST, "97.72 ± 0.02, 97.84 ± 0.05, 97.81 ± 0.07"),
    *_accuracies("fashion-mnist", "Table 1, section 4.1.3", TEST, "94.57 ± 0.28, 94.99 ± 0.02, 94.6 ± 0.04"),
    *_skulls(0, "0.6464 0.6569 7.0130 7.1787 2.0635 2.0422 0.6413 0.6489 7.1421 7.1939 2.0924 2.1371"),
    *_skulls(0.0006, "0.7155 0.6817 6.5531 6.7772 1.8202 1.8281 0.7156 0.6762 6.5542 7.0115 1.8178 1.9088"),
    *_skulls(0.002, "0.7173 0.7175 6.4813 6.5478 1.8175 1.8281 0.7175 0.7176 6.4813 6.5478 1.8148 1.8281"),
    *_skulls(0.02, "0.7176 0.7168 6.5221 6.5271 1.8210 1.8344 0.7176 0.7168 6.5221 6.5271 1.8210 1.8344"),
    *_skulls(0.1, "0.7176 0.7169 6.5085 6.5222 1.8210 1.8345 0.7176 0.7169 6.5085 6.5222 1.8210 1.8345"),
    *_skulls(0.7, "0.7177 0.7169 6.5202 6.5389 1.8210 1.8359 0.7177 0.7169 6.5202 6.5389 1.8210 1.8359"),
    *_accuracies(
        *("rte", "Table 3, section 4.3", "development_accuracy"),
        *("0.67364 ± 0.018 (max 0.6931), 0.6982 ± 0.0154 (max 0.7184)", 0.01),
    ),
]

STATED: dict[str, dict[str, Any]] = {  # of a run's configuration and settings, what the paper says of them
    "cifar10": {"epochs": 250, "batch_size": 64, "layers": ["fc"], "lr": 0.03, "lam": 0.1},
    "cifar100": {"batch_size": 32, "layers": ["classifier.2"]},
    "svhn": {"epochs": 100, "batch_size": 128, "layers": ["head"], "lr": 0.1, "lam": 0.1},
    "fashion-mnist": {"epochs": 200, "batch_size": 64, "layers": ["head"], "lr": 0.01},
    "skulls": {"epochs": 200, "layers": ["from_latent"], "lr": 1e-4, "measure": "layerwise"},
    "rte": {"epochs": 20, "batch_size": 32, "layers": ["bert.classifier"], "lr": 2e-5, "lam": 3e6},
}
for _name in ("cifar10", "cifar100", "svhn", "fashion-mnist"):
    STATED[_name]["measure"] = "neuronwise"
STAND_INS = {  # tasks that are small forms of the paper's experiments: experiment, what else differs
    "skulls-small": ("skulls", "20 generated shells of 32³"),
    "fashion-mnist-small": ("fashion-mnist", "small network"),
}

FIGURE_4 = {  # appendix A.1: how many times faster than the one before, on an NVIDIA RTX A6000
    "vectorised autograd": ("autograd loop", "up to 1,000"),
    "torch.func": ("vectorised autograd", "about 10 for large Hessians"),
}
"""The sizes stand in the picture only, and so does all of Figure 5 (A.2): no number of it is in the text."""
