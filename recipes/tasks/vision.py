"""Table 1 of the paper: image classification, with the paper's networks, augmentation and settings.

Each task says which of its settings the paper states (``paper``) and which the released code decides
(``code``), because the paper leaves them open; the others are ours. ``recipes.engine.marks`` prints them.

Which matrix is w^l? The paper's sections 1 and 3 take the weights from the selected layer to the next, so
that its penultimate layer means the output's weights, 10 x 64 in WideResNet; so does the parameter that the
released code picks, whatever its comment says. The weights into the 64 neurons are ``--layer penultimate``.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.engine.schedules import Steps, cosine
from recipes.engine.task import Data, Missing, Source, Task, missing
from recipes.tasks.augment import Cutout
from recipes.tasks.images import shipped_fashion_mnist
from recipes.tasks.models import WideResNet, resnet18_cifar

try:
    from torchvision import datasets, models
    from torchvision.transforms import v2
except ImportError as error:
    raise Missing('torchvision is not installed: pip install -e ".[paper]"') from error

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# FAM as the paper has it, whatever the library's defaults are; the division by m is the released code's.
FAM = {
    "measure": "neuronwise",
    "mode": "exact",
    "curvature": "hessian",
    "detach_hessian": False,
    "normalize": True,
}
BASE = ("optimizer", "lr", "momentum", "weight_decay", "schedule", "epochs", "batch size")
FAM_PAPER = ("layer", "fam measure", "fam mode", "fam curvature", "fam detach_hessian")
CODE = ("loss", "fam normalize", "sam rho")
RELEASED = (
    "the released code detaches the Hessian (--detach-hessian), and its kappa is another number, since it "
    "takes H[:, j, i, :] of a Hessian that is stored as (d, m, d, m)"
)


def transform(
    *steps: Callable[..., Any], mean: tuple[float, ...], std: tuple[float, ...], then: tuple[Any, ...] = ()
) -> Any:
    """Images to normalised tensors; ``then`` is what follows the normalisation."""
    to_tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
    return v2.Compose([*to_tensor, *steps, v2.Normalize(mean, std), *then])


def pair(
    name: str, make: Callable[..., Any], train: Any, test: Any, size: int, classes: int
) -> Callable[[Source, int], Data]:
    """A torchvision data set's training and test images; generated ones of that size for a smoke test."""

    def data(source: Source, seed: int) -> Data:
        if source.smoke:
            fakes = [
                datasets.FakeData(4, (3, size, size), classes, chosen, random_offset=n)
                for n, chosen in enumerate((train, test))
            ]
            return Data(fakes[0], {"test": fakes[1]})
        return both(name, make, source.folder / name, train, test, source)

    return data


def both(name: str, make: Callable[..., Any], folder: Path, train: Any, test: Any, source: Source) -> Data:
    """The training and test images that ``make`` reads from a folder, each with its transform."""
    try:
        samples = [
            make(str(folder), train=training, transform=chosen, download=source.download)
            for training, chosen in ((True, train), (False, test))
        ]
    except (RuntimeError, OSError) as error:
        raise missing(name, folder, source) from error
    return Data(samples[0], {"test": samples[1]})


def cifar10() -> Task:
    """ResNet-18 on CIFAR10."""
    train = transform(v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), **CIFAR)
    return Task(
        data=pair("cifar10", datasets.CIFAR10, train, transform(**CIFAR), 32, 10),
        model=lambda source: resnet18_cifar(),
        layers=("fc",),
        epochs=250,
        batch_size=64,
        options={"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4},
        methods={"fam": {"lam": 0.1, **FAM}, "sam": {"lr": 0.01, "weight_decay": 5e-4}, "asam": {"lr": 0.01}},
        schedule=cosine,
        facts={
            "network": "ResNet-18",
            "stem": "3 x 3 convolution, no pooling",
            "input": "random crop, flip, normalised",
            "loss": "cross-entropy",
            "seeds": "any (--seeds)",
        },
        paper=("network", "input", *BASE, "fam lam", "sam lr", *FAM_PAPER),
        code=("stem", *CODE),
        differences=f"{RELEASED}; its ResNet-18 has one more layer of 64 neurons, its SAM lr 0.05, no weight "
        "decay and 200 epochs.",
    )


def cifar100() -> Task:
    """EfficientNet-B7 with ImageNet weights on CIFAR100 at 224 x 224."""
    resize = v2.Resize(224, antialias=True)
    train = transform(v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), resize, **IMAGENET)

    def model(source: Source) -> nn.Module:
        weights = None if source.smoke else models.EfficientNet_B7_Weights.IMAGENET1K_V1
        try:
            network: nn.Module = models.efficientnet_b7(weights=weights)
        except OSError as error:
            raise Missing(
                "the ImageNet weights of EfficientNet-B7 are not cached and could not be fetched: connect "
                f"once, or put the file into {torch.hub.get_dir()}/checkpoints"
            ) from error
        network.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(2560, 256), nn.Linear(256, 100))
        return network

    return Task(
        data=pair("cifar100", datasets.CIFAR100, train, transform(resize, **IMAGENET), 32, 100),
        model=model,
        layers=("classifier.2",),
        epochs=200,
        batch_size=32,
        base="adam",
        options={"lr": 1e-6, "weight_decay": 1e-5},
        methods={"fam": {"lam": 1.0, **FAM}, "sam": {"base": "nesterov", "lr": 1e-5, "weight_decay": 1e-4}},
        schedule=cosine,
        facts={
            "network": "EfficientNet-B7, ImageNet weights",
            "head": "dropout 0.5, linear 2560-256-100",
            "input": "224 x 224 pixels",
            "augmentation": "random crop, flip",
            "normalisation": "ImageNet's",
            "loss": "cross-entropy",
            "seeds": "any (--seeds)",
        },
        paper=("network", "input", "optimizer", "batch size", *FAM_PAPER),
        code=(
            *("head", "augmentation", "epochs", "lr", "weight_decay", "schedule", "fam lam"),
            *("sam base", "sam lr", "sam weight_decay", *CODE),
        ),
        differences=f"{RELEASED}; its plain runs have lr 1e-5, weight decay 1e-3 and no schedule (--lr, "
        "--weight-decay), they and SAM batches of 64 and 100 epochs.",
    )


def wide_resnet(
    data: Callable[[Source, int], Data], batch_size: int, epochs: int, lr: float, **own: Any
) -> Task:
    """What SVHN and Fashion-MNIST share: WideResNet-28-10, its smallest relative for a smoke test."""
    facts = {
        "network": "WideResNet-28-10, one more layer of 64 neurons",
        "dropout": "0.3",
        **own.pop("facts"),
    }
    return Task(
        data=data,
        model=lambda source: WideResNet(10, 1) if source.smoke else WideResNet(28, 10),
        layers=("head",),
        epochs=epochs,
        batch_size=batch_size,
        base="nesterov",
        options={"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        methods={"fam": {"lam": 0.1, **FAM}},
        schedule=Steps(0.3, 0.6, 0.8, factor=0.2),
        facts={**facts, "loss": "cross-entropy", "seeds": "any (--seeds)"},
        **own,
    )


def svhn() -> Task:
    """WideResNet-28-10 on SVHN."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.SVHN)
    crop, flip = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()
    train = v2.Compose([policy, transform(crop, flip, **CIFAR, then=(Cutout(16),))])

    def make(folder: str, train: bool, **options: Any) -> Any:
        return datasets.SVHN(folder, "train" if train else "test", **options)

    return wide_resnet(
        pair("svhn", make, train, transform(**CIFAR), 32, 10),
        *(128, 100, 0.1),
        facts={"input": "AutoAugment SVHN, random crop, flip, cutout 1 x 16", "normalisation": "CIFAR10's"},
        paper=("network", "input", *BASE, "fam lam", *FAM_PAPER),
        code=("dropout", "normalisation", *CODE),
        differences=f"{RELEASED}; it has lam 0.2 (--lam 0.2) and cuts out before it normalises.",
    )


def fashion_mnist() -> Task:
    """WideResNet-28-10 on Fashion-MNIST, as three-channel images of 32 x 32 pixels."""
    enlarge = (v2.Grayscale(3), v2.Resize(32, antialias=True))
    half = {"mean": (0.5,), "std": (0.5,)}
    train, test = transform(*enlarge, **half, then=(Cutout(16),)), transform(*enlarge, **half)

    def data(source: Source, seed: int) -> Data:
        folder = Path(smoke_fashion_mnist().name) if source.smoke else source.folder
        return both("Fashion-MNIST", datasets.FashionMNIST, folder, train, test, source)

    return wide_resnet(
        data,
        *(64, 200, 0.01),
        facts={"input": "3 channels, 32 x 32, cutout 1 x 16, normalised by 0.5"},
        paper=("network", "input", *BASE, *FAM_PAPER),
        code=("dropout", "fam lam", *CODE),
        differences=f"{RELEASED}; it has lr 0.05 (--lr 0.05), steps of the schedule after 0.4, 0.6 and 0.8, "
        "and cuts out before it normalises.",
    )


@cache
def smoke_fashion_mnist() -> tempfile.TemporaryDirectory[str]:
    """A folder with a few shipped images in the files that torchvision reads; it goes with the process."""
    holder = tempfile.TemporaryDirectory()
    raw = Path(holder.name) / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (tensor[:8].to(torch.uint8) for tensor in shipped_fashion_mnist(split))
        for kind, tensor in (("images-idx3", images), ("labels-idx1", labels)):
            sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
            header = bytes((0, 0, 8, tensor.dim()))  # idx: unsigned bytes, number of dimensions, sizes
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + sizes + tensor.numpy().tobytes())
    return holder
