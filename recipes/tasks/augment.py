"""Cutout (DeVries and Taylor, 2017): torchvision's RandomErasing is another, it stays inside the image."""

import torch
from torch import Tensor


class Cutout:
    """Blacken one square whose centre is any pixel, so that it may hang over the border.

    It comes after the normalisation, as in the article's code: 0 is the mean grey, not black. A square of 16
    pixels a side covers 196 of 32 x 32 pixels on average, not 256.
    """

    def __init__(self, length: int) -> None:
        """Take the square's side in pixels."""
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        """Return a copy of the image ``(channels, height, width)`` with the square."""
        spans = []
        for size in image.shape[-2:]:
            begin = int(torch.randint(size, ())) - self.length // 2
            spans.append(slice(max(begin, 0), begin + self.length))
        covered = image.clone()
        covered[..., spans[0], spans[1]] = 0
        return covered
