"""What torch's errors mean where kappa takes derivatives, and what to do about them."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MATH_ATTENTION = (
    "Fused attention has no second derivative: run the forward under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)."
)
_REMEDIES = (  # by what torch's message contains
    (r"scaled_dot_product|_efficient_attention|_flash_attention|_cudnn_attention", _MATH_ATTENTION),
    (
        r"_cudnn_rnn|CuDNN RNN|miopen_rnn|_thnn_fused_(lstm|gru)|mkldnn_rnn|_thnn_differentiable",
        "Fused recurrent kernels have no second derivative: run the forward under "
        "torch.backends.cudnn.flags(enabled=False), on the CPU torch.backends.mkldnn.flags(enabled=False).",
    ),
    (
        r"use_reentrant",
        "Reentrant activation checkpointing has no second derivative: checkpoint what follows "
        "the layer with use_reentrant=False.",
    ),
    (
        r"donated buffers",
        "A compiled region gives its buffers away after one backward: set "
        "torch._functorch.config.donated_buffer = False before it is compiled.",
    ),
    (
        r"second time",
        "The loss has been backpropagated already: compute kappa before backward(), or call "
        "backward(retain_graph=True).",
    ),
)
_NO_DERIVATIVE = re.compile(
    r"derivative for '?(?:aten::)?(?P<operation>\w+)'? is not implemented"
    r"|does not support 3rd\+ order|once_differentiable|[Dd]ouble backward|not differentiable twice"
)


def has_no_derivative(error: RuntimeError) -> bool:
    """Whether torch says that something has no derivative of the order asked for."""
    return _NO_DERIVATIVE.search(str(error)) is not None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error is about memory, on whatever device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def explained(needed: str) -> Iterator[None]:
    """Raises torch's errors again with the remedy, if it is known; ``needed``: what kappa asked for."""
    try:
        yield
    except RuntimeError as error:
        text = remedy(error)
        if text is None:
            raise
        raise RuntimeError(f"kappa needs {needed} of what follows the layer. {text}") from error


def remedy(error: RuntimeError) -> str | None:
    """What the user can do about a derivative behind the layer that torch refused; None if it is unknown."""
    message = str(error)
    for pattern, text in _REMEDIES:
        if re.search(pattern, message):
            return text
    missing = _NO_DERIVATIVE.search(message)
    if missing is None:
        return None
    operation = missing["operation"]
    what = "an operation there has none" if operation is None else f"{operation} has none"
    return (
        f"In torch {what}. Write what computes it out in elementary operations, or regularise a layer behind "
        "it (the last one, say)."
    )
