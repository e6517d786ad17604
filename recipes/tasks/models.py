"""Networks of the recipes, where torchvision, MONAI and transformers have none."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallConvNet(nn.Module):
    """Two convolutions with BatchNorm and max-pooling, one hidden layer: 207,018 parameters at 28 x 28."""

    def __init__(self, classes: int = 10, channels: tuple[int, int] = (16, 32), hidden: int = 128) -> None:
        """Build the network for grey images of 28 x 28 pixels."""
        super().__init__()
        first, second = channels
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(second * 7 * 7, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, classes)
        self.to(memory_format=torch.channels_last)  # halves the step on CPU  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.features(images.contiguous(memory_format=torch.channels_last)))
        return logits


class WideBlock(nn.Module):
    """Two pre-activated 3 x 3 convolutions with dropout between them, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's features."""
        y = F.relu(self.norm1(x))
        shortcut: Tensor = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(y)
        y = F.relu(self.norm2(self.dropout(self.conv1(y))))
        features: Tensor = shortcut + self.conv2(y)
        return features


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko and Komodakis, 2016) for 32 x 32 images, as the paper has it.

    The paper adds a linear layer of 64 neurons, ``penultimate``, before the classifier ``head``, so that the
    matrix which it regularises is the 10 x 64 of the head.
    """

    def __init__(self, depth: int = 28, widening: int = 10, dropout: float = 0.3, classes: int = 10) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4, such as 16 or 28, got {depth}")
        widths = [16, 16 * widening, 32 * widening, 64 * widening]
        blocks = []
        for group in range(3):
            for number in range((depth - 4) // 6):
                inputs = widths[group] if number == 0 else widths[group + 1]
                stride = 2 if number == 0 and group > 0 else 1
                blocks.append(WideBlock(inputs, widths[group + 1], stride, dropout))
        self.features = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
            *blocks,
            nn.BatchNorm2d(widths[3]),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.penultimate = nn.Linear(widths[3], 64)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.penultimate(self.features(images)))
        return logits


def resnet18_cifar() -> nn.Module:
    """torchvision's ResNet-18 with the 3 x 3 stem and without the pooling, for 32 x 32 images."""
    from torchvision.models import resnet18

    model: nn.Module = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
