"""The rows of the benchmark: networks, each with the layers that are regularised and one batch."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fam_optim import weight_layers
from recipes.engine.task import package
from recipes.shared.problem import Problem
from recipes.tasks.models import resnet18_cifar


class Transformer(nn.Module):
    """An encoder with a pooler on the first token, like BERT-small's, or with the mean over the tokens."""

    def __init__(self, width: int, heads: int, depth: int, classes: int, pooler: bool) -> None:
        super().__init__()
        settings = {"batch_first": True, "norm_first": not pooler}
        dropout = 0.1 if pooler else 0.0
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", **settings)
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.pooler = nn.Linear(width, width) if pooler else None
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Any:
        features = self.encoder(x)
        pooled = features.mean(1) if self.pooler is None else self.pooler(features[:, 0]).tanh()
        return self.classifier(pooled)


def soft_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns one minus the soft Dice coefficient, averaged over the samples."""
    p, t = logits.sigmoid().flatten(1), targets.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


Layers = Callable[[nn.Module], Any]  # returns the layers of a model that are regularised


def module(name: str) -> Layers:
    """Returns a function from a model to its module of that name."""
    return lambda model: model.get_submodule(name)


def hidden(model: nn.Module) -> list[Any]:
    """Returns all weight layers but the last."""
    return weight_layers(model)[:-1]


def classifier(model: nn.Module, layers: Layers, inputs: Tensor, classes: int) -> Problem:
    """Returns the problem of a network with random labels."""
    return Problem(model, layers(model), inputs, torch.randint(0, classes, (len(inputs),)))


def images(
    model: Callable[[], nn.Module], layers: Layers, number: int = 64, size: int = 32, classes: int = 10
) -> Problem:
    """Returns a network on random colour images."""
    return classifier(model(), layers, torch.randn(number, 3, size, size), classes)


def resnet50() -> Any:
    """Returns torchvision's ResNet-50."""
    return package("torchvision.models").resnet50()


def head(classes: int, features: int, rows: int) -> Problem:
    """Returns a linear classifier alone; its inputs are trained too, as if a body stood below."""
    model = nn.Sequential(nn.Embedding(rows, features), nn.Linear(features, classes))
    return classifier(model, module("1"), torch.arange(rows), classes)


def tied_language_model() -> Problem:
    """Returns a head of GPT-2's size, which shares the embedding's weight, over one block."""
    embedding, head = nn.Embedding(50257, 768), nn.Linear(768, 50257, bias=False)
    # GPT-2's scale: with torch's own, probabilities underflow, and denormal numbers are slow.
    nn.init.normal_(embedding.weight, std=0.02)
    head.weight = embedding.weight
    block = nn.Linear(768, 768), nn.GELU(), nn.LayerNorm(768)
    model = nn.Sequential(embedding, *block, head, nn.Flatten(0, 1))
    return Problem(model, head, torch.randint(0, 50257, (2, 128)), torch.randint(0, 50257, (256,)))


def bert(layers: Layers, number: int = 16, tokens: int = 64) -> Problem:
    """Returns BERT-small's encoder on sentences of so many tokens."""
    model = Transformer(512, 8, 4, classes=2, pooler=True)
    return classifier(model, layers, torch.randn(number, tokens, 512), 2)


def vit(layers: Layers) -> Problem:
    """Returns a vision transformer's encoder on 32 images of 65 tokens."""
    model = Transformer(192, 3, 6, classes=10, pooler=False)
    return classifier(model, layers, torch.randn(32, 65, 192), 10)


def perceptron(layers: Layers, rows: int, *widths: int) -> Problem:
    """Returns linear layers of these widths, with ReLU between them."""
    modules = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.ReLU())]
    return classifier(nn.Sequential(*modules[:-1]), layers, torch.randn(rows, widths[0]), widths[-1])


def skull_autoencoder() -> Problem:
    """Returns a 3D autoencoder: five stride-2 convolutions, two linear layers, five deconvolutions."""
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for a, b in pairwise((1, 8, 16, 32, 64, 64)):
        down += [nn.Conv3d(a, b, 3, stride=2, padding=1), nn.ReLU()]
        up = [nn.ConvTranspose3d(b, a, 4, stride=2, padding=1), nn.ReLU(), *up]
    behind = nn.Linear(8, 512)
    code = nn.Flatten(), nn.Linear(512, 8), behind, nn.ReLU(), nn.Unflatten(1, (64, 2, 2, 2))
    volumes = (torch.rand(4, 1, 64, 64, 64) < 0.2).float()
    return Problem(nn.Sequential(*down, *code, *up[:-1]), behind, volumes, volumes, soft_dice)


class Case(NamedTuple):
    """A row: its description, and what builds it."""

    about: str
    build: Callable[[], Problem]


RESNET, ENCODER = "ResNet-18 for CIFAR, 64 images", "BERT-small's encoder, 16 sentences of 64 tokens"
VIT = "vision transformer of 6 blocks of width 192, 32 images of 65 tokens"
HIDDEN_ROWS = {  # all layers but the last
    "resnet18 hidden": Case(RESNET, partial(images, resnet18_cifar, hidden)),
    "vit hidden": Case(VIT, partial(vit, hidden)),
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
    "skull decoder linear 512x8": Case("a 3D autoencoder; the layer behind its code", skull_autoencoder),
    "tiny 16x16": Case(
        "16-16-16, 8 samples: overhead alone; the last layer", partial(perceptron, module("2"), 8, 16, 16, 16)
    ),
}
CASES = {**HIDDEN_ROWS, **OTHER_ROWS}
HIDDEN, ONE = frozenset(HIDDEN_ROWS), frozenset(OTHER_ROWS)
INNER = HIDDEN | {"tiny 16x16"}  # where the Hessian may differ from Gauss-Newton's
