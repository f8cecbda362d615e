r"""Backward of Attention Residuals by "pull": compute the gradient of a source in one pass over all reads of it.

With autograd, every read sends a gradient to every source, and autograd adds them one after another. With N sources
this is most of the memory traffic of AttnRes in training, 5 N + 1 matrices per read. With pull, the backward of a read
only keeps dL/dh and three numbers per token and source, computed together with the gradient of its score weight,

    a_l = read_scale p_l,   b_l = ds_l r,   c_l = -ds_l s_l r^2 / D            (notation of `attn_res_ops`)

and the *tap* of a source, an identity node in the autograd graph whose backward runs after those of all reads of the
source, computes

    dL/dv = direct + sum_l (a_l dL/dh_l + b_l w_l) + (sum_l c_l) v

where `direct` is the gradient from other uses of the source. This takes 2 N + 4 matrices per read. A read finds the
tap as the `grad_fn` of the source. If a source has no tap (a copy on another device, a detached tensor), the read is
an ordinary op; also under `torch.compile`, `torch.export` and `torch.func`, which do not support nodes with state.
The op itself does not support `torch.func.grad` either; reads with options other than the paper's, which use autograd,
do.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attn_res_ops import AttnResInputs, attn_res_read, check_read, gradient_factors, token_chunks
from .first_derivative import first_derivative
from .kernels.attn_res_ops import attn_res_read_limit
from .kernels.attn_res_pull_ops import PULL_TRITON, PullImpl
from .op_dispatch import Op, register, resolve


class _Reader(NamedTuple):
    """What the backward of a read passes to the tap of one of its sources."""

    impl: PullImpl
    grad: Tensor
    score_weight: Tensor
    coefficients: Tensor
    position: int


def tap(source: Tensor) -> Tensor:
    """Return the source with a tap as its `grad_fn`; unchanged if it needs no gradient or is traced."""
    if not (torch.is_grad_enabled() and source.requires_grad) or _is_traced():
        return source
    tapped: Tensor = _Tap.apply(source)
    return tapped


def is_tapped(sources: Sequence[Tensor]) -> bool:
    """Return whether at least one source needs a gradient, and all that do have a tap."""
    needing = [source for source in sources if source.requires_grad]
    return bool(needing) and not _is_traced() and all(_readers_of(source) is not None for source in needing)


def attn_res_read_tapped(
    inputs: AttnResInputs, *, impl: str = "auto", return_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute `attn_res_read`, with the backward of this file if all sources have a tap.

    Reads with options other than those of the paper, and reads that return their weights, are ordinary ops.
    Arguments and results are those of `attn_res_read`.
    """
    sources, score_weight = inputs.sources, inputs.score_weight
    if return_weights or not inputs.is_paper_case() or not is_tapped(sources):
        return attn_res_read(inputs, impl=impl, return_weights=return_weights)
    check_read(inputs)
    pull_impl = resolve(ATTN_RES_PULL, impl, sources[0].device, (sources, score_weight))
    readers = [_readers_of(source) if source.requires_grad else None for source in sources]
    return _PulledRead.apply(pull_impl, readers, inputs.eps, inputs.read_scale, score_weight, *sources)[0], None


def _is_traced() -> bool:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    # Looked up and not imported, since that would import the whole compiler; without it, nothing is compiled.
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    return compiled_autograd is not None and bool(compiled_autograd.compiled_autograd_enabled)


def _readers_of(source: Tensor) -> dict[int, list[_Reader]] | None:
    """Return the readers at the source's tap by backward pass, as several can run on one graph (hooks, threads)."""
    # Hooks and retained gradients must include the gradients of the reads.
    if source.retains_grad or source._backward_hooks:
        return None
    return getattr(source.grad_fn, "depth_readers", None)


def _leave(readers: dict[int, list[_Reader]], reader: _Reader) -> None:
    backward_pass = torch._C._current_graph_task_id()
    if backward_pass not in readers:
        readers[backward_pass] = []
        # A backward pass may end before it reaches the tap. Compiled autograd has no such callbacks, but always runs
        # the whole graph.
        if not torch.compiler.is_compiling():
            torch.autograd.Variable._execution_engine.queue_callback(partial(_forget, readers, backward_pass))
    readers[backward_pass].append(reader)


def _forget(readers: dict[int, list[_Reader]], backward_pass: int) -> None:
    readers.pop(backward_pass, None)


class _Tap(torch.autograd.Function):
    """Identity whose backward computes the gradient of a source from all reads of its output."""

    @staticmethod
    def forward(ctx: Any, source: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(source)
        ctx.depth_readers = {}
        return source.view_as(source)

    @staticmethod
    def backward(ctx: Any, direct: Tensor | None) -> Tensor | None:
        readers = ctx.depth_readers.pop(torch._C._current_graph_task_id(), None)
        if readers is None:
            return direct
        (source,) = ctx.saved_tensors
        _, grads, weights, coefficients, positions = zip(*readers, strict=True)
        with torch.no_grad():
            gradient = readers[0].impl.pull(source, direct, grads, weights, coefficients, positions)
        return first_derivative(gradient, source)


class _PulledRead(torch.autograd.Function):
    """A read whose backward returns no gradients for its sources, but passes what is needed for them to their taps."""

    @staticmethod
    def forward(
        ctx: Any,
        impl: PullImpl,
        readers: list[dict[int, list[_Reader]] | None],
        eps: float,
        read_scale: float,
        score_weight: Tensor,
        *sources: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h, stats = impl.read(sources, score_weight, eps, read_scale)
        ctx.set_materialize_grads(False)
        ctx.impl, ctx.readers, ctx.read_scale = impl, readers, read_scale
        ctx.save_for_backward(score_weight, stats, *sources)
        ctx.mark_non_differentiable(stats)
        return h, stats

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
        num_inputs = 5 + len(ctx.readers)
        if grad_h is None:
            return (None,) * num_inputs
        score_weight, stats, *sources = ctx.saved_tensors
        with torch.no_grad():
            coefficients, grad_weight = ctx.impl.coefficients(grad_h, sources, score_weight, stats, ctx.read_scale)
            grad_weight = grad_weight.to(score_weight.dtype)
            # Taps run later, when an optimizer that steps within backward or sharding may have changed the parameter.
            weight_now = score_weight.clone()
        grad_h = grad_h.detach()
        for position, readers in enumerate(ctx.readers):
            if readers is not None:
                _leave(readers, _Reader(ctx.impl, grad_h, weight_now, coefficients, position))
        grad_weight = first_derivative(grad_weight, score_weight, *sources)
        return None, None, None, None, grad_weight, *(None for _ in sources)


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
    for chunk, (grad, *values) in token_chunks(rows, dtype):
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
    for chunk, (value, *of_reads) in token_chunks(rows, dtype):
        # With `out` of the right dtype, since autocast during backward would round the product.
        total = torch.mm(numbers[:, 1, chunk].t(), weights, out=torch.empty_like(value))  # [chunk, D]
        total.addcmul_(value, to_value[chunk].unsqueeze(-1))
        if direct is not None:
            total += of_reads.pop()
        for grad, to_grad in zip(of_reads, numbers[:, 0, chunk].unsqueeze(-1).unbind(0), strict=True):
            total.addcmul_(grad, to_grad)
        out.view(-1, num_channels)[chunk] = total
    return out


PULL_TORCH = PullImpl(_read_torch, _coefficients_torch, _pull_torch)
ATTN_RES_PULL = register(Op("attn_res_pull", PULL_TORCH, PULL_TRITON, attn_res_read_limit))
