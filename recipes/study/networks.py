"""The study's networks: perceptrons, convolutional and residual networks, a transformer."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from recipes.engine.schedules import cosine
from recipes.engine.training import seed_everything
from recipes.tasks.images import fashion_mnist
from recipes.tasks.models import SmallConvNet

PRETRAINING_EPOCHS = 8


def perceptron(inputs: int, outputs: int, width: int, depth: int, normalised: bool = False) -> nn.Module:
    """``depth`` hidden layers of one width with ReLU; or with LayerNorm and GELU."""
    layers: list[nn.Module] = []
    for fan_in in (inputs, *[width] * (depth - 1)):
        behind = [nn.LayerNorm(width), nn.GELU()] if normalised else [nn.ReLU()]
        layers += [nn.Linear(fan_in, width), *behind]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def without_batchnorm(width: int) -> nn.Module:
    """Two convolutions with stride and one hidden layer, for images of 28 x 28 pixels."""
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


class Residual(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> nn.Module:
    """A ResNet with a stem of stride 2 and six blocks of 16, 32 and 64 channels, for 28 x 28 pixels."""
    shapes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Residual(*shape) for shape in shapes),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    model.to(memory_format=torch.channels_last)  # faster on CPU  # type: ignore[call-overload]
    return model


def vision_transformer() -> nn.Module:
    """timm's, with LayerNorm and GELU: patches of 7 x 7, two blocks of 64 channels, four heads."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2
    )
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False  # the fused kernel has no second derivative
    return model


def pretrained() -> nn.Module:
    """A convolutional network trained on the 8,000 shipped images of Fashion-MNIST, with a new last layer."""
    model = SmallConvNet(channels=(8, 16))
    model.load_state_dict(_pretrained_weights())
    model.head.reset_parameters()
    return model


@cache
def _pretrained_weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        seed_everything(0)
        model = SmallConvNet(channels=(8, 16))
        images: Dataset[tuple[torch.Tensor, ...]] = ConcatDataset(
            [TensorDataset(*fashion_mnist(split)) for split in ("train", "test")]
        )
        batches = DataLoader(images, 64, shuffle=True, drop_last=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        steps = PRETRAINING_EPOCHS * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step / steps))
        for _ in range(PRETRAINING_EPOCHS):
            for inputs, targets in batches:
                optimizer.zero_grad()
                cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.state_dict()
