"""The networks of the benchmark, each with the layer that is regularised and one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fam_optim import weight_layers
from recipes.tasks.models import SmallConvNet, WideResNet, resnet18_cifar


@dataclass
class Task:
    """A training step: ``loss = loss_fn(model(inputs), targets)``, with kappa of ``layer``, or of several."""

    model: nn.Module
    layer: nn.Module | list[nn.Module]
    inputs: Tensor
    targets: Tensor
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def loss(self) -> Tensor:
        """The loss of the batch, ``()``."""
        return self.loss_fn(self.model(self.inputs), self.targets)

    @property
    def only(self) -> nn.Module:
        """The layer, of a task that has one."""
        assert isinstance(self.layer, nn.Module)
        return self.layer

    @property
    def weight(self) -> Tensor:
        """The layer's weight, of a task that has one."""
        weight = self.only.weight
        assert isinstance(weight, Tensor)
        return weight

    def part(self, samples: int) -> Task:
        """The same step on the first samples of the batch."""
        return replace(self, inputs=self.inputs[:samples], targets=self.targets[:samples])


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
    """One block of a vision transformer; attention without fused kernels, which have no second derivative."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 3, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Any:
        y = self.norms[0](x)
        with sdpa_kernel(SDPBackend.MATH):
            x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nn.Module):
    """Blocks on 65 tokens and a classifier of their mean."""

    def __init__(self, depth: int, width: int = 192, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(VisionBlock(width) for _ in range(depth)))
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


def _images(n: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.randint(0, classes, (n,))


def resnet18_head() -> Task:
    model = resnet18_cifar()
    return Task(model, model.get_submodule("fc"), *_images(64, 32, 10))


def resnet18_last_convolution() -> Task:
    model = resnet18_cifar()
    return Task(model, model.get_submodule("layer4.1.conv2"), *_images(64, 32, 10))


def wide_resnet_penultimate() -> Task:
    model = WideResNet(depth=16, widening=4)
    return Task(model, model.penultimate, *_images(64, 32, 10))


def efficientnet_head() -> Task:
    return _head(100, 256, 32)


def imagenet_head() -> Task:
    return _head(1000, 2048, 256)


def masked_language_model_head() -> Task:
    return _head(30522, 768, 512)


def _head(classes: int, features: int, rows: int) -> Task:
    model = Head(classes, features, rows)
    return Task(model, model.head, torch.zeros(()), torch.randint(0, classes, (rows,)))


def resnet50_imagenet() -> Task:
    from torchvision.models import resnet50

    model = resnet50()
    return Task(model, model.get_submodule("fc"), *_images(8, 224, 1000))


def tied_language_model() -> Task:
    model = TiedLanguageModel(50257, 768)
    return Task(model, model.head, torch.randint(0, 50257, (2, 128)), torch.randint(0, 50257, (256,)))


def bert_pooler() -> Task:
    model = Encoder()
    return Task(model, model.pooler, torch.randn(16, 64, 512), torch.randint(0, 2, (16,)))


def bert_classifier() -> Task:
    model = Encoder()
    return Task(model, model.classifier, torch.randn(16, 64, 512), torch.randint(0, 2, (16,)))


def vision_transformer_mlp() -> Task:
    model = VisionTransformer(1)
    return Task(model, model.get_submodule("blocks.0.down"), *_tokens())


def vision_transformer_middle() -> Task:
    model = VisionTransformer(6)
    return Task(model, model.get_submodule("blocks.2.down"), *_tokens())


def vision_transformer_all() -> Task:
    model = VisionTransformer(6)
    return Task(model, weight_layers(model), *_tokens())


def _tokens() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 65, 192), torch.randint(0, 10, (32,))


def resnet18_last_two() -> Task:
    model = resnet18_cifar()
    return Task(model, weight_layers(model)[-2:], *_images(64, 32, 10))


def resnet18_all() -> Task:
    model = resnet18_cifar()
    return Task(model, weight_layers(model), *_images(64, 32, 10))


def small_convolutional_hidden() -> Task:
    model = SmallConvNet()
    return Task(model, weight_layers(model)[-2], torch.randn(64, 1, 28, 28), torch.randint(0, 10, (64,)))


def perceptron_all() -> Task:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = nn.Sequential(*hidden, nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return Task(model, weight_layers(model), torch.randn(256, 1024), torch.randint(0, 10, (256,)))


def skull_autoencoder() -> Task:
    model = SkullAutoencoder()
    volumes = (torch.rand(4, 1, 64, 64, 64) < 0.2).float()
    return Task(model, model.expand, volumes, volumes, soft_dice)


def tiny() -> Task:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    return Task(model, model[2], torch.randn(8, 16), torch.randint(0, 16, (8,)))


TASKS: dict[str, Callable[[], Task]] = {
    "resnet18 head 10x512": resnet18_head,
    "wide resnet penultimate 64x256": wide_resnet_penultimate,
    "efficientnet head 100x256": efficientnet_head,
    "imagenet head 1000x2048": imagenet_head,
    "resnet50 head 1000x2048": resnet50_imagenet,
    "masked lm head 30522x768": masked_language_model_head,
    "gpt2 tied head 50257x768": tied_language_model,
    "bert-small pooler 512x512": bert_pooler,
    "bert-small classifier 2x512": bert_classifier,
    "skull decoder linear 512x8": skull_autoencoder,
    "vit mlp 192x768": vision_transformer_mlp,
    "resnet18 last conv 512x4608": resnet18_last_convolution,
    "resnet18 last conv and head": resnet18_last_two,
    "resnet18 all layers": resnet18_all,
    "small conv net hidden 128x1568": small_convolutional_hidden,
    "perceptron 4x1024 all layers": perceptron_all,
    "vit middle mlp 192x768": vision_transformer_middle,
    "vit all layers": vision_transformer_all,
    "tiny 16x16": tiny,
}
