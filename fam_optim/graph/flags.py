"""Yes or no from a GPU, read without making the host wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


def reading_waits(tensor: Tensor) -> bool:
    """Whether to read the tensor's numbers is to wait until an accelerator has computed them."""
    return tensor.device.type != "cpu"


class AsyncFlag:
    """A boolean scalar, on its way to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._arrived: Any = None
        if flag.device.type == "cpu":
            self._host = flag
            return
        self._host = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._host.copy_(flag, non_blocking=True)
        self._arrived = torch.get_device_module(flag.device).Event()
        self._arrived.record()

    def read(self) -> bool | None:
        """Its value; None if it has not arrived yet."""
        if self._arrived is not None and not self._arrived.query():
            return None
        return bool(self._host.tolist())  # of memory of the host: nothing is dispatched
