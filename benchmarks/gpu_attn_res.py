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
from gpu_cases import FORWARD, FORWARD_BACKWARD, Absent, Case, Row, optional
from gpu_peers import STACK_PEERS, fla_read, flash_attn_res_read, liger_read
from torch import Tensor, nn

from hf_depthattn.attn_res_ops import AttnResInputs, attn_res_read, attn_res_read_reference
from hf_depthattn.kernels.row_tiles import INTERPRETED

if TYPE_CHECKING:
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


def package_stack(problem: StackProblem) -> list[Tensor]:
    """Solve a stack with the sites of the package as its decoder layers use them."""
    if problem.sites is None:
        problem.sites = _package_sites(len(problem.sublayers), problem.block_size, problem.embeddings)
        for site, query in zip(problem.sites, problem.queries, strict=True):
            # Set the leaf itself, since a new Parameter would receive the gradient instead.
            site._parameters["query"] = query  # type: ignore[assignment]
    sites = problem.sites
    state = sites[0].begin(problem.embeddings)
    for site, sublayer, norm_weight in zip(sites, problem.sublayers, problem.norm_weights, strict=False):
        state = site.write(state, sublayer(rms_norm(site(state)[0], norm_weight)))
    return [sites[-1](state)[0]]


def _package_sites(num_sublayers: int, block_size: int, like: Tensor) -> list[DepthSite]:
    from transformers import LlamaConfig

    from hf_depthattn import DepthAttnConfig
    from hf_depthattn.depth_connections import depth_site

    host = LlamaConfig(
        hidden_size=like.shape[-1], num_hidden_layers=num_sublayers // 2, num_attention_heads=1, vocab_size=8
    )
    config = DepthAttnConfig(text_config=host, sublayers_per_block=block_size, depth_norm_eps=EPS)
    sites = [depth_site(config, site).to(like.device).requires_grad_(False) for site in range(num_sublayers + 1)]
    return [site.double() if like.dtype == torch.float64 else site for site in sites]


def _impl(like: Tensor) -> str:
    """Return the implementation: Triton on a GPU or in Triton's interpreter, torch in a dry run."""
    return "triton" if like.device.type == "cuda" or INTERPRETED else "auto"


def two_phase_stack(problem: StackProblem) -> list[Tensor]:
    """Solve a stack in two phases: all reads of a block from finished blocks, then sum and merge per site."""
    if problem.block_size == 1:
        raise Absent("two phases are for Block AttnRes")
    phase1, phase2 = (optional(f"hf_depthattn.attn_res_phase{i}_ops", f"attn_res_phase{i}") for i in (1, 2))
    inputs = optional("hf_depthattn.kernels.attn_res_group_inputs", "Phase2Inputs")
    impl = _impl(problem.embeddings)
    finished, num_sublayers = [problem.embeddings], len(problem.sublayers)
    for start in range(0, num_sublayers, problem.block_size):
        block = range(start, min(start + problem.block_size, num_sublayers))
        queries = torch.stack([problem.queries[site] for site in block])
        outs, lses, finished = phase1(finished, queries, eps=EPS, impl=impl)
        partial = update = None
        for site, out, lse in zip(block, outs, lses, strict=True):
            sublayer, norm_weight = problem.sublayers[site], problem.norm_weights[site]
            if partial is None:
                partial = sublayer(rms_norm(out, norm_weight))
                continue
            read = inputs([partial], problem.queries[site], EPS, 1.0, update, out, lse)
            x, (partial,) = phase2(read, impl=impl)
            update = sublayer(rms_norm(x, norm_weight))
        finished = [*finished, partial if update is None else partial + update]
    return [_package(finished, problem.queries[-1])]


def pull_stack(problem: StackProblem) -> list[Tensor]:
    """Solve a stack with the pull backward, which computes the gradient of each source in one pass."""
    tap, read = (optional("hf_depthattn.attn_res_pull_ops", name) for name in ("tap", "attn_res_read_tapped"))
    impl = _impl(problem.embeddings)

    def tapped(sources: Sequence[Tensor], query: Tensor) -> Tensor:
        return read(AttnResInputs(sources, query, EPS), impl=impl)[0]

    finished: list[Tensor] = []
    partial = tap(problem.embeddings)
    for site, sublayer in enumerate(problem.sublayers):
        y = sublayer(rms_norm(tapped([*finished, partial], problem.queries[site]), problem.norm_weights[site]))
        if site % problem.block_size == 0:
            finished, partial = [*finished, partial], tap(y)
        else:
            partial = tap(partial + y)
    return [tapped([*finished, partial], problem.queries[-1])]


READ_ROWS = (
    Row("ours, read and torch's norm", "ours", read_row(normed(_package))),
    Row("FLA fused_attnres", "peer", read_row(fla_read)),
    Row("flash-attn-res, phase 1", "peer", read_row(normed(flash_attn_res_read))),
    Row("Liger liger_attn_res", "peer", read_row(normed(liger_read))),
    Row("torch.compile of the reference", "peer", compiled_reference(read_row), slow_to_compile=True),
)
STACK_ROWS = (
    Row("ours, the package's sites", "ours", package_stack),
    Row("ours, two phases", "ours", two_phase_stack),
    Row("ours, pull backward", "ours", pull_stack),
    Row("FLA fused_attnres", "peer", stack_row(fla_read)),
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
    """Return bytes of the best known schedule, E = `unit`: two phases for Block, compute blocks and pull for Full."""
    if block_size == 1:
        forward = num_sublayers * (num_sublayers / 16 + 8 / 2 + 3)
        backward = num_sublayers * (num_sublayers / 8 + 4)
        text = "L (L/16 + 4 + 3) E", "L (L/8 + 4) E"
    else:
        blocks = [min(block_size, num_sublayers - start) for start in range(0, num_sublayers, block_size)]
        forward = sum(b + 1 + size for b, size in enumerate(blocks)) + 5 * num_sublayers
        backward = sum(3 * (b + 1) + size for b, size in enumerate(blocks)) + 6 * num_sublayers
        text = "(sum over blocks of b + 1 + S, + 5 L) E", "(sum over blocks of 3 (b + 1) + S, + 6 L) E"
    return {
        FORWARD: (int(forward * unit), text[0]),
        FORWARD_BACKWARD: (int((forward + backward) * unit), f"{text[0]} + {text[1]}"),
    }
