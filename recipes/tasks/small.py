"""Tasks that two cores can finish: a small convolutional network on Fashion-MNIST."""

from recipes.engine.task import Data, Source, Task
from recipes.tasks.images import shipped_fashion_mnist, split, whole_fashion_mnist
from recipes.tasks.models import SmallConvNet

VALIDATION = 1000  # of the 4,000 shipped training images, in the quick start
BASE = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}  # SGD, also inside SAM and FAM


def quickstart(noise: float = 0.0, train_size: int = 2000) -> Task:
    """The quick start's: shipped images, a part of whose labels may be wrong."""

    def data(source: Source, seed: int) -> Data:
        used = 256 if source.smoke else train_size
        images, labels = shipped_fashion_mnist("test")
        tested = 500 if source.smoke else len(labels)
        test = images[:tested], labels[:tested]
        return split(shipped_fashion_mnist("train"), test, used, VALIDATION, noise, seed)

    return Task(
        name=f"quickstart-noise{100 * noise:g}" if noise else "quickstart",
        about=f"small convolutional network, {train_size} images of Fashion-MNIST, {noise:.0%} wrong labels",
        data=data,
        model=lambda source: SmallConvNet(),
        layers=("head",),
        epochs=20,
        batch_size=64,
        options=BASE,
        kappa_samples=train_size,
    )


def fashion_mnist_small(tuning: bool = False) -> Task:
    """All 60,000 images; for tuning 10,000 of the training images, and 5,000 others to validate on."""

    def data(source: Source, seed: int) -> Data:
        train, test = (whole_fashion_mnist(part, source) for part in ("train", "test"))
        sizes = (len(train[1]) // 6, len(train[1]) // 12) if tuning else (len(train[1]), 0)
        return split(train, test, *sizes, 0, seed)

    return Task(
        data=data,
        model=lambda source: SmallConvNet(),
        layers=("head",),
        epochs=10,
        batch_size=64,
        options=BASE,
    )
