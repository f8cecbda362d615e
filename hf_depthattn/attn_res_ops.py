"""The read of Attention Residuals (AttnRes): softmax attention over the sources of every token.

Paper: arXiv 2603.15031, sections 3.1 and 3.2, Eq. 2-4. Notation of this file:

    v_i     source i, [..., D]: the embedding, a sublayer's output or a block's sum
    w       score weight: the product of the site's query and its key-norm weight, computed by the caller
    r_i     1 / rms(v_i), the key norm without its weight
    s_i     logit of source i:  s_i = w . (r_i v_i), no 1/sqrt(D)
    p_i     softmax of s over the sources
    h       the read:           h = read_scale * sum_i p_i v_i, with unnormalised values

`attn_res_read_reference` defines the results and supports all options. `attn_res_read` uses an op with an analytic
backward for the case of the paper, and the reference otherwise.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels.attn_res_ops import attn_res_read_limit, attn_res_read_triton
from .op_dispatch import Op, needs_reference, register, resolve

ACTIVATIONS = ("softmax", "sigmoid")
SOURCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# Number of elements of one source that the op processes at a time. On a CPU, a chunk should stay in cache, but each
# thread needs 2^15 elements, torch's grain size. Of 2^15 to 2^18 and whole tensors, 2^17 had the smallest total time
# over D = 512, N = 2, 5, 9, T = 512, 2048, float32 and bfloat16 on one thread.
_CHUNK_ELEMENTS_PER_THREAD = 1 << 15
_MIN_CHUNK_ELEMENTS = 1 << 17
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 24


class AttnResInputs(NamedTuple):
    """The inputs and options of a read.

    Attributes:
        sources: N >= 1 tensors [..., D] of the same shape, dtype (bfloat16, float16, float32 or float64) and device.
        score_weight: the query times the key-norm weight, [D], or [..., D] for a query that depends on the token.
        eps: epsilon of the key norm, added to the mean square of a source.
        normalize_keys: whether keys are the normalised sources; otherwise they are the sources.
        activation: `"softmax"` over the sources, or `"sigmoid"` for weights `2 * sigmoid(logit_i) / N`.
        num_depth_heads: number of heads, slices of the channels with separate softmaxes. The key norm is over all
            channels.
        read_scale: factor on the weighted mean.
    """

    sources: Sequence[Tensor]
    score_weight: Tensor
    eps: float
    normalize_keys: bool = True
    activation: str = "softmax"
    num_depth_heads: int = 1
    read_scale: float = 1.0

    def is_paper_case(self) -> bool:
        """Return whether the options are those of the paper (arXiv 2603.15031, Eq. 2-4), which the ops support."""
        is_plain = self.normalize_keys and self.activation == "softmax" and self.num_depth_heads == 1
        return is_plain and self.score_weight.dim() == 1


def attn_res_read(
    inputs: AttnResInputs, *, impl: str = "auto", return_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute the softmax attention of every token over its sources (arXiv 2603.15031, Eq. 2-4).

        logit_i = sum_c score_weight_c * v_ic / sqrt(mean(v_i^2) + eps)
        h       = read_scale * sum_i softmax_i(logit) v_i

    Sums are accumulated in float32 (float64 for float64 sources), and `h` is rounded once. With one source,
    `h = read_scale * v_0` exactly. With zero logits, `h` is `read_scale` times the mean of the sources, for both
    activations.

    Args:
        inputs: sources, score weight and options.
        impl: `"auto"`, `"torch"` or `"triton"`.
        return_weights: whether to return the weights.

    Returns:
        `h` [..., D] in the dtype of the sources, and the detached weights [..., num_depth_heads, N] in float32
        (float64 for float64 sources), or `None`.

    Raises:
        ValueError: if the inputs do not have the shapes, dtypes or values described in `AttnResInputs`.
    """
    check_read(inputs)
    read = resolve(ATTN_RES_READ, impl, inputs.sources[0].device, (inputs,))
    return read(inputs, return_weights)


def attn_res_read_reference(inputs: AttnResInputs, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """Compute `attn_res_read` by the equations of the paper, with autograd; arguments as there."""
    num_sources = len(inputs.sources)
    compute_dtype = _compute_dtype(inputs.sources[0].dtype)
    # Products and sums instead of `einsum`, which autocast would run in low precision.
    weight = inputs.score_weight.to(compute_dtype)
    values = [source.to(compute_dtype) for source in inputs.sources]
    columns = []
    for value in values:
        key = value
        if inputs.normalize_keys:
            key = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + inputs.eps)  # [..., D]
        columns.append(_split_heads(weight * key, inputs.num_depth_heads).sum(-1))  # [..., H]
    logits = torch.stack(columns, -1)  # [..., H, N]
    weights = logits.softmax(-1) if inputs.activation == "softmax" else logits.sigmoid() * (2 / num_sources)
    mixed = sum(weights[..., i, None] * _split_heads(values[i], inputs.num_depth_heads) for i in range(num_sources))
    h = (inputs.read_scale * mixed.flatten(-2)).to(inputs.sources[0].dtype)
    return h, weights.detach() if return_weights else None


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (num_heads, -1))  # [..., H, D / H]
    return split


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_read(inputs: AttnResInputs) -> None:
    """Raise ValueError for invalid inputs of `attn_res_read`; the kernels do not check shapes."""
    sources, score_weight = inputs.sources, inputs.score_weight
    if len(sources) == 0:
        raise ValueError("`sources` must contain at least one tensor, got an empty sequence")
    first = sources[0]
    if first.dtype not in SOURCE_DTYPES:
        raise ValueError(f"`sources` must have one of the dtypes {SOURCE_DTYPES}, got {first.dtype}")
    if first.dim() == 0 or first.shape[-1] == 0:
        raise ValueError(f"`sources` must have the shape [..., D] with D >= 1, got {tuple(first.shape)}")
    for i, source in enumerate(sources):
        if source.shape != first.shape:
            raise ValueError(
                f"`sources` must have one shape, got {tuple(source.shape)} at {i} and {tuple(first.shape)} at 0"
            )
        if source.dtype != first.dtype:
            raise ValueError(f"`sources` must have one dtype, got {source.dtype} at {i} and {first.dtype} at 0")
    if score_weight.shape != first.shape[-1:] and score_weight.shape != first.shape:
        raise ValueError(
            f"`score_weight` must have the shape {tuple(first.shape[-1:])} or that of the sources, "
            f"{tuple(first.shape)}, got {tuple(score_weight.shape)}"
        )
    if inputs.activation not in ACTIVATIONS:
        raise ValueError(f"`activation` must be one of {ACTIVATIONS}, got {inputs.activation!r}")
    if inputs.num_depth_heads < 1 or first.shape[-1] % inputs.num_depth_heads != 0:
        raise ValueError(
            f"`num_depth_heads` must be a positive divisor of the sources' last dimension, {first.shape[-1]}, "
            f"got {inputs.num_depth_heads}"
        )


def _read_torch(inputs: AttnResInputs, return_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Use the op `depthattn::attn_res_read` if it supports the inputs, and the reference otherwise."""
    if not inputs.is_paper_case() or needs_reference():
        return attn_res_read_reference(inputs, return_weights)
    sources = inputs.sources
    weight = inputs.score_weight.to(_compute_dtype(sources[0].dtype))
    h, logits, _ = torch.ops.depthattn.attn_res_read(list(sources), weight, inputs.eps, inputs.read_scale)
    if not return_weights:
        return h, None
    weights = logits.softmax(0).t()  # [tokens, N]
    return h, weights.reshape(*h.shape[:-1], 1, len(sources))


def _read_triton(inputs: AttnResInputs, return_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the case of the paper with Triton kernels."""
    return attn_res_read_triton(
        inputs.sources,
        inputs.score_weight,
        eps=inputs.eps,
        read_scale=inputs.read_scale,
        return_weights=return_weights,
    )


def _triton_limit(inputs: AttnResInputs) -> str | None:
    if not inputs.is_paper_case():
        return (
            f"normalize_keys={inputs.normalize_keys}, activation={inputs.activation!r}, "
            f"num_depth_heads={inputs.num_depth_heads} and a score weight {tuple(inputs.score_weight.shape)}; kernels "
            "need normalised keys, a softmax, one depth head and one score weight for all tokens"
        )
    if torch.compiler.is_exporting():
        return "an exported program must run without this package"
    if torch._C._are_functorch_transforms_active():
        return "the kernels do not support the transforms of torch.func"
    return attn_res_read_limit(inputs.sources, inputs.score_weight)


ATTN_RES_READ = register(Op("attn_res_read", _read_torch, _read_triton, _triton_limit))


# The op, forward and backward. Both loop over chunks of tokens and, within a chunk, over the sources: sources are
# never stacked, and 16-bit sources are converted to float32 one chunk at a time. Statistics are [N, tokens], so that
# those of one source are contiguous.


def _read_forward(
    sources: list[Tensor], score_weight: Tensor, eps: float, read_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h [..., D], the logits [N, tokens] and 1 / rms of the sources [N, tokens]."""
    num_channels, dtype = score_weight.shape[0], score_weight.dtype
    rows = [source.reshape(-1, num_channels) for source in sources]  # N x [tokens, D]
    num_tokens = rows[0].shape[0]
    logits = score_weight.new_empty(len(rows), num_tokens)
    rstd = torch.empty_like(logits)
    h = rows[0].new_empty(num_tokens, num_channels)
    for chunk, values in _token_chunks(rows, dtype):
        s, r = logits[:, chunk], rstd[:, chunk]  # [N, chunk]
        for value, logit, norm in zip(values, s.unbind(0), r.unbind(0), strict=True):
            torch.mv(value, score_weight, out=logit)
            torch.linalg.vector_norm(value, dim=-1, out=norm)
        r.square_().div_(num_channels).add_(eps).rsqrt_()
        s.mul_(r)
        weights = s.softmax(0).mul_(read_scale).unsqueeze(-1).unbind(0)  # N x [chunk, 1]
        mixed = h[chunk] if h.dtype == dtype else torch.empty_like(values[0])
        torch.mul(values[0], weights[0], out=mixed)
        for value, weight in zip(values[1:], weights[1:], strict=True):
            mixed.addcmul_(value, weight)
        if h.dtype != dtype:
            h[chunk] = mixed
    return h.view(sources[0].shape), logits, rstd


def _read_backward(
    grad_h: Tensor,
    sources: list[Tensor],
    score_weight: Tensor,
    logits: Tensor,
    rstd: Tensor,
    read_scale: float,
    needs_grad: list[bool],
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of the sources that need one, in order, and of the score weight.

    With g = read_scale * dL/dh and ds_i = p_i (g . v_i - sum_j p_j g . v_j):

        dL/dv_i = p_i g + ds_i r_i w - (ds_i s_i r_i^2 / D) v_i
        dL/dw   = sum over tokens and i of ds_i r_i v_i
    """
    num_channels, dtype = score_weight.shape[0], score_weight.dtype
    rows = [source.reshape(-1, num_channels) for source in sources]  # N x [tokens, D]
    grads = [torch.empty_like(row) if needed else None for row, needed in zip(rows, needs_grad, strict=True)]
    grad_weight = torch.zeros_like(score_weight)
    weights = logits.softmax(0)
    for chunk, (grad, *values) in _token_chunks([grad_h.reshape(-1, num_channels), *rows], dtype):
        p, r, s = weights[:, chunk], rstd[:, chunk], logits[:, chunk]  # [N, chunk]
        scratch = torch.empty_like(grad)
        factors = _gradient_factors(grad, values, p, r, s, read_scale, scratch)
        columns = (factor.unsqueeze(-1).unbind(0) for factor in factors)  # N x [chunk, 1] each
        for value, source_grad, a, b, c in zip(values, grads, *columns, strict=True):
            grad_weight.addmv_(value.t(), b.squeeze(-1))
            if source_grad is None:
                continue
            total = source_grad[chunk] if source_grad.dtype == dtype else scratch
            torch.mul(b, score_weight, out=total).addcmul_(grad, a).addcmul_(value, c)
            if source_grad.dtype != dtype:
                source_grad[chunk] = total
    return [grad.view(grad_h.shape) for grad in grads if grad is not None], grad_weight


def _gradient_factors(
    grad_h: Tensor, values: Sequence[Tensor], p: Tensor, r: Tensor, s: Tensor, read_scale: float, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of dL/dh, w and v_i in dL/dv_i (see `_read_backward`) for a chunk of tokens, each [N, chunk].

    Args:
        grad_h: dL/dh, [chunk, D].
        values: N sources, each [chunk, D].
        p: weights of the sources, [N, chunk].
        r: 1 / rms of the sources, [N, chunk].
        s: logits of the sources, [N, chunk].
        read_scale: factor on the weighted mean.
        scratch: buffer like `grad_h`, overwritten.
    """
    dots = torch.empty_like(p)
    for value, dot in zip(values, dots.unbind(0), strict=True):
        torch.sum(torch.mul(value, grad_h, out=scratch), -1, out=dot)
    to_grad = p * read_scale
    to_weight = (dots - (p * dots).sum(0)).mul_(to_grad).mul_(r)
    return to_grad, to_weight, (to_weight * s).mul_(r).div_(-grad_h.shape[1])


def _token_chunks(rows: list[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield a slice of the tokens, and that slice of every tensor [tokens, D], converted to `dtype`."""
    num_elements = _ACCELERATOR_CHUNK_ELEMENTS
    if rows[0].device.type == "cpu":
        num_elements = max(_MIN_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_PER_THREAD * torch.get_num_threads())
    size = max(1, num_elements // rows[0].shape[1])
    for start, *pieces in zip(count(0, size), *(row.split(size) for row in rows), strict=False):
        yield slice(start, start + size), [piece.to(dtype) for piece in pieces]


def _read_forward_fake(
    sources: list[Tensor], score_weight: Tensor, eps: float, read_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits = score_weight.new_empty(len(sources), math.prod(sources[0].shape[:-1]))
    return sources[0].new_empty(sources[0].shape), logits, torch.empty_like(logits)


def _read_backward_fake(
    grad_h: Tensor,
    sources: list[Tensor],
    score_weight: Tensor,
    logits: Tensor,
    rstd: Tensor,
    read_scale: float,
    needs_grad: list[bool],
) -> tuple[list[Tensor], Tensor]:
    grads = [source.new_empty(source.shape) for source, needed in zip(sources, needs_grad, strict=True) if needed]
    return grads, torch.empty_like(score_weight)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    sources, score_weight, _, read_scale = inputs
    _, logits, rstd = output
    ctx.mark_non_differentiable(logits, rstd)
    ctx.save_for_backward(score_weight, logits, rstd, *sources)
    ctx.read_scale = read_scale


def _differentiate(ctx: Any, grad_h: Tensor, *_: object) -> tuple[Any, ...]:
    score_weight, logits, rstd, *sources = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad[0]
    grads, grad_weight = torch.ops.depthattn.attn_res_read_backward(
        grad_h, sources, score_weight, logits, rstd, ctx.read_scale, needs_grad
    )
    remaining = iter(grads)
    return [next(remaining) if needed else None for needed in needs_grad], grad_weight, None, None


def _register_ops() -> None:
    backward = torch.library.custom_op(
        "depthattn::attn_res_read_backward",
        _read_backward,
        mutates_args=(),
        schema="(Tensor grad_h, Tensor[] sources, Tensor score_weight, Tensor logits, Tensor rstd, float read_scale, "
        "bool[] needs_grad) -> (Tensor[], Tensor)",
    )
    backward.register_fake(_read_backward_fake)
    forward = torch.library.custom_op(
        "depthattn::attn_res_read",
        _read_forward,
        mutates_args=(),
        schema="(Tensor[] sources, Tensor score_weight, float eps, float read_scale) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_read_forward_fake)
    forward.register_autograd(_differentiate, setup_context=_save_for_backward)


# A model loaded as remote code imports a second copy of this file, which must use the existing op: registering it
# again would replace the op of the first copy. A change of schema therefore needs a new op name.
if not hasattr(torch.ops.depthattn, "attn_res_read"):
    _register_ops()
