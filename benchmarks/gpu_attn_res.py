"""AttnRes in the GPU suite: a single read, and all reads and sums of a stack of sublayers, Block and Full.

A stack of L sublayers is

    for site in 0 .. L-1:   y = sublayer(norm(read(sources)) * norm_weight),  y goes into the block's sum
    out = read(sources)

For timing, sublayers are the identity, so only the mechanism and the norm after each read are timed. For parity, a
sublayer multiplies its channels by fixed numbers, so that sources differ. `block_size` 1 is Full AttnRes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from gpu_attn_res_problems import ReadProblem, StackProblem
from gpu_cases import FORWARD, FORWARD_BACKWARD, Case, Row
from gpu_peers import STACK_PEERS, fast_attnres_read, fla_gluon_read, fla_read, flash_attn_res_read, liger_read
from torch import Tensor, nn

from hf_depthattn.attn_res_ops import AttnResInputs, attn_res_read, attn_res_read_reference
from hf_depthattn.attn_res_reads import ReadWeights
from hf_depthattn.attn_res_schedule import last_site_of_group
from hf_depthattn.depth_state import Carried

if TYPE_CHECKING:
    from hf_depthattn import DepthAttnConfig
    from hf_depthattn.connection_base import DepthSite

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Apply the norm after a read, with torch."""
    return nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)


def normed(read: Callable[[Sequence[Tensor], Tensor], Tensor]) -> Callable:
    """Add the norm to a function (sources, query) that reads without it."""

    def run(sources: Sequence[Tensor], query: Tensor, norm_weight: Tensor | None) -> Tensor:
        h = read(sources, query)
        return h if norm_weight is None else rms_norm(h, norm_weight)

    return run


def read_row(read: Callable) -> Callable[[ReadProblem], list[Tensor]]:
    """Return a row that solves one read with a function (sources, query, norm weight or None) -> output."""
    return lambda problem: [read(problem.sources, problem.query, problem.norm_weight)]


def stack_row(read: Callable) -> Callable[[StackProblem], list[Tensor]]:
    """Return a row that solves a stack with such a function, one read at a time, with sums by torch."""

    def solve(problem: StackProblem) -> list[Tensor]:
        finished: list[Tensor] = []
        partial = problem.embeddings
        for site, sublayer in enumerate(problem.sublayers):
            y = sublayer(read([*finished, partial], problem.queries[site], problem.norm_weights[site]))
            if site % problem.block_size == 0:
                finished, partial = [*finished, partial], y
            else:
                partial = partial + y
        return [read([*finished, partial], problem.queries[-1], None)]

    return solve


def _reference(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    return attn_res_read_reference(AttnResInputs(sources, query, EPS))[0]


def _package(sources: Sequence[Tensor], query: Tensor) -> Tensor:
    return attn_res_read(AttnResInputs(sources, query, EPS))[0]


def compiled_reference(kind: Callable) -> Callable:
    """Return a row with the reference read under `torch.compile`, with one graph per number of sources."""
    compiled: dict[str, Callable] = {}

    def solve(problem) -> list[Tensor]:
        device = problem.cotangents[0].device.type
        if device not in compiled:
            for name in ("recompile_limit", "cache_size_limit"):
                if hasattr(torch._dynamo.config, name):
                    setattr(torch._dynamo.config, name, 512)
            # A dry run skips the slow compiler.
            backend = "inductor" if device == "cuda" else "aot_eager"
            compiled[device] = torch.compile(normed(_reference), dynamic=False, backend=backend)
        return kind(compiled[device])(problem)

    return solve


def package_stack(schedule: str) -> Callable[[StackProblem], list[Tensor]]:
    """Return a row with the sites of the package as its decoder layers use them.

    Args:
        schedule: `attn_res_schedule` of the config.
    """

    def solve(problem: StackProblem) -> list[Tensor]:
        if problem.sites is None:
            problem.sites = _package_sites(len(problem.sublayers), problem.block_size, problem.embeddings)
        sites = problem.sites
        weights = Carried(ReadWeights(torch.stack(problem.queries), None, schedule))
        state = sites[0].begin(problem.embeddings)
        for site, sublayer, norm_weight in zip(sites, problem.sublayers, problem.norm_weights, strict=False):
            h, state, _ = site(state, weights)
            state = site.write(state, sublayer(rms_norm(h, norm_weight)))
        return [sites[-1](state, weights)[0]]

    return solve


def _package_sites(num_sublayers: int, block_size: int, like: Tensor) -> list[DepthSite]:
    from hf_depthattn.depth_connections import depth_site

    config = _package_config(num_sublayers, block_size, like.shape[-1])
    return [depth_site(config, site) for site in range(num_sublayers + 1)]


def _package_config(num_sublayers: int, block_size: int, num_channels: int) -> DepthAttnConfig:
    from transformers import LlamaConfig

    from hf_depthattn import DepthAttnConfig

    host = LlamaConfig(
        hidden_size=num_channels, num_hidden_layers=num_sublayers // 2, num_attention_heads=1, vocab_size=8
    )
    return DepthAttnConfig(text_config=host, sublayers_per_block=block_size, depth_norm_eps=EPS)


READ_ROWS = (
    Row("ours, read and torch's norm", "ours", read_row(normed(_package))),
    Row("FLA fused_attnres", "peer", read_row(fla_read)),
    Row("FLA fused_attnres, Gluon", "peer", read_row(fla_gluon_read)),
    Row("fast-attnres", "peer", read_row(normed(fast_attnres_read))),
    Row("flash-attn-res, phase 1", "peer", read_row(normed(flash_attn_res_read))),
    Row("Liger liger_attn_res", "peer", read_row(normed(liger_read))),
    Row("torch.compile of the reference", "peer", compiled_reference(read_row), slow_to_compile=True),
)
STACK_ROWS = (
    Row("ours, as in the models", "ours", package_stack("grouped")),
    Row("ours, single reads", "ours", package_stack("single")),
    Row("FLA fused_attnres", "peer", stack_row(fla_read)),
    Row("FLA fused_attnres, Gluon", "peer", stack_row(fla_gluon_read)),
    Row("fast-attnres", "peer", stack_row(normed(fast_attnres_read))),
    *STACK_PEERS,
    Row("Liger liger_attn_res", "peer", stack_row(normed(liger_read))),
    Row("torch.compile of the reference", "peer", compiled_reference(stack_row), slow_to_compile=True),
)
#: Name -> number of sublayers, block size, channels, tokens.
STACKS = {
    "Block L=64 S=8 d=4096 16K": (64, 8, 4096, 16384),
    "Full L=48 d=2048 16K": (48, 1, 2048, 16384),
    "Full L=48 d=1024 2K": (48, 1, 1024, 2048),
}
#: Name -> number of sources, channels, tokens. The first two are training and prefill, the others decode steps.
READS = {
    "read L=9 d=7168 8192 tokens": (9, 7168, 8192),
    "read L=9 d=4096 16K": (9, 4096, 16384),
    "decode read L=9 d=4096 1 token": (9, 4096, 1),
    "decode read L=9 d=4096 64 tokens": (9, 4096, 64),
}
PARITY_TOKENS = 67


def cases(tiny: bool) -> list[Case]:
    """Return the cases of this part; with `tiny`, small ones for a dry run."""
    found = []
    for name, (num_sources, num_channels, num_tokens) in READS.items():
        decodes = name.startswith("decode")
        if tiny:
            num_sources, num_channels, num_tokens = 3, 16, 1 if decodes else 5
        setting = {"num_sources": num_sources, "num_channels": num_channels, "num_tokens": num_tokens}
        unit = 2 * num_channels * num_tokens
        floors = {
            FORWARD: ((num_sources + 1) * unit, "(N + 1) E"),
            FORWARD_BACKWARD: ((3 * num_sources + 2) * unit, "(N + 1) E + (2 N + 1) E"),
        }
        passes = (FORWARD,) if decodes else (FORWARD, FORWARD_BACKWARD)
        parity = {"num_tokens": min(num_tokens, PARITY_TOKENS)}
        make_read, read_reference = ReadProblem.make, read_row(normed(_reference))
        rows = tuple(row for row in READ_ROWS if not (decodes and row.slow_to_compile))
        found.append(
            Case(
                name,
                "attn_res",
                setting,
                parity,
                make_read,
                read_reference,
                rows,
                passes,
                floors,
                in_graph=decodes,
            )
        )
    for name, (num_sublayers, block_size, num_channels, num_tokens) in STACKS.items():
        if tiny:
            num_sublayers, block_size, num_channels, num_tokens = 4, min(block_size, 3), 16, 5
        setting = {
            "num_sublayers": num_sublayers,
            "block_size": block_size,
            "num_channels": num_channels,
            "num_tokens": num_tokens,
        }
        parity = {"num_tokens": min(num_tokens, PARITY_TOKENS), "identity_sublayers": False}
        floors = stack_floors(num_sublayers, block_size, 2 * num_channels * num_tokens)
        make, reference = StackProblem.make, stack_row(normed(_reference))
        passes = (FORWARD, FORWARD_BACKWARD)
        found.append(
            Case(
                name,
                "attn_res",
                setting,
                parity,
                make,
                reference,
                STACK_ROWS,
                passes,
                floors,
                rounding="stack",
                in_graph=num_tokens < 4096,
            )
        )
    return found


def stack_floors(num_sublayers: int, block_size: int, unit: int) -> dict[str, tuple[int, str]]:
    """Return the least bytes of the two phases for L sublayers, E = `unit`, in the package's groups of G sublayers."""
    if block_size == 1:
        size = last_site_of_group(_package_config(num_sublayers, block_size, num_channels=2), 0) + 1
        # Phase 1 attends to L / 2 sources on average, phase 2 to (G - 1) / 2.
        forward = num_sublayers * (num_sublayers / (2 * size) + 1 + (size - 1) / 2 + 2)
        backward = num_sublayers * (3 * num_sublayers / (2 * size) + 1 + 3 * (size - 1) / 2 + 3)
        text = "L (L/2G + 1 + (G - 1)/2 + 2) E", "L (3L/2G + 1 + 3(G - 1)/2 + 3) E"
    else:
        blocks = [min(block_size, num_sublayers - start) for start in range(0, num_sublayers, block_size)]
        forward = sum(b + 1 + size for b, size in enumerate(blocks)) + 5 * num_sublayers
        backward = sum(3 * (b + 1) + size for b, size in enumerate(blocks)) + 6 * num_sublayers
        text = "(sum over blocks of b + 1 + S, + 5 L) E", "(sum over blocks of 3 (b + 1) + S, + 6 L) E"
    return {
        FORWARD: (int(forward * unit), text[0]),
        FORWARD_BACKWARD: (int((forward + backward) * unit), f"{text[0]} + {text[1]}"),
    }
