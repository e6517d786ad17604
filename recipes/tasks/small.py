"""Tasks that two cores can finish: a small convolutional network on Fashion-MNIST."""

from recipes.engine.task import Data, Source, Task
from recipes.tasks.images import shipped_fashion_mnist, split, whole_fashion_mnist
from recipes.tasks.models import SmallConvNet

BASE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}  # SGD, also inside SAM and FAM


def quickstart(noise: float, train_size: int = 2000) -> Task:
    """The quick start's: 2,000 shipped images, a part of whose labels may be wrong."""

    def data(source: Source, seed: int) -> Data:
        used = 256 if source.smoke else train_size
        images, labels = shipped_fashion_mnist("test")
        tested = 500 if source.smoke else len(labels)
        return split(
            shipped_fashion_mnist("train"), (images[:tested], labels[:tested]), used, 1000, noise, seed
        )

    return Task(
        name=f"quickstart-noise{100 * noise:.0f}" if noise else "quickstart",
        about=f"small convolutional network, {train_size} images of Fashion-MNIST, {noise:.0%} wrong labels",
        data=data,
        model=lambda source: SmallConvNet(),
        layers=("head",),
        epochs=20,
        batch_size=64,
        options=BASE,
        kappa_samples=train_size,
    )


def fashion_mnist_small(tuning: bool = False, shipped: bool = False) -> Task:
    """All 60,000 images, or the 4,000 shipped ones; for tuning a part of them, and others to validate on."""

    def data(source: Source, seed: int) -> Data:
        if shipped and not source.smoke:
            train, test = (shipped_fashion_mnist(part) for part in ("train", "test"))
            sizes = (3 * len(train[1]) // 4, len(train[1]) // 4)
        else:
            train, test = (whole_fashion_mnist(part, source) for part in ("train", "test"))
            sizes = (len(train[1]) // 6, len(train[1]) // 12)
        return split(train, test, *(sizes if tuning else (len(train[1]), 0)), 0, seed)

    return Task(
        name=f"fashion-mnist-{'shipped' if shipped else 'small'}{'-tuning' if tuning else ''}",
        about="small convolutional network on "
        + ("the 4,000 shipped images of Fashion-MNIST" if shipped else "Fashion-MNIST")
        + (", part of the training images to choose lam and rho with" if tuning else ", all training images"),
        data=data,
        model=lambda source: SmallConvNet(),
        layers=("head",),
        epochs=20 if shipped else 10,
        batch_size=64,
        options=BASE,
    )
