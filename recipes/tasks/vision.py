"""Classifies images as in Table 1 of the paper, with the paper's networks, augmentation and settings.

``recipes/paper/settings.md`` says who states which setting. FAM regularises the output layer (10 x 64 in
WideResNet); ``recipes/paper/README.md`` says why. ``--layer penultimate`` chooses the layer below it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from recipes.engine.optimizers import PAPERS
from recipes.engine.schedules import steps
from recipes.engine.task import Data, Missing, Source, Task, package
from recipes.tasks.images import by_torchvision
from recipes.tasks.models import resnet18_cifar, wide_resnet

datasets = package("torchvision.datasets")
models = package("torchvision.models")
v2 = package("torchvision.transforms.v2")

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5,), "std": (0.5,)}
CROP_AND_FLIP = (v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip())


def cutout(image: Tensor, length: int = 16) -> Tensor:
    """Returns a copy of the image ``(channels, height, width)`` with a square of zeros around a random pixel.

    DeVries and Taylor (2017). torchvision's RandomErasing stays inside the image; this square may hang over
    the border, and covers 196 of 32 x 32 pixels on average, not 256. It comes after the normalisation, as in
    the article's code: 0 is the mean grey, not black.
    """
    covered = image.clone()
    top, left = (int(torch.randint(size, ())) - length // 2 for size in image.shape[-2:])
    covered[..., max(top, 0) : top + length, max(left, 0) : left + length] = 0
    return covered


def transform(
    *steps: Any, mean: tuple[float, ...], std: tuple[float, ...], then: tuple[Any, ...] = ()
) -> Any:
    """Returns the transform from images to normalised tensors; ``then`` follows the normalisation."""
    to_tensor = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))
    return v2.Compose([*to_tensor, *steps, v2.Normalize(mean, std), *then])


def images(
    folder: str, make: Callable[..., Any], train: Any, test: Any, classes: int = 10
) -> Callable[[Source, int], Data]:
    """Returns a task's data function: it reads images with ``make``, or generates some for a smoke test."""

    def data(source: Source, seed: int) -> Data:
        if source.smoke:
            fake = partial(datasets.FakeData, 4, (3, 32, 32), classes)
            return Data(fake(train, random_offset=1), {"test": fake(test)})
        transforms = train, test
        samples = by_torchvision(make, source.folder / folder, source, transforms=transforms)
        return Data(samples[0], {"test": samples[1]})

    return data


def cifar10() -> Task:
    """Returns the task of ResNet-18 on CIFAR10."""
    train = transform(*CROP_AND_FLIP, **CIFAR)
    return Task(
        data=images("cifar10", datasets.CIFAR10, train, transform(**CIFAR)),
        model=lambda source: resnet18_cifar(),
        layers=("fc",),
        epochs=250,
        batch_size=64,
        options={"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4},
        methods={
            "fam": {"lam": 0.1, **PAPERS},
            "sam": {"lr": 0.01, "weight_decay": 5e-4},
            "asam": {"lr": 0.01},
        },
    )


def cifar100() -> Task:
    """Returns the task of EfficientNet-B7 with ImageNet weights on CIFAR100, at 224 x 224 pixels."""
    resize = v2.Resize(224, antialias=True)
    train, test = transform(*CROP_AND_FLIP, resize, **IMAGENET), transform(resize, **IMAGENET)

    def model(source: Source) -> nn.Module:
        try:
            network: nn.Module = (
                models.efficientnet_b0()  # the smallest of its kind
                if source.smoke
                else models.efficientnet_b7(weights=models.EfficientNet_B7_Weights.IMAGENET1K_V1)
            )
        except OSError as error:
            remedy = f"connect once, or put the file into {torch.hub.get_dir()}/checkpoints"
            raise Missing(f"the weights of EfficientNet-B7 could not be fetched: {remedy}") from error
        features = cast("nn.Linear", network.get_submodule("classifier.1")).in_features
        network.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(features, 256), nn.Linear(256, 100))
        return network

    return Task(
        data=images("cifar100", datasets.CIFAR100, train, test, 100),
        model=model,
        layers=("classifier.2",),
        epochs=200,
        batch_size=32,
        base="adam",
        options={"lr": 1e-6, "weight_decay": 1e-5},
        methods={
            "fam": {"lam": 1.0, **PAPERS},
            "sam": {"base": "nesterov", "lr": 1e-5, "weight_decay": 1e-4},
        },
    )


def on_wide_resnet(data: Callable[[Source, int], Data], batch_size: int, epochs: int, lr: float) -> Task:
    """Returns what SVHN and Fashion-MNIST share: WideResNet-28-10 (a small one for a smoke test)."""
    return Task(
        data=data,
        model=lambda source: wide_resnet(10, 1) if source.smoke else wide_resnet(28, 10),
        layers=("head",),
        epochs=epochs,
        batch_size=batch_size,
        base="nesterov",
        options={"lr": lr, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        methods={"fam": {"lam": 0.1, **PAPERS}},
        schedule=steps(0.3, 0.6, 0.8, factor=0.2),
    )


def svhn() -> Task:
    """Returns the task of WideResNet-28-10 on SVHN."""
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.SVHN)
    train = v2.Compose([policy, transform(*CROP_AND_FLIP, **CIFAR, then=(cutout,))])

    def svhn(folder: str, train: bool, **options: Any) -> Any:
        return datasets.SVHN(folder, "train" if train else "test", **options)

    return on_wide_resnet(images("svhn", svhn, train, transform(**CIFAR)), 128, 100, 0.1)


def fashion_mnist() -> Task:
    """Returns the task of WideResNet-28-10 on Fashion-MNIST, as three-channel images of 32 x 32."""
    enlarge = (v2.Grayscale(3), v2.Resize(32, antialias=True))
    train, test = transform(*enlarge, **HALF, then=(cutout,)), transform(*enlarge, **HALF)
    return on_wide_resnet(images("", datasets.FashionMNIST, train, test), 64, 200, 0.01)
