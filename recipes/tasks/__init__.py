"""Lists the tasks by name, and reads the trained networks in a run's folder."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from recipes.engine.run_folder import RunFolder
from recipes.engine.task import Data, Source, Task


class Entry(NamedTuple):
    """A task's description, and the function that makes it, which is imported only when it is asked for."""

    about: str
    function: str  # its module and name below recipes.tasks
    arguments: Mapping[str, Any] = {}


SMALL, DIGITS = "a small convolutional network on", "a convolutional network, pretrained on Fashion-MNIST, on"
MINILM = "MiniLM, a pretrained BERT, fine-tuned on"
SHIPPED = "2,000 shipped images of Fashion-MNIST"
TASKS = {
    "quickstart": Entry(f"{SMALL} {SHIPPED}", "small.quickstart"),
    "quickstart-noise40": Entry(
        f"{SMALL} {SHIPPED}, 40 % of the labels wrong", "small.quickstart", {"noise": 0.4}
    ),
    "fashion-mnist-small": Entry(f"{SMALL} all images of Fashion-MNIST", "small.fashion_mnist_small"),
    "fashion-mnist-small-tuning": Entry(
        f"{SMALL} 10,000 images of Fashion-MNIST, to choose lam and rho",
        "small.fashion_mnist_small",
        {"tuning": True},
    ),
    "cifar10": Entry("ResNet-18 on CIFAR10 (paper, Table 1)", "vision.cifar10"),
    "cifar100": Entry("a pretrained EfficientNet-B7 on CIFAR100 (paper, Table 1)", "vision.cifar100"),
    "svhn": Entry("WideResNet-28-10 on SVHN (paper, Table 1)", "vision.svhn"),
    "fashion-mnist": Entry("WideResNet-28-10 on Fashion-MNIST (paper, Table 1)", "vision.fashion_mnist"),
    "skulls": Entry("a 3D autoencoder completes skulls with a defect (paper, Table 2)", "skulls.skulls"),
    "skulls-small": Entry(
        "a 3D autoencoder completes 20 small generated shells", "skulls.skulls", {"small": True}
    ),
    "rte": Entry("BERT fine-tuned on GLUE's RTE (paper, Table 3, Figure 3)", "text.rte"),
    "reviews": Entry(f"{MINILM} 500 sentences of film reviews", "text.reviews"),
    "reviews-2000": Entry(f"{MINILM} 2,000 sentences of film reviews", "text.reviews", {"samples": 2000}),
    "mnist1d": Entry("a perceptron on MNIST-1D, generated curves", "small.mnist1d"),
    "mnist1d-layernorm": Entry(
        "a perceptron with LayerNorm and GELU on MNIST-1D", "small.mnist1d", {"normalised": True}
    ),
    "digits": Entry("a perceptron on scikit-learn's digits", "small.digits"),
    "diabetes": Entry("a perceptron on scikit-learn's diabetes, a regression", "small.diabetes"),
    "finetune-200": Entry(f"{DIGITS} 200 digits", "small.finetuning", {"samples": 200}),
    "finetune-1000": Entry(f"{DIGITS} 1,000 digits", "small.finetuning", {"samples": 1000}),
    "fashion": Entry(f"{SMALL} {SHIPPED}, in the study", "small.fashion", {"network": "batchnorm"}),
    "fashion-nobatchnorm": Entry(
        f"{SMALL} {SHIPPED}, without BatchNorm", "small.fashion", {"network": "no batchnorm"}
    ),
    "fashion-vit": Entry(f"a vision transformer on {SHIPPED}", "small.fashion", {"network": "transformer"}),
    "fashion-resnet": Entry(f"a ResNet on {SHIPPED}", "small.fashion", {"network": "resnet"}),
}


def load_task(name: str, **changes: Any) -> Task:
    """Builds a task, with changes to its arguments. Raises Missing if a package is not installed."""
    if name not in TASKS:
        raise ValueError(f"expected a task that recipes.train knows ({', '.join(TASKS)}), got {name!r}")
    entry = TASKS[name]
    module, _, function = entry.function.partition(".")
    make: Callable[..., Task] = getattr(import_module(f"recipes.tasks.{module}"), function)
    return dataclasses.replace(make(**{**entry.arguments, **changes}), name=name, about=entry.about)


class Trained(NamedTuple):
    """The contents of a run's folder, with the task and the data that it was trained on."""

    task: Task
    data: Data
    config: Mapping[str, Any]
    label: str
    networks: Mapping[int, nn.Module]  # by epoch, on the CPU


def trained(path: Path, folder: Path) -> Trained:
    """Reads a run's folder, and the run's data from the folder of data sets."""
    run = RunFolder(path)
    config = run.read("config.json")
    task, source = load_task(config["task"]), Source(folder, smoke=config["smoke"])
    networks = {}
    for epoch, state in run.networks().items():
        networks[epoch] = task.model(source)
        networks[epoch].load_state_dict(state)
    return Trained(task, task.data(source, config["seed"]), config, path.resolve().parent.name, networks)
