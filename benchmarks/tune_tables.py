"""Tables of kernel configurations for `tune_kernels.py`: shape buckets, candidates and launches."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

EPS = 1e-6
#: Largest numbers of reads and channels of each row of the table, by kernel of phase 1.
PHASE1_ROWS = {
    "forward": ((8, 2048), (16, 8192)),
    "sources": ((8, 2048), (16, 8192)),
    "weights": ((16, 8192),),
}


class Table(NamedTuple):
    """One table of configurations.

    Attributes:
        name: unique name.
        module: module of `hf_depthattn.kernels` with the launches.
        kernel: part of the name of the kernel whose resources are limited.
        buckets: settings of `step`, each the largest shape of its row in the table.
        entry: function from bucket and architecture to the dict and key where the launch looks up its configuration.
        candidates: function from a bucket to values of that entry.
        step: function from bucket, tokens and device to the op's launch.
        row: function from bucket and value to the line of the table.
    """

    name: str
    module: str
    kernel: str
    buckets: tuple[dict, ...]
    entry: Callable[[dict, str], tuple[dict, Any]]
    candidates: Callable[[dict], list]
    step: Callable[[dict, int, torch.device], Callable[[], object]]
    row: Callable[[dict, Any], str]


def kernel_module(name: str) -> Any:
    """Import a module of the kernels."""
    return importlib.import_module(f"hf_depthattn.kernels.{name}")


def read_table(direction: str) -> Table:
    """Return a table of the AttnRes read: warps, and for the backward also programs per multiprocessor.

    Args:
        direction: `"forward"`, `"joined"` (with a prior and an update) or `"backward"`.
    """

    def entry(bucket: dict, architecture: str) -> tuple[dict, Any]:
        return kernel_module("attn_res_configs").WARPS, (direction, architecture)

    def candidates(bucket: dict) -> list:
        warp_row = kernel_module("attn_res_configs").WarpRow
        counts = (1, 2, 3, 4, 6, 12) if direction == "backward" else (1,)
        shape = (bucket["num_channels"], bucket["num_sources"])
        # A multiprocessor has 2048 threads; with fewer than 8 channels per thread there is nothing to overlap.
        return [
            (warp_row(*shape, num_warps, count),)
            for num_warps in (1, 2, 4, 8, 16)
            for count in counts
            if num_warps * count * 32 <= 2048 and num_warps * 256 <= bucket["num_channels"]
        ]

    def step(bucket: dict, num_tokens: int, device: torch.device) -> Callable[[], object]:
        num_channels, num_sources = bucket["num_channels"], bucket["num_sources"]
        sources = [_random(num_tokens, num_channels, device=device) for _ in range(num_sources)]
        weight = torch.randn(num_channels, device=device) * num_channels**-0.5
        ops = torch.ops.depthattn
        if direction == "forward":
            return lambda: ops.attn_res_plain_read_triton(sources, weight, EPS, 1.0)
        if direction == "joined":
            inputs = kernel_module("attn_res_inputs")
            update, out = (_random(num_tokens, num_channels, device=device) for _ in range(2))
            given = inputs.ReadInputs(sources, weight, EPS, 1.0)
            prior = inputs.Prior(out, torch.randn(num_tokens, device=device))
            return lambda: kernel_module("attn_res_ops").read_forward(given, prior, update)
        stats = torch.randn(num_tokens, 2 + 2 * num_sources, device=device).abs()
        needs_grad = [True] * num_sources
        grad = _random(num_tokens, num_channels, device=device)
        return lambda: ops.attn_res_plain_read_triton_backward(grad, sources, weight, stats, 1.0, needs_grad)

    return Table(
        f"read {direction}",
        "attn_res_ops",
        "attn_res_read",
        tuple(
            {"num_channels": num_channels, "num_sources": num_sources}
            for num_channels in (512, 1024, 2048, 4096, 5120, 8192)
            for num_sources in (2, 4, 8, 16)
        ),
        entry,
        candidates,
        step,
        lambda bucket, value: f"{value[0]},",
    )


def depth_table(direction: str) -> Table:
    """Return the table of MoDA's depth kernels: slots per block and warps."""

    def entry(bucket: dict, architecture: str) -> tuple[dict, Any]:
        configs = kernel_module("moda_depth_configs")
        return getattr(configs, f"{direction.upper()}_CONFIGS")[bucket["element_bytes"]], bucket["head_dim"]

    def candidates(bucket: dict) -> list:
        config = kernel_module("moda_depth_configs").DepthConfig
        precisions = ("ieee",) if bucket["element_bytes"] == 2 else ("ieee", "tf32x3")
        return [
            config(num_slots, num_warps, precision)
            for num_slots in (16, 32, 64)
            for num_warps in (1, 2, 4, 8)
            for precision in precisions
        ]

    def step(bucket: dict, num_tokens: int, device: torch.device) -> Callable[[], object]:
        dtype = torch.bfloat16 if bucket["element_bytes"] == 2 else torch.float32
        head_dim, num_heads, num_kv_heads, num_slots = bucket["head_dim"], 64, 8, 64

        def states(heads: int) -> torch.Tensor:
            return _random(1, num_tokens, heads, head_dim, device=device, dtype=dtype).transpose(1, 2)

        ops = kernel_module("moda_depth_ops")
        query, seq_out = states(num_heads), states(num_heads)
        keys, values = ([states(num_kv_heads) for _ in range(num_slots)] for _ in range(2))
        lse = torch.full((1, num_heads, num_tokens), 5.0, device=device)
        options = (head_dim**-0.5, 0.0)
        if direction == "forward":
            return lambda: ops.depth_forward_triton(query, keys, values, seq_out, lse, *options)
        grad, out = (states(num_heads).transpose(1, 2).contiguous() for _ in range(2))
        return lambda: ops.depth_backward_triton(grad, query, keys, values, out, lse, *options)

    return Table(
        f"depth {direction}",
        "moda_depth_ops",
        f"moda_depth_{direction}",
        tuple(
            {"element_bytes": size, "head_dim": dim} for size in (2, 4) for dim in (16, 32, 64, 128, 256)[: 7 - size]
        ),
        entry,
        candidates,
        step,
        lambda bucket, value: f"{bucket['head_dim']}: {value},  # of {bucket['element_bytes']} bytes",
    )


def phase1_table(kernel: str) -> Table:
    """Return the table of tiles of one kernel of phase 1; the step runs the whole phase."""

    def entry(bucket: dict, architecture: str) -> tuple[dict, Any]:
        return kernel_module("attn_res_group_configs").PHASE1_CONFIGS[kernel], (
            bucket["num_reads"],
            bucket["num_channels"],
        )

    def candidates(bucket: dict) -> list:
        table, key = entry(bucket, "")
        sizes = [(d, w) for d in (64, 128, 256) for w in (2, 4, 8)]
        tiles = [table[key]._replace(block_d=d, num_warps=w) for d, w in sizes]
        if kernel == "weights":
            return [tile._replace(block_t=t) for tile in tiles for t in (32, 64, 128)]
        return [tile._replace(group=g) for tile in tiles for g in (8, 16) if g * tile.block_t >= 16]

    def step(bucket: dict, num_tokens: int, device: torch.device) -> Callable[[], object]:
        needs_grad = kernel != "forward"
        num_channels = bucket["num_channels"]
        sources = [_random(num_tokens, num_channels, device=device).requires_grad_(needs_grad) for _ in range(5)]
        weights = torch.randn(bucket["num_reads"], num_channels, device=device) * num_channels**-0.5
        weights.requires_grad_(needs_grad)

        def run() -> object:
            outs, lse, *_ = torch.ops.depthattn.attn_res_group_phase1_triton(sources, weights, EPS)
            return torch.autograd.grad([*outs, lse], [*sources, weights], [*outs, lse]) if needs_grad else outs

        return run

    return Table(
        f"phase 1 {kernel}",
        "attn_res_phase1_ops",
        "phase1_kernel" if kernel == "forward" else f"phase1_{kernel}",
        tuple({"num_reads": reads, "num_channels": channels} for reads, channels in PHASE1_ROWS[kernel]),
        entry,
        candidates,
        step,
        lambda bucket, value: f'"{kernel}": ({bucket["num_reads"]}, {bucket["num_channels"]}): {value},',
    )


TABLES = (
    read_table("forward"),
    read_table("joined"),
    read_table("backward"),
    depth_table("forward"),
    depth_table("backward"),
    *(phase1_table(kernel) for kernel in PHASE1_ROWS),
)


def _random(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)
