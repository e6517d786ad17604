"""A problem is a network, some of its layers, a batch and a loss; recipes measure costs and kappa on it."""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fam_optim import observe, relative_flatness


@dataclass(frozen=True)
class Problem:
    """The loss ``loss_fn(model(inputs), targets)``, and the layers whose flatness is measured."""

    model: nn.Module
    regularised: nn.Module | list[nn.Module]
    inputs: Tensor
    targets: Tensor
    loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    @property
    def layers(self) -> list[nn.Module]:
        """The layers whose flatness counts."""
        return self.regularised if isinstance(self.regularised, list) else [self.regularised]

    @property
    def layer(self) -> nn.Module:
        """The layer of a problem that has only one."""
        (layer,) = self.layers
        return layer

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the only layer."""
        return self.layer.get_parameter("weight")

    def part(self, samples: int) -> "Problem":
        """Returns the problem with the first samples of the batch alone."""
        return replace(self, inputs=self.inputs[:samples], targets=self.targets[:samples])

    def copy(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "Problem":
        """Returns a copy with its own parameters, in another precision or on another device if asked."""
        twin = copy.deepcopy(self)
        twin.model.to(device=device, dtype=dtype)
        floats = dtype if self.inputs.is_floating_point() else None
        inputs, targets = twin.inputs.to(device=device, dtype=floats), twin.targets.to(device=device)
        return replace(twin, inputs=inputs, targets=targets)

    def loss(self) -> Tensor:
        """Returns the loss of the batch, ``()``."""
        return self.loss_fn(self.model(self.inputs), self.targets)

    def loss_of_weight(self, weight: Tensor) -> Tensor:
        """Returns the loss as a function of the layer's weight; all other parameters are constants."""
        constants = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        (name,) = (name for name, module in self.model.named_modules() if module is self.layer)
        outputs = functional_call(self.model, {**constants, f"{name}.weight": weight}, (self.inputs,))
        return self.loss_fn(outputs, self.targets)

    def penalised(self, times: int = 1, **options: Any) -> tuple[Tensor, ...]:
        """Returns the loss of one forward, and ``times`` values of the library's kappa, ``()`` each."""
        with ExitStack() as stack:
            enter = stack.enter_context
            layers = [enter(observe(each)) if isinstance(each, nn.Module) else each for each in self.layers]
            loss = self.loss()
        return loss, *(relative_flatness(loss, layers, **options) for _ in range(times))

    def flatness(self, **options: Any) -> Tensor:
        """Makes a forward, and returns the library's kappa, ``()``."""
        return self.penalised(**options)[1]

    def gradient(self, value: Tensor, **options: Any) -> Tensor:
        """Returns the gradient of a number in all parameters, as one vector."""
        parameters = list(self.model.parameters())
        parts = torch.autograd.grad(value, parameters, materialize_grads=True, **options)
        return torch.cat([part.flatten() for part in parts])


def train_plainly(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    schedule: Callable[[int], float] = lambda step: 1.0,
    **settings: Any,
) -> None:
    """Trains with SGD on the cross-entropy of each batch, for recipes with another subject."""
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for inputs, targets in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
