"""Builds the networks of the tasks; some are variants of networks from torchvision and timm."""

from collections import OrderedDict
from functools import cache
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.engine.loop import seed_everything
from recipes.engine.schedules import cosine
from recipes.engine.task import package
from recipes.shared.problem import train_plainly
from recipes.tasks.images import fashion_mnist


class SmallConvNet(nn.Module):
    """A network for grey 28 x 28 images: two convolutions (BatchNorm, max-pooling), one hidden layer."""

    def __init__(self, classes: int = 10, channels: tuple[int, int] = (16, 32), hidden: int = 128) -> None:
        super().__init__()
        first, second = channels
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, first), (first, second)):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(second * 7 * 7, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, classes)
        self.to(memory_format=torch.channels_last)  # halves the step on CPU  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        logits: Tensor = self.head(self.features(images.contiguous(memory_format=torch.channels_last)))
        return logits


class WideBlock(nn.Module):
    """A block of two pre-activated 3 x 3 convolutions with dropout between them, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.body = nn.Sequential(first, nn.Dropout(dropout), nn.BatchNorm2d(outputs), nn.ReLU(), second)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Any:
        """Returns the block's features."""
        y = self.start(x)
        return self.body(y) + (x if self.shortcut is None else self.shortcut(y))


def wide_resnet(depth: int = 28, widening: int = 10, dropout: float = 0.3, classes: int = 10) -> nn.Module:
    """Returns a wide residual network (Zagoruyko and Komodakis, 2016) for 32 x 32 images.

    The depth is 6 n + 4 with a whole number n. The paper adds a linear layer of 64 neurons, ``penultimate``,
    before the classifier ``head``, so that the matrix which it regularises is the 10 x 64 of the head.
    """
    width, blocks = 16, []
    for group in (1, 2, 4):
        for number in range((depth - 4) // 6):
            stride = 2 if number == 0 and group > 1 else 1
            blocks.append(WideBlock(width, 16 * widening * group, stride, dropout))
            width = 16 * widening * group
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    top = nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    features, penultimate = nn.Sequential(stem, *blocks, *top), nn.Linear(width, 64)
    parts = {"features": features, "penultimate": penultimate, "head": nn.Linear(64, classes)}
    return nn.Sequential(OrderedDict(parts))


def resnet18_cifar() -> nn.Module:
    """Returns torchvision's ResNet-18 with a 3 x 3 stem and without the pooling, for 32 x 32 images."""
    model: nn.Module = package("torchvision.models").resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def perceptron(inputs: int, outputs: int, width: int, depth: int, normalised: bool = False) -> nn.Module:
    """Returns a perceptron: ``depth`` hidden layers of one width, with ReLU or with LayerNorm and GELU."""
    layers: list[nn.Module] = []
    for fan_in in (inputs, *[width] * (depth - 1)):
        behind = [nn.LayerNorm(width), nn.GELU()] if normalised else [nn.ReLU()]
        layers += [nn.Linear(fan_in, width), *behind]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def without_batchnorm(width: int) -> nn.Module:
    """Returns a network of two convolutions with stride and one hidden layer, for 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def residual(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Returns torchvision's block of two 3 x 3 convolutions, BatchNorm and a shortcut (He et al., 2016)."""
    block: nn.Module = package("torchvision.models.resnet", "study").BasicBlock(inputs, outputs, stride)
    if inputs != outputs:
        convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        block.downsample = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
    return block


def small_resnet() -> nn.Module:
    """Returns a ResNet for 28 x 28 pixels: a stem of stride 2 and six blocks of 16, 32 and 64 channels."""
    shapes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(residual(*shape) for shape in shapes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    model.to(memory_format=torch.channels_last)  # faster on CPU  # type: ignore[call-overload]
    return model


def vision_transformer() -> nn.Module:
    """Returns timm's transformer (LayerNorm, GELU): 7 x 7 patches, two blocks of 64 channels, four heads."""
    model: nn.Module = package("timm.models.vision_transformer", "study").VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2
    )
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # the fused kernel has no second derivative
    return model


def pretrained(epochs: int = 8) -> nn.Module:
    """Returns a network trained on the 8,000 shipped images of Fashion-MNIST, with a new last layer."""
    model = SmallConvNet(channels=(8, 16))
    model.load_state_dict(_pretrained_weights(epochs))
    model.head.reset_parameters()
    return model


@cache
def _pretrained_weights(epochs: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        seed_everything(0)
        model = SmallConvNet(channels=(8, 16))
        pairs = zip(*map(fashion_mnist, ("train", "test")), strict=True)
        images = TensorDataset(*map(torch.cat, pairs))
        batches = DataLoader(images, 64, shuffle=True, drop_last=True)
        steps = max(1, epochs * len(batches))
        every = chain.from_iterable(repeat(batches, epochs))
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
        train_plainly(model, every, lambda step: cosine(step / steps), **settings)
    return model.state_dict()
