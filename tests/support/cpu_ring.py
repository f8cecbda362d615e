"""torch's `context_parallel` on a CPU, for tests: its ring with the CPU's attention kernel, which torch leaves out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._attention import set_rotate_method

aten = torch.ops.aten
# The file has another place in torch 2.13 than in 2.9, and its table another name.
RING = sys.modules[set_rotate_method.__module__]
TABLE = "custom_ops" if hasattr(RING, "custom_ops") else "customized_ops"


def _sharded(results: tuple[Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
    return tuple(DTensor.from_local(result, mesh, [Shard(2)], run_check=False) for result in results)


def _forward(op, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
    mesh = args[0].device_mesh
    query, key, value = (x.to_local() for x in args[:3])
    step = partial(aten._scaled_dot_product_flash_attention_for_cpu, scale=kwargs.get("scale"))
    causal = args[4] if len(args) > 4 else kwargs.get("is_causal", False)
    results = RING._templated_ring_attention(mesh.get_group(), 2, step, query, key, value, is_causal=causal)
    return _sharded(results, mesh)


def _backward(op, args: tuple, kwargs: dict) -> tuple[DTensor, ...]:
    mesh = args[1].device_mesh
    grad_out, query, key, value, out, lse = (x.to_local() for x in args[:6])
    dropout, causal = args[6:8]

    def step(*, grad_out, query, key, value, out, logsumexp, is_causal):
        states = grad_out, query, key, value, out, logsumexp
        kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return kernel(*states, dropout, is_causal, scale=kwargs.get("scale"))

    ring = RING._templated_ring_attention_backward
    results = ring(mesh.get_group(), 2, step, grad_out, "grad_out", query, key, value, out, lse, causal)
    return _sharded(results, mesh)


@contextmanager
def cpu_ring() -> Iterator[None]:
    """Let `context_parallel` support the CPU's kernel, and merge in float64 what is float64 (torch has float32)."""
    handlers = {
        aten._scaled_dot_product_flash_attention_for_cpu.default: _forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _backward,
    }
    with (
        patch.dict(getattr(RING, TABLE), handlers),
        patch.object(RING._cp_options, "convert_to_f32", False),
    ):
        yield
