"""What residual mechanisms load and store per token and sublayer, in units of d, one row of D channels.

    python benchmarks/bytes_moved.py [--output benchmarks/results/bytes_moved.json] [--num-sublayers 128 ...]

The setting is that of the paper's table of I/O (arXiv 2603.15031, section 4.2): 128 sublayers and 8 blocks. A stack of
the package's sites is run forward and backward, with sublayers whose own traffic is not counted and without norms.

Kernels are counted as they run in Triton's interpreter, in float16 (`kernel_bytes`), and so are the torch operations
between them; the torch implementations are counted in float32 (`torch_bytes`). Hyper-connections have torch
implementations only: those of this package, and the module of transformers' DeepSeek-V4. Numbers are exact and
independent of D and of the tokens; rows of the result are sums over the stack. Phase 1 of the last group also serves
the output site, whose own read is in the sums only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import torch
from kernel_bytes import NO_TRAFFIC, Traffic, metered_kernels
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch_bytes import TorchBytes
from transformers import DeepseekV4Config, LlamaConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from hf_depthattn import DepthAttnConfig, op_dispatch
from hf_depthattn.attn_res_reads import ReadWeights
from hf_depthattn.attn_res_schedule import last_site_of_group
from hf_depthattn.depth_connections import depth_site
from hf_depthattn.depth_state import Carried

# Kernels are slow in the interpreter. In float32, weights are told apart from matrices by the number of tokens.
NUM_TOKENS = {"triton": 2, "torch": 17}
NUM_CHANNELS = 160
NUM_STREAMS = 4
EPS = 1e-6
#: The package's connections with several streams, and their titles.
STREAM_CONNECTIONS = {"hyper_connections": "Hyper-Connections", "mhc": "mHC", "mhc_lite": "mHC-lite"}


class Mark(NamedTuple):
    """A sublayer in the list of events: what follows belongs to its site (backward), or to the next one (forward)."""

    sublayer: int


class Sublayer(torch.autograd.Function):
    """A sublayer of random results, not counted, so that sums do not grow; it leaves a mark in the list of events."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list, number: int) -> Tensor:
        ctx.events, ctx.number = events, number
        events.append(Mark(number))
        with _disable_current_modes():
            return torch.randn_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(Mark(ctx.number))
        with _disable_current_modes():
            return torch.randn_like(grad), None, None


class Row(NamedTuple):
    """A mechanism.

    Attributes:
        name: its name.
        stack: function from the number of sublayers, the dtype and the list of events to a function from embeddings
            to the output, and its parameters.
        size: number of sublayers per block and group, for what the last of them moves.
        paths: `"triton"` and `"torch"`, or one of them.
    """

    name: str
    stack: Callable[[int, torch.dtype, list], tuple[Callable[[Tensor], Tensor], list[Tensor]]]
    size: int
    paths: tuple[str, ...] = ("triton", "torch")


def sites_stack(schedule: str, **fields: Any) -> Callable:
    """Return a stack of the package's sites, as its decoder layers use them.

    Args:
        schedule: `attn_res_schedule` of the config.
        fields: further fields of the config.
    """

    def make(num_sublayers: int, dtype: torch.dtype, events: list) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        host = LlamaConfig(
            hidden_size=NUM_CHANNELS, num_hidden_layers=num_sublayers // 2, num_attention_heads=1, vocab_size=8
        )
        config = DepthAttnConfig(text_config=host, depth_norm_eps=EPS, **fields)
        sites = [depth_site(config, site) for site in range(num_sublayers + 1)]
        queries = (torch.randn(num_sublayers + 1, NUM_CHANNELS) * NUM_CHANNELS**-0.5).requires_grad_()
        of_sites: list[Tensor] = [parameter for site in sites for parameter in site.parameters()]
        for parameter in of_sites:
            nn.init.normal_(parameter, std=0.02)

        def run(embeddings: Tensor) -> Tensor:
            weights = Carried(ReadWeights(queries, None, schedule))
            state = sites[0].begin(embeddings)
            for number, site in enumerate(sites[:-1]):
                h, state, _ = site(state, weights)
                state = site.write(state, Sublayer.apply(h, events, number))
            return sites[-1](state, weights)[0]

        return run, [queries] if fields["connection"] == "attn_res" else of_sites

    return make


def hyper_connections(num_sublayers: int, dtype: torch.dtype, events: list) -> tuple[Callable, list[Tensor]]:
    """Return a stack with manifold-constrained hyper-connections, written as in the decoder layer of DeepSeek-V4."""
    config = DeepseekV4Config(hidden_size=NUM_CHANNELS, hc_mult=NUM_STREAMS)
    modules = [DeepseekV4HyperConnection(config).to(dtype) for _ in range(num_sublayers)]
    parameters: list[Tensor] = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)

    def run(embeddings: Tensor) -> Tensor:
        streams = embeddings.unsqueeze(2).expand(-1, -1, NUM_STREAMS, -1).contiguous()
        for number, module in enumerate(modules):
            post, comb, collapsed = module(streams)
            y = Sublayer.apply(collapsed, events, number)
            mixed = torch.matmul(comb.to(dtype).transpose(-1, -2), streams)
            streams = post.to(dtype).unsqueeze(-1) * y.unsqueeze(-2) + mixed
        return streams.mean(2)

    return run, parameters


def rows(num_sublayers: int, block_size: int) -> list[Row]:
    """Return the mechanisms; groups of Full AttnRes have the size that the package chooses."""
    host = LlamaConfig(hidden_size=NUM_CHANNELS, num_hidden_layers=num_sublayers // 2, num_attention_heads=1)
    full: dict[str, Any] = {"connection": "attn_res", "sublayers_per_block": 1}
    block: dict[str, Any] = {"connection": "attn_res", "sublayers_per_block": block_size}
    last = num_sublayers - 1
    config = DepthAttnConfig(text_config=host, **full)
    group = sum(last_site_of_group(config, site) == last_site_of_group(config, last) for site in range(num_sublayers))
    streams = [
        Row(
            f"{title}, {NUM_STREAMS} streams",
            sites_stack("auto", connection=name, num_streams=NUM_STREAMS),
            1,
            ("torch",),
        )
        for name, title in STREAM_CONNECTIONS.items()
    ]
    return [
        Row("residual", sites_stack("auto", connection="residual"), 1, ("torch",)),
        Row("Block AttnRes, grouped reads", sites_stack("grouped", **block), block_size),
        Row("Block AttnRes, single reads", sites_stack("single", **block), block_size),
        Row("Full AttnRes, grouped reads", sites_stack("grouped", **full), group),
        Row("Full AttnRes, single reads", sites_stack("single", **full), group),
        *streams,
        Row(f"mHC, {NUM_STREAMS} streams, transformers' DeepSeek-V4", hyper_connections, 1, ("torch",)),
    ]


def count(row: Row, path: str, num_sublayers: int) -> dict:
    """Run a stack and return what it moves, forward and backward."""
    torch.manual_seed(0)
    dtype, num_tokens = torch.float16 if path == "triton" else torch.float32, NUM_TOKENS[path]
    replaced = dict(op_dispatch.OPS)
    if path == "triton":
        for name, op in replaced.items():
            op_dispatch.OPS[name] = op_dispatch.Op(name, op.triton_impl or op.torch_impl)
    try:
        with metered_kernels() as events:
            run, parameters = row.stack(num_sublayers, dtype, events)
            embeddings, cotangents = (torch.randn(1, num_tokens, NUM_CHANNELS).to(dtype) for _ in range(2))
            embeddings.requires_grad_()
            with TorchBytes(events, num_tokens, NUM_CHANNELS, dtype):
                out = run(embeddings)
                num_forward = len(events)
                torch.autograd.grad(out, [embeddings, *parameters], cotangents, allow_unused=True)
    finally:
        op_dispatch.OPS.update(replaced)
    forward, backward = events[:num_forward], events[num_forward:]

    def of_group(moved: list, start: int, end: int) -> dict:
        return totals(between(moved, start, end), num_tokens)

    # The reads of the last group come after the mark of the last sublayer before it, and go before that of the last
    # sublayer in the forward; in the backward it is the other way round.
    first, last = num_sublayers - row.size - 1, num_sublayers - 1
    return {
        "name": row.name,
        "path": path,
        "group_size": row.size,
        "forward": {**summary(forward, num_tokens), "last_group": of_group(forward, first, last)},
        "backward": {
            **summary(backward, num_tokens),
            "last_group": of_group(backward, last, first),
        },
    }


def between(events: list, start: int, end: int) -> list:
    """Return the events between the marks of two sublayers."""
    marks = {event.sublayer: i for i, event in enumerate(events) if isinstance(event, Mark)}
    return events[marks[start] : marks[end]]


def totals(events: Iterable, num_tokens: int) -> dict:
    """Return sums of matrices loaded and stored, distinct within a launch and issued."""
    traffic: Traffic = sum(
        (event.traffic(num_tokens * NUM_CHANNELS) for event in events if not isinstance(event, Mark)), NO_TRAFFIC
    )
    return {
        "loads": _whole(traffic.distinct_loads),
        "stores": _whole(traffic.distinct_stores),
        "issued": _whole(traffic.issued_loads + traffic.issued_stores),
    }


def summary(events: list, num_tokens: int) -> dict:
    """Return the sums over all events, those of each kernel and operation, and the statistics."""
    moving = [event for event in events if not isinstance(event, Mark)]
    names = sorted({event.name for event in moving if any(event.traffic(1))})
    parts = {name: totals((event for event in moving if event.name == name), num_tokens) for name in names}
    statistics = sum((event.statistics(num_tokens) for event in moving), Fraction(0))
    return {**totals(events, num_tokens), "statistics": _whole(statistics), "parts": parts}


def _whole(number: Fraction) -> int:
    if number.denominator != 1:
        raise ValueError(f"a part of a matrix was counted: {number}")
    return number.numerator


def result(num_sublayers: int, block_size: int, names: Iterable[str] | None = None) -> dict:
    """Return the result of the benchmark, or of the rows with some names."""
    found = []
    for row in rows(num_sublayers, block_size):
        for path in row.paths if names is None or row.name in names else ():
            found.append(count(row, path, num_sublayers))
            print(f"{row.name}, {path}: {per_sublayer(found[-1], num_sublayers)}", flush=True)
    setting = {"num_sublayers": num_sublayers, "block_size": block_size}
    return {"benchmark": "bytes_moved", "setting": setting, "rows": found}


def per_sublayer(row: dict, num_sublayers: int) -> str:
    """Return the matrices of a row of the result per sublayer: the mean over the stack, and the last group."""
    numbers = []
    for direction in ("forward", "backward"):
        mean, last = ((moved["loads"] + moved["stores"]) for moved in (row[direction], row[direction]["last_group"]))
        numbers.append(f"{direction} {mean / num_sublayers:.2f} d, last group {last / row['group_size']:.2f} d")
    return "; ".join(numbers)


def main() -> None:
    """Run the benchmark, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-sublayers", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    found = result(arguments.num_sublayers, arguments.block_size)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
