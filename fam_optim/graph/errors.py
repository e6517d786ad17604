"""Explains which derivatives torch lacks where kappa needs them, and what to do about it."""

import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from fam_optim.graph import nodes
from fam_optim.graph.reach import spread

_NO_SECOND = {  # by a pattern that both the kind of the node and torch's message match
    r"scaled_?dot_?product|_(efficient|flash|cudnn)_attention": "Fused attention has no second derivative: "
    "run the forward under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    r"cudnn[_ ]?rnn|miopen_?rnn|thnn_?fused|mkldnn_rnn|_thnn_differentiable": "Fused recurrent kernels have "
    "no second derivative: run the forward under torch.backends.cudnn.flags(enabled=False), on the CPU "
    "torch.backends.mkldnn.flags(enabled=False).",
    r".*linear_cross_entropy_batch": "Chunked linear_cross_entropy has none: call it without `options`.",
    r"logcumsumexp": "Those of torch.logcumsumexp are nan: write it out, (x - c).exp().cumsum(dim).log() + c "
    "with c = x.detach().amax(dim, keepdim=True).",
}
_NO_THIRD = {  # by kind of node
    "Pdist": "torch's of pdist is nan. Use FAM(..., detach_hessian=True), or write it out: "
    "(x[i] - x[j]).norm(dim=1) with i, j = torch.triu_indices(len(x), len(x), 1).",
    "NativeLayerNormBackward": "torch's of LayerNorm is wrong (pytorch/pytorch#175754) within "
    "torch.jit.script and autograd.Function. Use FAM(..., detach_hessian=True), or call it outside of them.",
}
_REMEDIES = _NO_SECOND | {
    "use_reentrant": "Reentrant activation checkpointing has no second derivative: checkpoint what follows "
    "the layer with use_reentrant=False.",
    "donated buffers": "A compiled region gives its buffers away after one backward: set "
    "torch._functorch.config.donated_buffer = False before it is compiled.",
    "selective activation checkpoint": "Selective checkpoints allow one derivative: leave out `context_fn`.",
    "second time": "The loss has been backpropagated already: call regularize(loss), or compute kappa, "
    "before its backward().",
}
_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")
_SECOND = "kappa needs second derivatives of what follows the layer"


@contextmanager
def explained(needed: str) -> Iterator[None]:
    """Raises torch's errors again with what the user can do. `needed` says what kappa asked for."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        text = remedy(error) or (
            f'torch says of one there: "{error}" Write what computes it out in elementary operations on '
            "plain tensors, or regularise a layer behind it (the last one, say)."
        )
        raise RuntimeError(f"kappa needs {needed} of what follows the layer. {text}") from error


def remedy(error: RuntimeError) -> str | None:
    """Returns what the user can do where torch refused a derivative behind the layer; None if unknown."""
    for pattern, text in _REMEDIES.items():
        if re.search(pattern, str(error), re.IGNORECASE):
            return text
    missing = _NO_DERIVATIVE.search(str(error))
    return missing and (
        f"In torch {missing[1]} has none. Write what computes it out in elementary operations, or regularise "
        "a layer behind it (the last one, say)."
    )


def check_differentiable(path: Iterable[Node]) -> None:
    """Raises RuntimeError for nodes whose second derivatives are missing in torch or silently wrong."""
    for node in path:
        # torch raises only where the region's backward depends on something that requires gradients.
        # Elsewhere, as in a compiled cross-entropy, it takes second derivatives to be zero.
        if nodes.is_compiled(node):
            raise RuntimeError(
                f"{_SECOND}, and a region compiled by torch.compile has none. Compile only what comes before "
                "the layer, model.body.compile(), or put torch.compiler.disable on the rest and on the loss."
            )
        for pattern, text in _NO_SECOND.items():  # torch's own error comes late, in the backward of kappa
            if re.match(pattern, nodes.kind(node), re.IGNORECASE):
                raise RuntimeError(f"{_SECOND}. {text}")
        # The backwards of DTensor's conversions lose their own graph, and collectives would mix processes.
        if nodes.communicates(node):
            raise RuntimeError(
                f"{_SECOND}, and {node.name()} there communicates with other processes, so it has none. "
                "Regularise a layer behind it, or keep what follows the layer local to the process."
            )


def check_functions(path: Set[Node], ends: Set[Node], gradient: Sequence[Tensor]) -> Set[Node]:
    """Raises RuntimeError for an autograd.Function that drops out of a second derivative, where torch takes
    its part to be zero. `gradient` is the first derivative in z, made by `ends`. Returns the nodes of the
    first derivative; none if the path from the loss has neither functions nor scripted regions."""
    functions = [node for node in path if nodes.is_function(node)]
    if not any(map(nodes.hides, path)):
        return frozenset()
    roots = [(g.grad_fn, g.output_nr) for g in gradient]
    forward: Any = {*path, *ends, None}
    top = {node for node, _ in roots} - forward
    made: set[Node] = top | spread(top, lambda node: {below for below, _ in node.next_functions} - forward)
    edges = [*roots, *(edge for node in (*path, *made) for edge in node.next_functions)]
    outputs: dict[Any, set[int]] = {node: set() for node in (*functions, *filter(nodes.is_function, made))}
    for node, output in edges:
        if node in outputs:
            outputs[node].add(output)
    forbidden = any(node.name() == "torch::autograd::Error" for node in made)  # by once_differentiable
    if forbidden or any(_drops_out(n, of or {0}, forward | made) for n, of in outputs.items()):
        names = ", ".join(sorted({nodes.kind(node) for node in functions}))
        raise RuntimeError(
            f"{_SECOND}, and an autograd.Function there ({names}) has none: its backward is marked with "
            "once_differentiable, or makes constants of the numbers that it keeps. Write what it computes "
            "out in elementary operations (a mask may be kept as bool), or regularise a layer behind it."
        )
    return made


def _drops_out(node: Node, outputs: Set[int], between: Set[Node]) -> bool:
    """Returns whether a function's backward treats numbers that it keeps as constants. It does if no gradient
    depends on an operand made of z, or if one operand's gradient depends on another but not the reverse.
    Only `outputs` that are used count, since others may be no numbers at all."""
    if not nodes.keeps_numbers(node):
        return False
    top = [GradientEdge(node, i) for i in outputs]
    made = [nodes.results(node)[i] for i in outputs]
    ones = [torch.ones(tuple(m.shape), dtype=m.dtype, device=m.device) for m in made]
    edges = [GradientEdge(below, i) for below, i in dict.fromkeys(node.next_functions) if below is not None]
    operands = [edge for edge in edges if edge.node in between]
    depends = dict.fromkeys(edges, (False,) * len(operands))
    # The derivatives end at the operands, since one operand may be made of another.
    with torch.enable_grad(), explained("second derivatives"), nodes.not_passed({e.node for e in edges}):
        first = torch.autograd.grad(top, edges, ones, create_graph=True, retain_graph=True, allow_unused=True)
        for edge, g in zip(edges, first, strict=True):
            if g is not None and g.requires_grad and operands:
                one = torch.ones_like(g)
                second = torch.autograd.grad(g, operands, one, retain_graph=True, allow_unused=True)
                depends[edge] = tuple(found is not None for found in second)
    pattern = [depends[edge] for edge in operands]  # which second derivatives there are: symmetric if right
    return not any(map(any, depends.values())) or pattern != list(zip(*pattern, strict=True))


def undifferentiable(path: Set[Node], derivative: Set[Node]) -> str | None:
    """Returns why kappa has no gradient through a tail, whose derivative shows what functions may hide."""
    for node in path | derivative:
        why = _NO_THIRD.get(nodes.kind(node))
        if nodes.normalises_over_batch(node):
            # InstanceNorm and weight standardisation give batch_norm all samples or filters as one sample.
            what = "InstanceNorm" if nodes.shape(node, 0)[0] == 1 else "BatchNorm in train mode"
            why = (
                f"torch has none of {what}. Use FAM(..., detach_hessian=True), put BatchNorm in eval mode, "
                "replace nn.InstanceNorm by nn.GroupNorm(channels, channels), or regularise a later layer."
            )
        if why is not None:
            return f"the whole gradient of kappa needs third derivatives of what follows the layer, and {why}"
    return None


def once_differentiable(kappa: Tensor, undifferentiable: str | None = None) -> Tensor:
    """Returns `kappa` after making a backward from it with create_graph=True raise RuntimeError, as torch's
    own error would come late or not at all. Every backward raises the reason why kappa has no gradient."""
    why = undifferentiable or (
        "this kappa can be differentiated once only, and a backward with create_graph=True asks for more, as "
        "AdaHessian does. Take Hessian-vector products of the loss without kappa, or use mode='full'."
    )

    def refuse(gradient: Tensor) -> None:
        if undifferentiable or torch.is_grad_enabled():
            raise RuntimeError(why)

    if kappa.requires_grad:
        kappa.register_hook(refuse)  # type: ignore[no-untyped-call]
    return kappa
