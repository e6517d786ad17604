"""Table 1 of the paper: image classification, with the paper's networks, augmentation and settings.

Where the paper leaves a choice open, the authors' released code decides. lam is for kappa / m there, so the
tasks set ``normalize``. The regularised layers are the ones that the released code names.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.engine.schedules import cosine, steps
from recipes.engine.task import Data, Missing, Source, Task, missing
from recipes.tasks.images import shipped_fashion_mnist
from recipes.tasks.models import WideResNet, resnet18_cifar

try:
    from torchvision import datasets, models
    from torchvision.transforms import v2
except ImportError as error:
    raise Missing('torchvision is not installed: pip install -e ".[paper]"') from error

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CUTOUT = v2.RandomErasing(p=1, scale=(0.25, 0.25), ratio=(1, 1))  # one 16 x 16 square of 32 x 32 pixels
DETACHED = "the released code detaches the Hessian (--detach-hessian)"


def transform(*steps: Callable[..., Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Images to normalised tensors."""
    to_tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
    return v2.Compose([*to_tensor, *steps, v2.Normalize(mean, std)])


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
        name="cifar10",
        about="ResNet-18 with a CIFAR stem on CIFAR10 (paper, Table 1)",
        data=pair("cifar10", datasets.CIFAR10, train, transform(**CIFAR), 32, 10),
        model=lambda source: resnet18_cifar(),
        layer="fc",
        epochs=250,
        batch_size=64,
        options={"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4},
        methods={"fam": {"lam": 0.1, "normalize": True}, "sam": {"lr": 0.01}, "asam": {"lr": 0.01}},
        schedule=cosine,
        differences=f"{DETACHED}.",
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
        name="cifar100",
        about="EfficientNet-B7 with ImageNet weights on CIFAR100 at 224 x 224 (paper, Table 1)",
        data=pair("cifar100", datasets.CIFAR100, train, transform(resize, **IMAGENET), 32, 100),
        model=model,
        layer="classifier.2",
        epochs=200,
        batch_size=32,
        base="adam",
        options={"lr": 1e-6, "weight_decay": 1e-5},
        methods={"fam": {"lam": 1.0, "normalize": True}},
        schedule=cosine,
        differences=f"{DETACHED}; its plain runs have lr 1e-5 and weight decay 1e-3 (--lr, --weight-decay).",
    )


def svhn() -> Task:
    """WideResNet-28-10 on SVHN."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.SVHN)
    crop, flip = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()
    train = v2.Compose([policy, transform(crop, flip, CUTOUT, **CIFAR)])

    def make(folder: str, train: bool, **options: Any) -> Any:
        return datasets.SVHN(folder, "train" if train else "test", **options)

    return Task(
        name="svhn",
        about="WideResNet-28-10 with a penultimate layer of 64 neurons on SVHN (paper, Table 1)",
        data=pair("svhn", make, train, transform(**CIFAR), 32, 10),
        model=wide_resnet,
        layer="penultimate",
        epochs=100,
        batch_size=128,
        base="nesterov",
        options={"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        methods={"fam": {"lam": 0.1, "normalize": True}},
        schedule=steps(0.3, 0.6, 0.8, factor=0.2),
        differences=f"{DETACHED} and has lam 0.2 (--lam 0.2).",
    )


def fashion_mnist() -> Task:
    """WideResNet-28-10 on Fashion-MNIST, as three-channel images of 32 x 32 pixels."""
    enlarge = (v2.Grayscale(3), v2.Resize(32, antialias=True))
    half = {"mean": (0.5,), "std": (0.5,)}
    train, test = transform(*enlarge, CUTOUT, **half), transform(*enlarge, **half)

    def data(source: Source, seed: int) -> Data:
        folder = Path(smoke_fashion_mnist().name) if source.smoke else source.folder
        return both("Fashion-MNIST", datasets.FashionMNIST, folder, train, test, source)

    return Task(
        name="fashion-mnist",
        about="WideResNet-28-10 with a penultimate layer of 64 neurons on Fashion-MNIST (paper, Table 1)",
        data=data,
        model=wide_resnet,
        layer="penultimate",
        epochs=200,
        batch_size=64,
        base="nesterov",
        options={"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        methods={"fam": {"lam": 0.1, "normalize": True}},
        schedule=steps(0.3, 0.6, 0.8, factor=0.2),
        differences=f"{DETACHED} and has lr 0.05 (--lr 0.05).",
    )


def wide_resnet(source: Source) -> nn.Module:
    """WideResNet-28-10, or its smallest relative for a smoke test."""
    return WideResNet(10, 1) if source.smoke else WideResNet(28, 10)


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
