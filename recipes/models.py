"""Networks of the recipes. Each names its last layer ``head``, the one whose flatness FAM regularises."""

import torch
from torch import Tensor, nn


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
