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
        layer="head",
        epochs=20,
        batch_size=64,
        options=BASE,
        kappa_samples=train_size,
    )


def fashion_mnist_small(tuning: bool = False) -> Task:
    """All 60,000 images; to choose lam and rho, 10,000 of them with 5,000 others to validate on."""

    def data(source: Source, seed: int) -> Data:
        train, test = (whole_fashion_mnist(part, source) for part in ("train", "test"))
        count = len(train[1])
        train_size, validation_size = (count // 6, count // 12) if tuning else (count, 0)
        return split(train, test, train_size, validation_size, 0, seed)

    return Task(
        name="fashion-mnist-small-tuning" if tuning else "fashion-mnist-small",
        about="small convolutional network on Fashion-MNIST"
        + (", part of the training images to choose lam and rho with" if tuning else ", all training images"),
        data=data,
        model=lambda source: SmallConvNet(),
        layer="head",
        epochs=10,
        batch_size=64,
        options=BASE,
    )
