"""The cases: layers x tails x losses, all tiny.

A row of `LAYERS`, `TAILS` or `LOSSES` is one thing that may stand before, behind or above a layer, and
`GRID` crosses them: not all with all, but so that each two that can fail together meet (`pairs`).
What fits no grid is in `tests/special_cases.py`.

Outputs travel as one of five *kinds*, which say where the class axis is: "features" (N, C), "vector"
(C,), "tokens" (N, ..., C), "maps" (N, C, *space) and "map" (C, *space).
"""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from fam_optim import observe
from tests.support import covering, seeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fam_optim import Observation

KINDS = ("features", "vector", "tokens", "maps", "map")
CE = F.cross_entropy


class Problem(nn.Module):
    """A network, its data and its loss, in one module so that `.to` moves them together.

    Attributes:
        layers: the layers whose kappa is asked for: modules or parameters.
        knob: the setting of a `Change`.
    """

    knob: Any = None

    def __init__(
        self,
        net: nn.Module,
        layers: Iterable[nn.Module | nn.Parameter],
        run: Callable[[Problem], Tensor],
        **data: Tensor,
    ) -> None:
        super().__init__()
        self.net = net
        self.layers = tuple(layers)
        self._run = run
        for name, tensor in data.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self._start: dict[str, Tensor] = {}

    def forward(self) -> Tensor:
        """The loss. Every call finds the same buffers (running statistics) and the same randomness."""
        buffers = dict(self.named_buffers())
        if not self._start:
            self._start = {name: b.clone() for name, b in buffers.items()}
        for name, buffer in buffers.items():
            if not torch.equal(buffer, self._start[name]):
                buffer.copy_(self._start[name])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self._run(self)

    def trained(self) -> list[Tensor]:
        """Every parameter that receives a gradient."""
        return [p for p in self.parameters() if p.requires_grad]

    def names(self) -> list[str]:
        """Their names, in the same order."""
        return [name for name, p in self.named_parameters() if p.requires_grad]


def observed(problem: Problem) -> tuple[Tensor, list[Observation | nn.Parameter]]:
    """One forward of the problem under observation: its loss, and its layers as the library takes them."""
    with ExitStack() as stack:
        layers = [
            stack.enter_context(observe(la)) if isinstance(la, nn.Module) else la for la in problem.layers
        ]
        return problem(), layers


@dataclass(frozen=True)
class Case:
    """A problem by name, and what is known about it.

    Attributes:
        build: makes the problem; seeded by the name.
        whole_gradient: False where torch has no third derivative (BatchNorm in train mode).
        finite_differences: False where the value depends on the parameters also through something
            that is computed without gradient, which finite differences see and gradients do not.
        modes: the deterministic modes that the layer supports.
        parts: the layer, the tail and the loss of which a case of the grid consists.
    """

    name: str
    build: Callable[[], Problem] = field(repr=False)
    whole_gradient: bool = True
    finite_differences: bool = True
    modes: tuple[str, ...] = ("full", "exact")
    parts: tuple[Any, ...] = ()

    def problem(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
        return seeded_by(self.name, self.build).to(device=device, dtype=dtype)


def seeded_by(name: str, build: Callable[[], Problem]) -> Problem:
    return seeded(build, zlib.crc32(name.encode()))


# ------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """A layer, with the shape of its input."""

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, ...] = ()
    kind: str = "features"
    finite_differences: bool = True


class LowRankUpdate(nn.Module):
    """LoRA: W + B A."""

    def __init__(self, d: int, m: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(1, m)), nn.Parameter(torch.randn(d, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def lora() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    return parametrize.register_parametrization(layer, "weight", LowRankUpdate(3, 4))


def spectral_norm(iterations: int = 1) -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(4, 3), n_power_iterations=iterations)


def hooked(hook: str, function: Callable[..., Any]) -> nn.Module:
    """A layer with a hook of the user's own."""
    layer = nn.Linear(4, 3)
    getattr(layer, f"register_{hook}")(function)
    return layer


def conv1d(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(*args, **kwargs)


def conv2d(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*args, **kwargs)


def conv3d(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv3d(*args, **kwargs)


def up1d(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.ConvTranspose1d(*args, **kwargs)


def up2d(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.ConvTranspose2d(*args, **kwargs)


def up3d(*args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: nn.ConvTranspose3d(*args, **kwargs)


LAYERS = [
    Layer("linear", linear(5, 3), (4, 5)),
    Layer("linear_tall", linear(3, 6), (3, 3)),
    Layer("linear_square", linear(4, 4), (3, 4)),
    Layer("linear_no_bias", linear(4, 3, bias=False), (4, 4)),
    Layer("linear_one_output", linear(4, 1), (5, 4)),
    Layer("linear_one_input", linear(1, 3), (4, 1)),
    Layer("linear_one_sample", linear(4, 3), (1, 4)),
    Layer("linear_vector", linear(4, 3), (4,), "vector"),
    Layer("linear_tokens", linear(4, 3), (2, 3, 4), "tokens"),
    Layer("linear_tokens_square", linear(3, 3), (2, 4, 3), "tokens"),
    Layer("linear_tokens_grid", linear(3, 2), (2, 2, 2, 3), "tokens"),
    Layer("linear_tokens_no_bias", linear(3, 4, bias=False), (2, 3, 3), "tokens"),
    Layer("conv1d", conv1d(2, 3, 2), (2, 2, 4), "maps"),
    Layer("conv1d_stride_padding", conv1d(2, 2, 3, stride=2, padding=1), (2, 2, 5), "maps"),
    Layer("conv1d_same", conv1d(2, 2, 3, padding="same"), (2, 2, 3), "maps"),
    Layer("conv1d_same_dilated", conv1d(1, 2, 2, padding="same", dilation=2), (2, 1, 5), "maps"),
    Layer("conv1d_circular", conv1d(2, 2, 3, padding=2, padding_mode="circular"), (2, 2, 3), "maps"),
    Layer("conv1d_reflect_stride", conv1d(2, 2, 2, 2, 1, padding_mode="reflect"), (2, 2, 4), "maps"),
    Layer("conv1d_unbatched", conv1d(2, 3, 2), (2, 4), "map"),
    Layer("conv2d", conv2d(2, 3, 2), (2, 2, 3, 2), "maps"),
    Layer("conv2d_one_by_one", conv2d(4, 3, 1), (2, 4, 2, 2), "maps"),
    Layer("conv2d_no_bias_stride", conv2d(1, 2, 3, 2, 1, bias=False), (2, 1, 4, 5), "maps"),
    Layer("conv2d_same_circular", conv2d(1, 2, 3, 1, "same", padding_mode="circular"), (2, 1, 3, 3), "maps"),
    Layer("conv2d_replicate", conv2d(1, 2, 2, 1, (0, 1), padding_mode="replicate"), (2, 1, 3, 2), "maps"),
    Layer("conv2d_dilated_groups", conv2d(4, 2, 2, dilation=2, groups=2), (2, 4, 3, 4), "maps"),
    Layer("conv2d_depthwise", conv2d(3, 3, 2, groups=3), (2, 3, 3, 2), "maps"),
    Layer("conv2d_depthwise_multiplier", conv2d(2, 4, (1, 2), groups=2), (2, 2, 2, 3), "maps"),
    Layer("conv2d_unbatched_groups", conv2d(2, 4, 2, groups=2), (2, 3, 3), "map"),
    Layer("conv3d", conv3d(1, 2, 2), (2, 1, 2, 3, 2), "maps"),
    Layer("conv3d_mixed", conv3d(2, 2, (1, 2, 2), (1, 2, 1), (0, 1, 0), 1, 2), (2, 2, 2, 2, 2), "maps"),
    Layer("conv_transpose1d", up1d(2, 3, 2), (2, 2, 3), "maps"),
    Layer("conv_transpose1d_output_padding", up1d(2, 2, 3, 2, 1, 1), (2, 2, 2), "maps"),
    Layer("conv_transpose1d_unbatched", up1d(2, 3, 2, bias=False), (2, 3), "map"),
    Layer("conv_transpose2d", up2d(2, 3, 2, 2), (2, 2, 1, 2), "maps"),
    Layer("conv_transpose2d_groups", up2d(4, 2, 2, 1, 1, groups=2), (2, 4, 2, 3), "maps"),
    Layer("conv_transpose2d_depthwise", up2d(3, 3, (2, 1), groups=3), (2, 3, 1, 2), "maps"),
    Layer("conv_transpose2d_dilated", up2d(1, 4, 2, 2, 0, 1, dilation=2), (2, 1, 1, 2), "maps"),
    Layer("conv_transpose3d", up3d(2, 2, (1, 2, 1), (1, 2, 2)), (2, 2, 1, 1, 2), "maps"),
    Layer("conv_transpose3d_groups", up3d(2, 4, (2, 1, 1), groups=2), (2, 2, 1, 2, 1), "maps"),
    Layer("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (4, 4)),
    Layer("weight_norm_conv", lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), (2, 2, 3), "maps"),
    # One power iteration is constant to gradients, but not to finite differences.
    Layer("spectral_norm_train", spectral_norm, (4, 4), finite_differences=False),
    Layer("spectral_norm_converged", lambda: spectral_norm(iterations=200), (4, 4)),
    Layer("spectral_norm_eval", lambda: spectral_norm().eval(), (4, 4)),
    Layer("lora", lora, (4, 4)),
    Layer("pruned", lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", amount=4), (4, 4)),
    Layer("hook_on_input", lambda: hooked("forward_pre_hook", lambda f, args: (2 * args[0],)), (4, 4)),
    Layer("hook_on_output", lambda: hooked("forward_hook", lambda f, args, z: 2 * z.tanh()), (4, 4)),
]  # fmt: skip


# -------------------------------------------------------------------------------------------- tails


Row = TypeVar("Row", "Tail", "Loss")


def families(**tables: list[Row]) -> list[Row]:
    """Rows of several tables in one, each with the name of its table."""
    return [replace(row, family=name) for name, table in tables.items() for row in table]


@dataclass(frozen=True)
class Tail:
    """What stands behind a layer.

    Attributes:
        make: makes it, given z.
        apply: what was made, the layer's output z and its input phi, to the prediction.
        kinds: the kinds of z that it takes.
        to: the kind of its output, if another.
        fits: whether it can be built for these z and phi.
        family: the tails among which it stands.
    """

    name: str
    make: Callable[[Tensor], nn.Module] = field(repr=False)
    apply: Callable[[Any, Tensor, Tensor], Tensor] = field(
        default=lambda module, z, phi: module(z), repr=False
    )
    kinds: tuple[str, ...] = KINDS
    to: str | None = None
    fits: Callable[[Tensor, Tensor], bool] = field(default=lambda z, phi: True, repr=False)
    whole_gradient: bool = True
    family: str = ""


def plain(name: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tail:
    """A tail without parameters."""
    return Tail(name, nothing, lambda module, z, phi: function(z), *args, **kwargs)


def learned(init: Callable[[Tensor], Tensor]) -> Callable[[Tensor], nn.Module]:
    """Makes a module with one parameter, `weight`."""

    def make(z: Tensor) -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(init(z))
        return module

    return make


def adapter(z: Tensor) -> nn.Module:
    """A branch whose last matrix is still zero."""
    up = nn.Linear(2, z.shape[-1], bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(nn.Linear(z.shape[-1], 2), nn.Tanh(), up)


def identity_matrix(z: Tensor) -> nn.Module:
    layer = nn.Linear(z.shape[-1], z.shape[-1])
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def layer_norm(z: Tensor) -> nn.Module:
    norm = nn.LayerNorm(z.shape[-1])
    nn.init.normal_(norm.weight)
    return norm


def two_layer_norms(z: Tensor) -> nn.Module:
    c = z.shape[-1]
    return nn.Sequential(nn.LayerNorm(c, bias=False), nn.Linear(c, 4), nn.GELU(), nn.LayerNorm(4, eps=0.1))


def batch_norm(z: Tensor) -> nn.Module:
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[z.dim() - 2](z.shape[1])
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def mlp(z: Tensor) -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(z.shape[-1], 3), nn.GELU(), nn.Linear(3, 3))


def one_by_one(z: Tensor, batched: bool = True) -> nn.Module:
    space = z.dim() - 1 - batched
    return nn.Sequential(nn.Softplus(), (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1](z.shape[batched], 2, 1))


def attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """Attention through the math kernel, the one that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, **kwargs)


def cross_attend(module: Any, z: Tensor, phi: Tensor) -> Tensor:
    """z asks, phi answers: tokens stay independent."""
    key = phi @ module.weight
    return attend(z, key, key)


def couple(module: Any, z: Tensor, phi: Tensor) -> Tensor:
    """z plus a multiple of the batch's mean."""
    return torch.tanh(z + module.weight * z.mean(0))


def mean_pool(z: Tensor) -> Tensor:
    return z.flatten(1, -2).mean(1)


def attend_across_samples(z: Tensor) -> Tensor:
    """batch_first forgotten."""
    a = z.transpose(0, 1)
    return attend(a, a, a).transpose(0, 1)


def nothing(z: Tensor) -> nn.Module:
    return nn.Identity()


def several_samples(z: Tensor, phi: Tensor) -> bool:
    return len(z) > 1


def one_axis_of_tokens(z: Tensor, phi: Tensor) -> bool:
    return z.dim() == 3


def same_shape(z: Tensor, phi: Tensor) -> bool:
    return z.shape == phi.shape


ROWS, TOKENS, MAPS = ("features", "vector", "tokens"), ("tokens",), ("maps",)
NORMED, CHANNELED, BATCHES = ("features", "tokens"), ("features", "maps"), ("features", "tokens", "maps")

NONE = [plain("identity", lambda z: z)]
ELEMENTWISE = [
    plain("tanh", torch.tanh),
    plain("relu", F.relu),
    plain("relu_inplace", lambda z: F.relu(z, inplace=True)),
    plain("leaky_relu_inplace_tanh", lambda z: F.leaky_relu_(z, 0.3).tanh()),
    plain("gelu", F.gelu),
    plain("silu_inplace", lambda z: F.silu(z, inplace=True)),
    plain("softplus", F.softplus),
    plain("square", torch.square),
    plain("dropout", lambda z: F.dropout(z, 0.4)),
    plain("glu", lambda z: F.glu(z, -1), ROWS, fits=lambda z, phi: z.shape[-1] % 2 == 0),
    plain("checkpointed_tanh", lambda z: checkpoint(torch.tanh, z, use_reentrant=False)),
]  # fmt: skip
# Of a softmax, still its logits. What is learned is the identity now, but not for long: kappa is what it is
# without it, its gradient is not.
AFFINE = [
    plain("inplace_shift", lambda z: z.add_(0.7)),
    plain("inplace_through_view", lambda z: z.view(-1).mul_(1.5).view_as(z)),
    plain("contiguous_copy", lambda z: z.transpose(0, -1).contiguous().transpose(0, -1)),
    Tail("residual_inplace", nothing, lambda module, z, phi: z.add_(phi), fits=same_shape),
    plain("first_token", lambda z: z.flatten(1, -2)[:, 0], TOKENS, "features"),
    Tail("learned_bias", learned(lambda z: torch.randn(z.shape[-1])), lambda t, z, phi: z + t.weight),
    Tail("learned_scale_of_one", learned(lambda z: torch.ones(())), lambda t, z, phi: z * t.weight),
]  # fmt: skip
MATRICES = [
    Tail("linear", lambda z: nn.Linear(z.shape[-1], 3), kinds=ROWS),
    Tail("mlp", mlp, kinds=NORMED),
    Tail("conv", one_by_one, kinds=MAPS),
    Tail("conv_unbatched", lambda z: one_by_one(z, batched=False), kinds=("map",)),
    Tail("segmentation_head", lambda z: nn.Sequential(nn.Tanh(), nn.Conv2d(z.shape[1], 3, 3, padding=1)),
         kinds=MAPS, fits=lambda z, phi: z.dim() == 4),
    Tail("residual", nothing, lambda module, z, phi: torch.tanh(phi + z), fits=same_shape),
    Tail("learned_matrix_of_one", identity_matrix, kinds=ROWS),
    Tail("adapter_of_zero", adapter, lambda module, z, phi: z + module(z), ROWS),
]  # fmt: skip
NORMS = [
    Tail("layer_norm", layer_norm, kinds=ROWS),
    Tail("layer_norm_of_maps", lambda z: nn.LayerNorm(z.shape[1:]), kinds=MAPS),
    Tail("layer_norm_no_affine_linear", lambda z: nn.Sequential(
         nn.LayerNorm(z.shape[-1], elementwise_affine=False), nn.Linear(z.shape[-1], 3)), kinds=NORMED),
    Tail("two_layer_norms", two_layer_norms, kinds=NORMED),
    Tail("rms_norm", lambda z: nn.RMSNorm(z.shape[-1]), kinds=NORMED),
    Tail("group_norm", lambda z: nn.GroupNorm(2 if z.shape[1] % 4 == 0 else 1, z.shape[1]), kinds=CHANNELED),
    Tail("batch_norm_train", batch_norm, kinds=CHANNELED, fits=several_samples, whole_gradient=False),
    Tail("batch_norm_eval", lambda z: batch_norm(z).eval(), kinds=CHANNELED),
]  # fmt: skip
# Of positions or of samples. The last two couple samples not at all, and less than single precision can see.
MIXING = [
    Tail("multihead_attention", lambda z: nn.MultiheadAttention(z.shape[-1], 1, batch_first=True),
         lambda module, z, phi: module(z, z, z, need_weights=True)[0], TOKENS, fits=one_axis_of_tokens),
    plain("causal_attention", lambda z: attend(z, z, z, is_causal=True), TOKENS),
    plain("attention_across_samples", attend_across_samples, TOKENS),
    plain("qkv_attention", lambda z: attend(*z.chunk(3, -1)), TOKENS, fits=lambda z, phi: z.shape[-1] == 3),
    Tail("cross_attention", learned(lambda z: torch.randn(3, z.shape[-1])), cross_attend, TOKENS,
         fits=lambda z, phi: phi.shape[-1] == 3),
    Tail("gru", lambda z: nn.GRU(z.shape[-1], 3, batch_first=True), lambda module, z, phi: module(z)[0],
         TOKENS, fits=one_axis_of_tokens),
    plain("mean_over_tokens", mean_pool, TOKENS, "features"),
    plain("mean_over_space", lambda z: z.flatten(2).mean(-1), MAPS, "features"),
    Tail("max_pool_flatten_linear", lambda z: nn.Linear(z[0, ..., 0].numel(), 3),
         lambda module, z, phi: module(F.relu(z).amax(-1).flatten(1)), MAPS, "features"),
    Tail("coupling_of_zero", learned(lambda z: torch.zeros(())), couple, BATCHES),
    Tail("coupling_too_weak_to_see", learned(lambda z: torch.tensor(1e-5)), couple, BATCHES),
]  # fmt: skip
TAILS = families(
    none=NONE, elementwise=ELEMENTWISE, affine=AFFINE, matrices=MATRICES, norms=NORMS, mixing=MIXING
)


# ------------------------------------------------------------------------------------------- losses


@dataclass(frozen=True)
class Loss:
    """A loss of predictions (rows, C), or, if not `by_rows`, of the net's output as it is.

    Attributes:
        function: of the predictions and the problem, which carries the data of `data_for`.
        learned: which of these data are parameters of the loss.
        classes: how many classes it needs.
        family: the losses among which it stands.
    """

    name: str
    function: Callable[[Tensor, Problem], Tensor] = field(repr=False)
    kinds: tuple[str, ...] = KINDS
    learned: tuple[str, ...] = ()
    classes: int = 2
    by_rows: bool = True
    finite_differences: bool = True
    family: str = ""


def as_rows(out: Tensor, kind: str) -> Tensor:
    """The predictions, one a row."""
    if kind == "vector":
        return out[None]
    if kind in ("maps", "map"):
        out = out.movedim(1 if kind == "maps" else 0, -1)
    return out.reshape(-1, out.shape[-1])


def data_for(rows: int, classes: int) -> dict[str, Tensor]:
    """Everything that some loss wants to know beside the predictions."""
    y, index = torch.randint(classes, (rows,)), torch.arange(rows)
    share = torch.rand(rows, classes)
    return {
        "y": y,
        "y2": torch.randint(classes, (rows,)),
        "y_ignored": y.where(index != rows // 2, -100),
        "kept": index % 3 != 1,
        "repeated": torch.randint(rows, (rows + 2,)),
        "class_kept": torch.arange(rows * classes).reshape(rows, classes) % 4 != 2,
        "soft": share / share.sum(1, keepdim=True),
        "unnormalised": share,
        "target": torch.randn(rows, classes),
        "counts": torch.poisson(2 * torch.rand(rows, classes)),
        "binary": (torch.rand(rows, classes) > 0.5).float(),
        "class_weight": 0.2 + torch.rand(classes),
        "row_weight": 0.2 + torch.rand(rows),
        "signed_weight": torch.randn(rows).abs() * (2 * (index % 2) - 1),
        "log_variance": torch.randn(rows),
        "prior": torch.randn(classes),
        "distance": torch.rand(rows),
        "temperature": torch.tensor(1.7),
        "one": torch.tensor(1.0),
        "zero": torch.tensor(0.0),
    }


def gathered(z: Tensor, rows: Tensor) -> Tensor:
    return z.gather(0, rows[:, None].expand(-1, z.shape[1]))


def mixed_rows(z: Tensor) -> Tensor:
    """Every class in its place, but from another row than the class before."""
    index = torch.arange(z.shape[0])[:, None] + torch.arange(z.shape[1])
    return z[index % z.shape[0], torch.arange(z.shape[1])]


def per_row(z: Tensor, p: Problem) -> Tensor:
    return CE(z, p.y, reduction="none")


def uncertain(z: Tensor, p: Problem) -> Tensor:
    """Weights that are learned themselves (Kendall and Gal)."""
    return ((-p.log_variance).exp() * per_row(z, p) + p.log_variance).mean()


def true_probability(z: Tensor, p: Problem) -> Tensor:
    return z.softmax(1).gather(1, p.y[:, None])[:, 0]


def focal(z: Tensor, p: Problem, gamma: Tensor | float) -> Tensor:
    # Not a power: torch's derivatives of x ** g in both x and g are wrong at g = 0 and 1.
    weight = (gamma * (1 - true_probability(z, p)).log()).exp()
    return (weight * per_row(z, p)).mean()


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1).mean()


def z_penalty(z: Tensor) -> Tensor:
    return z.logsumexp(1).square().mean()


def weighted_bce(z: Tensor, p: Problem) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, p.binary, p.row_weight[:, None], pos_weight=p.class_weight)


def gaussian(z: Tensor, p: Problem) -> Tensor:
    return F.gaussian_nll_loss(z[:, :1], p.target[:, :1], F.softplus(z[:, 1:2]))


def dice(z: Tensor, p: Problem, dims: tuple[int, ...]) -> Tensor:
    q = torch.sigmoid(z)
    return (1 - (2 * (q * p.binary).sum(dims) + 1) / (q.sum(dims) + p.binary.sum(dims) + 1)).mean()


def contrastive(z: Tensor) -> Tensor:
    """NT-Xent with the next row for a positive."""
    unit = z / (z.square().sum(1, keepdim=True) + 0.1).sqrt()  # F.normalize has no derivative at 0
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (unit @ unit.T / 0.5).masked_fill(own, -torch.inf)
    return CE(similarity, (torch.arange(len(z), device=z.device) + 1) % len(z))


def teacher(z: Tensor, p: Problem) -> Tensor:
    return F.kl_div(z.log_softmax(1), p.soft, reduction="batchmean")


def reversed_divergence(z: Tensor, p: Problem) -> Tensor:
    return F.kl_div(p.soft.log(), z.log_softmax(1), log_target=True, reduction="sum")


def masked_classes(z: Tensor, p: Problem) -> Tensor:
    return CE(z.masked_fill(~p.class_kept, -torch.inf), p.class_kept.float().argmax(1))


def two_groups(z: Tensor, p: Problem) -> Tensor:
    """Two classifications from one head: a softmax over each part of the outputs."""
    half = z.shape[1] // 2
    return CE(z[:, :half], p.y % half) + CE(z[:, half:], p.y % (z.shape[1] - half))


def extra_class(z: Tensor, p: Problem) -> Tensor:
    return CE(torch.cat([z, torch.zeros_like(z[:, :1])], 1), p.y)


def weight_penalty(p: Problem) -> Tensor:
    return torch.stack([w.square().sum() for w in p.net.parameters()]).sum()


def language_model(out: Tensor, p: Problem) -> Tensor:
    """The next token's cross-entropy."""
    predictions = out[:, :-1].reshape(-1, out.shape[-1])
    return CE(predictions, p.y[: len(predictions)])


def dense_tokens(out: Tensor, p: Problem) -> Tensor:
    """Cross-entropy in torch's dense layout, (N, C, P), through a transpose."""
    dense = out.transpose(1, -1)
    return CE(dense, p.y.reshape(dense[:, 0].shape))


SEVERAL = ("features", "tokens", "maps", "map")  # kinds with more than one row

# A softmax cross-entropy per row, however written.
SOFTMAX = [
    Loss("ce", lambda z, p: CE(z, p.y), classes=1),
    Loss("ce_of_shape_one", lambda z, p: CE(z, p.y).reshape(1)),
    Loss("ce_sum", lambda z, p: CE(z, p.y, reduction="sum")),
    Loss("ce_class_weights", lambda z, p: CE(z, p.y, weight=p.class_weight)),
    Loss("ce_smoothing", lambda z, p: CE(z, p.y, label_smoothing=0.2)),
    Loss("ce_weights_smoothing", lambda z, p: CE(z, p.y, weight=p.class_weight, label_smoothing=0.2)),
    Loss("ce_ignore_index", lambda z, p: CE(z, p.y_ignored), SEVERAL),
    Loss("ce_ignore_smoothing_sum",
         lambda z, p: CE(z, p.y_ignored, reduction="sum", label_smoothing=0.1), SEVERAL),
    Loss("ce_soft_targets", lambda z, p: CE(z, p.soft)),
    Loss("ce_soft_targets_weights_smoothing",
         lambda z, p: CE(z, p.soft, weight=p.class_weight, label_smoothing=0.3)),
    Loss("ce_soft_targets_unnormalised", lambda z, p: CE(z, p.unnormalised)),
    Loss("ce_none_weighted_mean", lambda z, p: (per_row(z, p) * p.row_weight).sum() / p.row_weight.sum()),
    Loss("ce_signed_weights", lambda z, p: (per_row(z, p) * p.signed_weight).sum()),
    Loss("ce_learned_weights", uncertain, learned=("log_variance",)),
    Loss("ce_weights_from_prediction_detached",
         lambda z, p: (per_row(z, p) * true_probability(z.detach(), p)).mean(), finite_differences=False),
    Loss("ce_over_itself_detached", lambda z, p: CE(z, p.y) / CE(z, p.y).detach(), finite_differences=False),
    Loss("ce_own_prediction_detached", lambda z, p: CE(z, z.detach().softmax(1)), finite_differences=False),
    Loss("ce_hardest_rows", lambda z, p: per_row(z, p).topk(max(1, len(z) // 2)).values.mean()),
    Loss("ce_flooded", lambda z, p: (CE(z, p.y) - 30).abs() + 30),
    Loss("ce_two_added", lambda z, p: 0.3 * CE(z, p.y) + 0.7 * CE(z, p.y2)),
    Loss("ce_plus_weight_penalty", lambda z, p: CE(z, p.y) + 0.1 * weight_penalty(p)),
    Loss("ce_by_hand", lambda z, p: -z.log_softmax(1).gather(1, p.y[:, None]).mean()),
    Loss("ce_by_logsumexp", lambda z, p: (z.logsumexp(1) - z.gather(1, p.y[:, None])[:, 0]).mean()),
    Loss("ce_log_of_softmax", lambda z, p: F.nll_loss(z.softmax(1).log(), p.y)),
    Loss("ce_masked_rows", lambda z, p: CE(z[p.kept], p.y[p.kept])),
    Loss("ce_repeated_rows", lambda z, p: CE(z[p.repeated], p.y[p.repeated])),
    Loss("ce_expanded_rows", lambda z, p: CE(z.expand(2, *z.shape).flatten(0, 1), p.y.repeat(2))),
    Loss("ce_concatenated", lambda z, p: CE(torch.cat([z, z.flip(0)]), torch.cat([p.y, p.y2]))),
    Loss("ce_permuted_classes", lambda z, p: CE(z.flip(1), p.y)),
    Loss("ce_transposed_layout", lambda z, p: CE(z.T[None], p.y[None])),
    Loss("kl_to_teacher", teacher),
    Loss("ce_plus_kl", lambda z, p: 0.5 * CE(z, p.y) + 0.5 * teacher(z, p)),
]  # fmt: skip
# Softmax cross-entropies, but not of the layer's rows as they are.
SOFTMAX_OF_OTHERS = [
    Loss("ce_masked_classes", masked_classes),
    Loss("ce_logit_adjusted", lambda z, p: CE(z + p.prior, p.y)),
    Loss("ce_logit_adjustment_learned", lambda z, p: CE(z + p.prior, p.y), learned=("prior",)),
    Loss("ce_extra_class", extra_class),
    Loss("ce_fewer_classes", lambda z, p: CE(z[:, 1:], p.y.clamp(max=z.shape[1] - 2)), classes=3),
    Loss("ce_two_groups", two_groups, classes=4),
    Loss("ce_over_the_batch", lambda z, p: -(z.log_softmax(0) * p.soft).sum(), SEVERAL),
    Loss("ce_centred_over_the_batch", lambda z, p: CE(z - 0.5 * z.mean(0), p.y), SEVERAL),
    Loss("ce_temperature", lambda z, p: CE(z / p.temperature, p.y)),
    Loss("ce_temperature_learned", lambda z, p: CE(z / p.temperature, p.y), learned=("temperature",)),
    Loss("ce_temperature_of_each_row", lambda z, p: CE(z * p.row_weight[:, None], p.y)),
    Loss("ce_temperature_of_each_row_learned",
         lambda z, p: CE(z * p.row_weight[:, None], p.y), learned=("row_weight",)),
    Loss("ce_temperature_of_each_class", lambda z, p: CE(z * p.class_weight, p.y)),
    Loss("ce_negated", lambda z, p: CE(p.prior - z, p.y)),
    Loss("ce_added_twice_over", lambda z, p: CE(torch.add(p.prior, z, alpha=2), p.y)),
    Loss("ce_of_a_part_of_the_prior", lambda z, p: CE(torch.sub(z, p.prior, alpha=0.5), p.y)),
    Loss("ce_gathered_and_scaled", lambda z, p: CE(gathered(z, p.repeated) * 0.3, p.y[p.repeated])),
    Loss("ce_averaged_with_another_head", lambda z, p: CE((z + p.target) / 2, p.y)),
    Loss("ce_two_priors", lambda z, p: CE((z + torch.stack([p.prior, -p.prior])[:, None]).flatten(0, 1),
                                          p.y.repeat(2))),
    Loss("ce_of_mixed_rows", lambda z, p: CE(mixed_rows(z), p.y), SEVERAL),
    Loss("ce_of_mixed_rows_scaled", lambda z, p: CE(mixed_rows(z) / 7, p.y), SEVERAL),
    Loss("ce_difference_of_rows", lambda z, p: CE(z - z.roll(1, 0), p.y), SEVERAL),
    Loss("ce_mean_of_rows", lambda z, p: CE(z.mean(0, keepdim=True), p.y[:1]), SEVERAL),
    Loss("ce_temperature_still_one", lambda z, p: CE(z / p.one, p.y), learned=("one",)),
]  # fmt: skip
# Functions of log-probabilities, but not linear ones.
OF_LOG_PROBABILITIES = [
    Loss("ce_power_still_one", lambda z, p: (per_row(z, p).log() * p.one).exp().mean(), learned=("one",)),
    Loss("ce_soft_maximum", lambda z, p: per_row(z, p).logsumexp(0), SEVERAL),
    Loss("ce_exponential", lambda z, p: CE(z, p.y).mul(0.5).exp()),
    Loss("ce_squared", lambda z, p: per_row(z, p).square().mean()),
    Loss("ce_weights_from_prediction", lambda z, p: (per_row(z, p) * torch.sigmoid(z[:, 0])).mean()),
    Loss("ce_over_all_classes", lambda z, p: (per_row(z, p) / -z.log_softmax(1).sum(1)).mean()),
    Loss("ce_own_prediction", lambda z, p: CE(z, z.softmax(1))),
    Loss("focal", lambda z, p: focal(z, p, 2.0)),
    Loss("focal_gamma_still_zero", lambda z, p: focal(z, p, p.zero), learned=("zero",)),
    Loss("generalised_ce", lambda z, p: ((1 - true_probability(z, p) ** 0.7) / 0.7).mean()),
    Loss("poly_ce", lambda z, p: CE(z, p.y) + (1 - true_probability(z, p)).mean()),
    Loss("confidence_penalty", lambda z, p: CE(z, p.y) - 0.1 * entropy(z)),
    Loss("z_loss", lambda z, p: CE(z, p.y) + 0.1 * z_penalty(z)),
    Loss("z_loss_still_zero", lambda z, p: CE(z, p.y) + p.zero * z_penalty(z), learned=("zero",)),
    Loss("ce_plus_mse", lambda z, p: CE(z, p.y) + F.mse_loss(z, p.target)),
    Loss("kl_reversed", reversed_divergence),
    Loss("js_divergence", lambda z, p: -(0.5 * (z.softmax(1) + p.soft)).log().mul(p.soft).sum(1).mean()),
]  # fmt: skip
# Others, of independent rows.
OF_ROWS = [
    Loss("mse", lambda z, p: F.mse_loss(z, p.target), classes=1),
    Loss("huber", lambda z, p: F.huber_loss(z, p.target, delta=0.8), classes=1),
    Loss("bce", lambda z, p: F.binary_cross_entropy_with_logits(z, p.binary), classes=1),
    Loss("bce_weights", weighted_bce, classes=1),
    Loss("poisson", lambda z, p: F.poisson_nll_loss(z, p.counts), classes=1),
    Loss("gaussian_nll", gaussian),
    Loss("cosine", lambda z, p: -F.cosine_similarity(z + p.prior, p.target).mean()),
    Loss("dice_per_row", lambda z, p: dice(z, p, (1,)), classes=1),
]  # fmt: skip
# Rows interact.
OF_SEVERAL_ROWS = [
    Loss("dice_over_batch", lambda z, p: dice(z, p, (0,)), SEVERAL, classes=1),
    Loss("contrastive", lambda z, p: contrastive(z), SEVERAL),
    Loss("ce_plus_contrastive", lambda z, p: CE(z, p.y) + 0.5 * contrastive(z), SEVERAL),
    Loss("rank_pairs", lambda z, p: F.softplus(z[:-1, 0] - z[1:, 0]).mean(), SEVERAL, classes=1),
]  # fmt: skip
# No curvature at all.
FLAT = [
    Loss("hinge", lambda z, p: F.relu(1 - z.gather(1, p.y[:, None]) + z).mean()),
    Loss("linear_loss", lambda z, p: (z * p.target).sum(), classes=1),
]  # fmt: skip
# Layouts.
LAYOUTS = [
    Loss("language_model", language_model, ("tokens",), by_rows=False),
    Loss("ce_dense_tokens", dense_tokens, ("tokens",), by_rows=False),
    Loss("ce_dense_maps", lambda out, p: CE(out, p.y.reshape(out[:, 0].shape)), MAPS, by_rows=False),
]  # fmt: skip
LOSSES = families(
    softmax=[*SOFTMAX, *LAYOUTS],
    softmax_of_others=SOFTMAX_OF_OTHERS,
    of_log_probabilities=OF_LOG_PROBABILITIES,
    of_rows=[*OF_ROWS, *FLAT],
    of_several_rows=OF_SEVERAL_ROWS,
)


# --------------------------------------------------------------------------------------------- grid


class StemLayerTail(nn.Module):
    """stem -> layer -> tail. The stem mixes the last axis, so that kappa has a gradient below the layer."""

    def __init__(self, layer: Layer, tail: Tail) -> None:
        super().__init__()
        size = layer.shape[-1]
        self.stem, self.layer = nn.Sequential(nn.Linear(size, size), nn.Tanh()), layer.make()
        self.apply_tail = tail.apply
        with torch.no_grad():
            self.tail = tail.make(self.layer(torch.zeros(layer.shape)))

    def forward(self, x: Tensor) -> Tensor:
        phi = self.stem(x)
        return self.apply_tail(self.tail, self.layer(phi), phi)


def build(layer: Layer, tail: Tail, loss: Loss) -> Problem:
    net, kind, x = StemLayerTail(layer, tail), tail.to or layer.kind, torch.randn(layer.shape)
    with torch.no_grad():
        data = data_for(*as_rows(net(x), kind).shape)
    data |= {name: nn.Parameter(data[name]) for name in loss.learned}

    def run(p: Problem) -> Tensor:
        out = p.net(p.x)
        return loss.function(as_rows(out, kind) if loss.by_rows else out, p)

    return Problem(net, [net.layer], run, x=x, **data)


@cache
def output_shape(layer: Layer) -> torch.Size:
    with torch.random.fork_rng():
        return layer.make()(torch.zeros(layer.shape)).shape


@cache
@torch.no_grad()
def predictions(
    tail: Tail, kind: str, input_shape: tuple[int, ...], shape: torch.Size
) -> tuple[str, int, int] | None:
    """Kind, rows and classes of what a tail predicts from such an output, or None if it does not fit."""
    phi, z = torch.zeros(input_shape), torch.zeros(shape)
    if kind not in tail.kinds or not tail.fits(z, phi):
        return None
    kind = tail.to or kind
    with torch.random.fork_rng():
        rows, classes = as_rows(tail.apply(tail.make(z), z, phi), kind).shape
    return kind, rows, classes


def combination(layer: Layer, tail: Tail, loss: Loss) -> Case | None:
    """The case of the three, or None if they do not go together."""
    found = predictions(tail, layer.kind, layer.shape, output_shape(layer))
    if found is None:
        return None
    kind, rows, classes = found
    if kind not in loss.kinds or classes < loss.classes or ("vector" not in loss.kinds and rows < 2):
        return None
    return Case(
        f"{layer.name}-{tail.name}-{loss.name}",
        lambda: build(layer, tail, loss),
        whole_gradient=tail.whole_gradient,
        finite_differences=layer.finite_differences and loss.finite_differences,
        parts=(layer, tail, loss),
    )


AXES = {"vector": "features", "map": "maps"}
"""Kinds without a sample axis, and the kind whose class axis is read in the same way."""


def pairs(layer: Layer, tail: Tail, loss: Loss) -> set[tuple[object, ...]]:
    """What a case shows: which two of the three meet in it, one by name and one by what matters of it.

    A layer's operation meets every family of tails and of losses, a tail every family of losses. A loss is
    recognised in every layout, right on a layer and behind a tail. A softmax is right on every layer.
    """
    direct = tail.family == "none"
    shown: set[tuple[object, ...]] = {
        (layer.name, tail.family, None),
        (layer.name, None, loss.family),
        (layer.kind, tail.name, None),
        (None, tail.name, loss.family),
        (AXES.get(layer.kind, layer.kind), None, loss.name),
        (None, direct, loss.name),
    }
    return shown | ({(layer.name, direct, loss.family)} if loss.family == "softmax" else set())


def each(case: Case) -> Iterable[object]:
    """What a case consists of: its three parts, or itself if it is of no grid."""
    return case.parts or [case.name]


def grid() -> list[Case]:
    """Cases that show all `pairs`, out of a quarter of all cases that there could be.

    Of equals the checksum of the name chooses, so that no row is preferred.
    """
    possible = [
        combination(layer, tail, loss)
        for (i, layer), (j, tail) in product(enumerate(LAYERS), enumerate(TAILS))
        for loss in LOSSES[(i + j) % 4 :: 4]
    ]
    fitting = [case for case in possible if case is not None]
    fitting.sort(key=lambda case: zlib.crc32(case.name.encode()))
    return covering(fitting, lambda case: pairs(*case.parts))


GRID = grid()
