"""The rows of the benchmark: networks, each with the layers that are regularised and one batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fam_optim import weight_layers
from recipes.shared.problem import Problem
from recipes.tasks.models import SmallConvNet, WideResNet, resnet18_cifar


class Head(nn.Module):
    """A linear classifier whose input is trained too, as if a body stood below."""

    def __init__(self, classes: int, features: int, rows: int) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(rows, features))
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features + x)


class TiedLanguageModel(nn.Module):
    """An embedding, a block, and a head that shares the embedding's weight."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        # As GPT-2's: with torch's own scale probabilities underflow, and denormal numbers are slow.
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.block = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.block(self.embedding(tokens))).flatten(0, 1)


class Encoder(nn.Module):
    """A BERT-small-like encoder with a pooler and a classifier."""

    def __init__(self, width: int = 512, layers: int = 4, classes: int = 2) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Any:
        return self.classifier(torch.tanh(self.pooler(self.encoder(x)[:, 0])))


class VisionBlock(nn.Module):
    """One block of a vision transformer; FAM's penalty takes attention without fused kernels."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.backends = [SDPBackend.MATH] if not fused else [*SDPBackend.__members__.values()]
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Any:
        y = self.norms[0](x)
        with sdpa_kernel(self.backends):
            x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nn.Module):
    """Blocks on 65 tokens and a classifier of their mean."""

    def __init__(self, depth: int, fused: bool = False, width: int = 192, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VisionBlock(width, fused) for _ in range(depth)))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.blocks(x).mean(1))


class SkullAutoencoder(nn.Module):
    """Five stride-2 convolutions down, two linear layers, five up, on 64^3 volumes."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, 8, 16, 32, 64, 64]
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for a, b in pairwise(widths):
            down += [nn.Conv3d(a, b, 3, stride=2, padding=1), nn.ReLU()]
            up = [nn.ConvTranspose3d(b, a, 4, stride=2, padding=1), nn.ReLU(), *up]
        self.encode = nn.Sequential(*down, nn.Flatten(), nn.Linear(512, 8))
        self.expand = nn.Linear(8, 512)
        self.decode = nn.Sequential(nn.ReLU(), nn.Unflatten(1, (64, 2, 2, 2)), *up[:-1])

    def forward(self, x: Tensor) -> Any:
        return self.decode(self.expand(self.encode(x)))


def soft_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the soft Dice coefficient of every sample, averaged."""
    p = logits.sigmoid().flatten(1)
    t = targets.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


class Case(NamedTuple):
    """A row: its sentence, and what builds it."""

    about: str
    build: Callable[[], Problem]


Layers = Callable[[nn.Module], Any]  # those of a model that are regularised


def module(name: str) -> Layers:
    """The one of that name."""
    return lambda model: model.get_submodule(name)


def hidden(model: nn.Module) -> list[Any]:
    """All but the last."""
    return weight_layers(model)[:-1]


def images(
    model: Callable[[], nn.Module], layers: Layers, number: int = 64, size: int = 32, classes: int = 10
) -> Problem:
    """A network on coloured images."""
    network = model()
    inputs, targets = torch.randn(number, 3, size, size), torch.randint(0, classes, (number,))
    return Problem(network, layers(network), inputs, targets)


def resnet50() -> nn.Module:
    """torchvision's."""
    from torchvision import models

    network: nn.Module = models.resnet50()
    return network


def head(classes: int, features: int, rows: int) -> Problem:
    """A classifier alone."""
    model = Head(classes, features, rows)
    return Problem(model, model.head, torch.zeros(()), torch.randint(0, classes, (rows,)))


def tied_language_model() -> Problem:
    """The size of GPT-2's head."""
    model = TiedLanguageModel(50257, 768)
    return Problem(model, model.head, torch.randint(0, 50257, (2, 128)), torch.randint(0, 50257, (256,)))


def bert(layers: Layers, number: int = 16, tokens: int = 64) -> Problem:
    """Sentences of so many tokens."""
    model = Encoder()
    return Problem(model, layers(model), torch.randn(number, tokens, 512), torch.randint(0, 2, (number,)))


def vit(layers: Layers, depth: int = 6, fused: bool = False) -> Problem:
    """32 images of 65 tokens."""
    model = VisionTransformer(depth, fused)
    return Problem(model, layers(model), torch.randn(32, 65, 192), torch.randint(0, 10, (32,)))


def perceptron(layers: Layers, rows: int, *widths: int) -> Problem:
    """Linear layers of these widths with ReLU."""
    modules: list[nn.Module] = []
    for a, b in pairwise(widths):
        modules += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    return Problem(model, layers(model), torch.randn(rows, widths[0]), torch.randint(0, widths[-1], (rows,)))


def small_convolutional() -> Problem:
    """The quick start's."""
    model = SmallConvNet()
    return Problem(model, hidden(model)[-1], torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,)))


def skull_autoencoder() -> Problem:
    """Four volumes with a Dice loss."""
    model = SkullAutoencoder()
    volumes = (torch.rand(4, 1, 64, 64, 64) < 0.2).float()
    return Problem(model, model.expand, volumes, volumes, soft_dice)


wide_resnet = partial(WideResNet, depth=16, widening=4)
RESNET, ENCODER = "ResNet-18 for CIFAR, 64 images", "BERT-small's encoder, 16 sentences of 64 tokens"
VIT = "vision transformer of 6 blocks of width 192, 32 images of 65 tokens"
HIDDEN_ROWS = {
    "resnet18 hidden": Case(RESNET, partial(images, resnet18_cifar, hidden)),
    "vit hidden": Case(f"{VIT}, fused attention", partial(vit, hidden, fused=True)),
    "bert-small hidden": Case(ENCODER, partial(bert, hidden)),
    "bert-small 32x128 hidden": Case(
        "BERT-small's encoder, 32 sentences of 128 tokens", partial(bert, hidden, 32, 128)
    ),
    "perceptron 3x1024 hidden": Case(
        "784-1024-1024-1024-10, 256 samples", partial(perceptron, hidden, 256, 784, 1024, 1024, 1024, 10)
    ),
    "perceptron 2x256 hidden": Case(
        "784-256-256-10, 64 samples, about 1 ms a step", partial(perceptron, hidden, 64, 784, 256, 256, 10)
    ),
    "151 layers of 16 hidden": Case(
        "151 linear layers of 16 units, 64 samples", partial(perceptron, hidden, 64, *[16] * 152)
    ),
}
OTHER_ROWS = {
    "resnet18 head 10x512": Case(f"{RESNET}; the last layer", partial(images, resnet18_cifar, module("fc"))),
    "wide resnet penultimate 64x256": Case(
        "WideResNet-16-4, 64 images; the last layer but one",
        partial(images, wide_resnet, module("penultimate")),
    ),
    "imagenet head 1000x2048": Case(
        "a classifier of 1,000 classes alone, 256 samples", partial(head, 1000, 2048, 256)
    ),
    "resnet50 head 1000x2048": Case(
        "ResNet-50, 8 images; the last layer", partial(images, resnet50, module("fc"), 8, 224, 1000)
    ),
    "masked lm head 30522x768": Case(
        "BERT's language head alone, 512 tokens", partial(head, 30522, 768, 512)
    ),
    "gpt2 tied head 50257x768": Case("GPT-2's head, tied, over one block, 256 tokens", tied_language_model),
    "bert-small pooler 512x512": Case(f"{ENCODER}; the last layer but one", partial(bert, module("pooler"))),
    "skull decoder linear 512x8": Case("a 3D autoencoder; the layer behind its code", skull_autoencoder),
    "small conv net hidden 128x1568": Case(
        "the quick start's network, 64 images; the last layer but one", small_convolutional
    ),
    "vit middle mlp 192x768": Case(f"{VIT}; one in the middle", partial(vit, module("blocks.2.down"))),
    "tiny 16x16": Case(
        "16-16-16, 8 samples: overhead alone; the last layer", partial(perceptron, module("2"), 8, 16, 16, 16)
    ),
}
CASES = {
    **{
        name: case._replace(about=f"{case.about}; all layers but the last")
        for name, case in HIDDEN_ROWS.items()
    },
    **OTHER_ROWS,
}
HIDDEN, ONE = frozenset(HIDDEN_ROWS), frozenset(OTHER_ROWS)
INNER = HIDDEN | {  # where the Hessian is not Gauss-Newton's
    *("wide resnet penultimate 64x256", "bert-small pooler 512x512", "small conv net hidden 128x1568"),
    *("vit middle mlp 192x768", "tiny 16x16"),
}
