"""Run with TRITON_INTERPRET=1: MoDA's Triton kernels against the torch form in float64, outputs poisoned with NaN."""

import itertools
import sys

import torch
from tolerances import RELATIVE_RMSE, relative_rmse

from hf_depthattn.kernels import moda_depth
from hf_depthattn.moda_ops import depth_backward, depth_forward

#: (batch, tokens, query heads, key-value heads, key dimension, value dimension, slots, softcap)
CASES = [
    (1, 1, 1, 1, 16, 16, 1, 0.0),
    (2, 5, 4, 2, 16, 16, 2, 0.0),
    (1, 3, 6, 2, 40, 24, 3, 0.0),
    (1, 3, 7, 1, 64, 64, 17, 0.0),
    (1, 2, 8, 1, 80, 80, 16, 1.5),
    (1, 2, 16, 2, 128, 128, 5, 0.0),
    (1, 2, 2, 2, 256, 256, 33, 0.0),
    (1, 2, 3, 1, 24, 40, 4, 2.0),
    (1, 1, 32, 2, 7, 5, 1, 0.0),
]
DTYPES = (torch.float64, torch.float32, torch.float16)


def poisoned(factory):
    def make(*args, **kwargs):
        tensor = factory(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return make


def states(shape, dtype, contiguous):
    """[B, H, T, d], strided as attention modules lay them out, or contiguous."""
    batch, heads, tokens, dim = shape
    x = torch.randn(batch, tokens, heads, dim, dtype=torch.float64).to(dtype).transpose(1, 2)
    return x.contiguous() if contiguous else x


def double(value):
    return [x.double() for x in value] if isinstance(value, list) else value.double()


def check(name, actual, expected, bound):
    error = relative_rmse(actual, expected)
    if not error <= bound:
        sys.exit(f"{name}: relative RMSE {error:.2e} > {bound:.0e}")


def main() -> None:
    torch.manual_seed(0)
    torch.empty_like = poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
    for dtype, case in itertools.product(DTYPES, CASES):
        batch, tokens, heads, kv_heads, key_dim, value_dim, num_slots, softcap = case
        query = states((batch, heads, tokens, key_dim), dtype, False)
        seq_out = states((batch, heads, tokens, value_dim), dtype, True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        seq_lse = torch.randn(batch, heads, tokens, dtype=wide)
        if tokens > 1:
            seq_lse[0, 0, 0] = -torch.inf  # a token that sees no key
        # Slots differ in their strides, as those of attention and MLP sublayers may.
        keys = [states((batch, kv_heads, tokens, key_dim), dtype, i % 2 == 1) for i in range(num_slots)]
        values = [states((batch, kv_heads, tokens, value_dim), dtype, i % 3 == 1) for i in range(num_slots)]
        options = (key_dim**-0.5, softcap)
        inputs = (query, keys, values)
        out, lse = moda_depth.depth_forward_triton(*inputs, seq_out, seq_lse, *options)
        exact = depth_forward(*map(double, inputs), double(seq_out), double(seq_lse), *options)
        bound = RELATIVE_RMSE[dtype]
        check(f"{dtype} {case} out", out, exact[0], bound)
        check(f"{dtype} {case} lse", lse, exact[1], RELATIVE_RMSE[wide])
        grad = torch.randn_like(out)
        gradients = moda_depth.depth_backward_triton(grad, *inputs, out, lse, *options)
        exact = depth_backward(double(grad), *map(double, inputs), double(out), double(lse), *options)
        check(f"{dtype} {case} dq", gradients[0], exact[0], bound)
        for name, actual, expected, slots in zip(("dk", "dv"), gradients[1:], exact[1:], (keys, values), strict=True):
            # Together: a slot of little weight has gradients near zero.
            check(f"{dtype} {case} {name}", torch.stack(actual), torch.stack(expected), bound)
            assert all(x.shape == y.shape and x.dtype == dtype for x, y in zip(actual, slots, strict=True))
    print("ok")


if __name__ == "__main__":
    main()
