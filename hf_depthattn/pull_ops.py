r"""Backward of Attention Residuals by "pull": a source's gradient in one pass, once all reads of it are known.

Autograd adds the gradients that N reads send to a source one after another. With N sources that is the larger part of
the traffic of a training step: 5 N + 1 matrices per read. Here a read keeps its own gradient dL/dh and three numbers
per token and source, which it computes together with the gradient of its score weight,

    a_l = read_scale p_l,   b_l = ds_l r,   c_l = -ds_l s_l r^2 / D            (notation of `depth_ops`)

and the source's own node in autograd's graph, the *tap*, which runs when all reads of it have run, forms

    dL/dv = direct + sum_l (a_l dL/dh_l + b_l w_l) + (sum_l c_l) v

2 N + 4 matrices per read. A read finds the tap of a source behind its tensor (`grad_fn`); a tensor that came another
way (a copy on another device, a detached one) has none, and the read is then an ordinary op, as it is under
`torch.compile`, `torch.export` and `torch.func`, which do not know nodes with a memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .depth_dispatch import resolve
from .depth_ops import attn_res_read, gradient_factors, is_paper_case, token_chunks
from .kernels.attn_res_pull_ops import PullImpl


class _Reader(NamedTuple):
    """What a read leaves at the tap of one of its sources."""

    graph_task: int
    impl: PullImpl
    grad: Tensor
    score_weight: Tensor
    coefficients: Tensor
    position: int


def tap(source: Tensor) -> Tensor:
    """The same tensor, behind a node that gathers what its reads leave; where autograd has no use for one, itself."""
    if not (torch.is_grad_enabled() and source.requires_grad) or _is_traced():
        return source
    return _Tap.apply(source)


def is_tapped(sources: Sequence[Tensor]) -> bool:
    """Whether every source that needs a gradient comes from a tap, and one does."""
    needing = [source for source in sources if source.requires_grad]
    return bool(needing) and not _is_traced() and all(_readers_of(source) is not None for source in needing)


def attn_res_read_tapped(
    sources: Sequence[Tensor],
    score_weight: Tensor,
    *,
    eps: float,
    normalize_keys: bool = True,
    activation: str = "softmax",
    num_depth_heads: int = 1,
    read_scale: float = 1.0,
    impl: str = "auto",
    return_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attn_res_read`, with the backward of this file where the sources are tapped; arguments and results as there.

    Options beyond the paper's, and reads that return their weights, are ordinary ops.
    """
    is_simple = is_paper_case(score_weight, normalize_keys, activation, num_depth_heads) and not return_weights
    if is_simple and is_tapped(sources):
        pull_impl = resolve("attn_res_pull", impl, sources[0].device, PULL_TORCH, (sources, score_weight))
        readers = [_readers_of(source) if source.requires_grad else None for source in sources]
        return _PulledRead.apply(pull_impl, readers, eps, read_scale, score_weight, *sources)[0], None
    return attn_res_read(
        sources,
        score_weight,
        eps=eps,
        normalize_keys=normalize_keys,
        activation=activation,
        num_depth_heads=num_depth_heads,
        read_scale=read_scale,
        impl=impl,
        return_weights=return_weights,
    )


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _readers_of(source: Tensor) -> list[_Reader] | None:
    return getattr(source.grad_fn, "depth_readers", None)


class _Tap(torch.autograd.Function):
    """Identity whose backward adds up what the reads of its output have left."""

    @staticmethod
    def forward(ctx, source: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source)
        ctx.depth_readers = []
        return source.view_as(source)

    @staticmethod
    @once_differentiable
    def backward(ctx, direct: Tensor | None) -> Tensor | None:
        graph_task = torch._C._current_graph_task_id()
        # Others were left by a backward pass that did not come this far.
        readers = [reader for reader in ctx.depth_readers if reader.graph_task == graph_task]
        ctx.depth_readers.clear()
        if not readers:
            return direct
        (source,) = ctx.saved_tensors
        _, _, grads, weights, coefficients, positions = zip(*readers, strict=True)
        return readers[0].impl.pull(source, direct, grads, weights, coefficients, positions)


class _PulledRead(torch.autograd.Function):
    """A read that sends no gradients to its sources, but leaves at their taps what gives them."""

    @staticmethod
    def forward(ctx, impl, readers, eps, read_scale, score_weight, *sources):
        h, stats = impl.read(sources, score_weight, eps, read_scale)
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.readers, ctx.read_scale = impl, readers, read_scale
        ctx.save_for_backward(score_weight, stats, *sources)
        ctx.mark_non_differentiable(stats)
        return h, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, _):
        num_inputs = 5 + len(ctx.readers)
        if grad_h is None:
            return (None,) * num_inputs
        score_weight, stats, *sources = ctx.saved_tensors
        coefficients, grad_weight = ctx.impl.coefficients(grad_h, sources, score_weight, stats, ctx.read_scale)
        graph_task = torch._C._current_graph_task_id()
        for position, readers in enumerate(ctx.readers):
            if readers is not None:
                readers.append(_Reader(graph_task, ctx.impl, grad_h, score_weight, coefficients, position))
        return None, None, None, None, grad_weight.to(score_weight.dtype), *(None for _ in sources)


def _read_torch(
    sources: Sequence[Tensor], score_weight: Tensor, eps: float, read_scale: float
) -> tuple[Tensor, Tensor]:
    weight = score_weight.to(torch.promote_types(sources[0].dtype, torch.float32))
    h, logits, rstd = torch.ops.depthattn.attn_res_read(list(sources), weight, eps, read_scale)
    return h, torch.stack((logits, rstd))  # [2, N, tokens]


def _coefficients_torch(
    grad_h: Tensor, sources: Sequence[Tensor], score_weight: Tensor, stats: Tensor, read_scale: float
) -> tuple[Tensor, Tensor]:
    num_channels, dtype = score_weight.shape[0], stats.dtype
    logits, rstd = stats
    weights = logits.softmax(0)
    coefficients = stats.new_empty(3, *logits.shape)
    grad_weight = stats.new_zeros(num_channels)
    rows = [x.reshape(-1, num_channels) for x in (grad_h, *sources)]
    for chunk, grad, *values in token_chunks(rows, dtype):
        of_chunk = (weights[:, chunk], rstd[:, chunk], logits[:, chunk])
        factors = gradient_factors(grad, values, *of_chunk, read_scale, torch.empty_like(grad))
        for plane, factor in zip(coefficients, factors, strict=True):
            plane[:, chunk] = factor
        for value, to_weight in zip(values, factors[1].unbind(0), strict=True):
            grad_weight.addmv_(value.t(), to_weight)
    return coefficients, grad_weight


def _pull_torch(
    source: Tensor,
    direct: Tensor | None,
    grads: Sequence[Tensor],
    score_weights: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    positions: Sequence[int],
) -> Tensor:
    num_channels, dtype = source.shape[-1], coefficients[0].dtype
    numbers = torch.stack(
        [of_read[:, i] for of_read, i in zip(coefficients, positions, strict=True)]
    )  # [R, 3, tokens]
    to_value = numbers[:, 2].sum(0)
    weights = torch.stack([weight.to(dtype) for weight in score_weights])  # [R, D]
    out = torch.empty_like(source, memory_format=torch.contiguous_format)
    rows = [x.reshape(-1, num_channels) for x in (source, *grads, *(() if direct is None else (direct,)))]
    for chunk, value, *of_reads in token_chunks(rows, dtype):
        total = torch.mm(numbers[:, 1, chunk].t(), weights)  # [chunk, D]
        total.addcmul_(value, to_value[chunk].unsqueeze(-1))
        if direct is not None:
            total += of_reads.pop()
        for grad, to_grad in zip(of_reads, numbers[:, 0, chunk].unsqueeze(-1).unbind(0), strict=True):
            total.addcmul_(grad, to_grad)
        out.view(-1, num_channels)[chunk] = total
    return out


PULL_TORCH = PullImpl(_read_torch, _coefficients_torch, _pull_torch)
