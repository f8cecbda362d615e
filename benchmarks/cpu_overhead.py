"""CPU cost of depth attention: forward and backward of a whole decoder, against the plain residual host in the same
run.

    python benchmarks/cpu_overhead.py [--output benchmarks/results/cpu_overhead.json]

Rows: the stock host, our classes with the residual connection, Block and Full AttnRes, and both with the paper's
pseudo-code written plainly (stack, normalise, einsum) in place of our read. Speeds are measured only after every row
has given the output and the gradients of the plain form. All rows are timed in turn, round after round, since the
machine's speed drifts; what counts is the median of the ratios to the host of the same round.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from hf_depthattn import DepthAttnConfig, DepthAttnModel, depth_connections

# Relative, output and input gradient of the whole network in float64, where depth does not amplify rounding.
PARITY_TOLERANCE = 1e-10
PARITY_SEQUENCE_LENGTH = 64


def plain_read(sources, score_weight, *, eps, read_scale, return_weights, **_) -> tuple[Tensor, None]:
    """The pseudo-code of the paper (arXiv 2603.15031, Fig. 2) with the query and the norm's weight folded."""
    values = torch.stack(list(sources))  # [N, B, T, D]
    keys = nn.functional.rms_norm(values, values.shape[-1:], eps=eps)
    logits = torch.einsum("d,nbtd->nbt", score_weight, keys)
    return read_scale * torch.einsum("nbt,nbtd->btd", logits.softmax(0), values), None


def build(host: LlamaModel, plain: bool, **fields) -> Callable[[Tensor], Tensor]:
    """A function that runs the model; all rows share the host's weights and get the same random queries."""
    config = DepthAttnConfig(text_config=host.config, **fields)
    model = DepthAttnModel(config)
    # The rows share the host's parameters: six copies would not fit a small machine's cache or memory alike.
    model.host.load_state_dict(host.state_dict(keep_vars=True), strict=False, assign=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_depth.query"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    read = plain_read if plain else depth_connections.attn_res_read

    def run(embeddings: Tensor) -> Tensor:
        # The layers look the read up in their module, so that one model class serves both forms.
        original, depth_connections.attn_res_read = depth_connections.attn_res_read, read
        try:
            return model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        finally:
            depth_connections.attn_res_read = original

    run.model = model
    return run


def step(run: Callable[[Tensor], Tensor], embeddings: Tensor, cotangent: Tensor) -> float:
    """Seconds of one forward and backward."""
    for parameter in run.model.parameters():
        parameter.grad = None
    embeddings.grad = None
    started = time.perf_counter()
    run(embeddings).backward(cotangent)
    return time.perf_counter() - started


def check_parity(run: Callable, reference: Callable, embeddings: Tensor) -> float:
    """Largest relative difference of output and input gradient; raises past the tolerance."""
    embeddings = embeddings[:, :PARITY_SEQUENCE_LENGTH].detach().double().requires_grad_()
    cotangent = torch.randn_like(embeddings)
    results = []
    for function in (run, reference):
        function.model.double()
        embeddings.grad = None
        output = function(embeddings)
        output.backward(cotangent)
        results.append((output.detach(), embeddings.grad.clone()))
        function.model.float()
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    if not worst <= PARITY_TOLERANCE:
        raise SystemExit(f"Parity failed ({worst:.2e} > {PARITY_TOLERANCE:.0e}); no speed is printed.")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    host = LlamaModel(
        LlamaConfig(
            vocab_size=256,
            hidden_size=arguments.hidden_size,
            intermediate_size=4 * arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    ).train()
    embeddings = torch.randn(1, arguments.sequence_length, arguments.hidden_size, requires_grad=True)
    cotangent = torch.randn(1, arguments.sequence_length, arguments.hidden_size)

    def stock(embeddings: Tensor) -> Tensor:
        return host(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    stock.model = host
    block, full = {"num_blocks": min(8, 2 * arguments.num_layers)}, {"sublayers_per_block": 1}
    rows = {
        "residual host (stock)": stock,
        "residual connection": build(host, False, connection="residual"),
        "Block AttnRes, 8 blocks": build(host, False, **block),
        "Full AttnRes": build(host, False, **full),
        "Block, plain pseudo-code": build(host, True, **block),
        "Full, plain pseudo-code": build(host, True, **full),
    }
    reference_of = {
        "residual connection": "residual host (stock)",
        "Block AttnRes, 8 blocks": "Block, plain pseudo-code",
        "Full AttnRes": "Full, plain pseudo-code",
    }
    parity = {name: check_parity(rows[name], rows[reference], embeddings) for name, reference in reference_of.items()}

    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(arguments.rounds):
        for name, run in rows.items():
            seconds[name].append(step(run, embeddings, cotangent))
    host_seconds = seconds["residual host (stock)"]
    result = {
        "benchmark": "cpu_overhead",
        "device": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "setting": {
            "num_layers": arguments.num_layers,
            "hidden_size": arguments.hidden_size,
            "intermediate_size": 4 * arguments.hidden_size,
            "sequence_length": arguments.sequence_length,
            "batch_size": 1,
            "dtype": "float32",
            "rounds": arguments.rounds,
        },
        "parity_relative_error": parity,
        "rows": [],
    }
    for name, times in seconds.items():
        ratios = sorted(time / host_time for time, host_time in zip(times, host_seconds, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        result["rows"].append(
            {
                "name": name,
                "seconds_median": statistics.median(times),
                "ratio_median": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
            }
        )
    for row in result["rows"]:
        print(
            f"{row['name']:28} {row['seconds_median']:8.3f} s   {row['ratio_median']:6.3f} x host "
            f"({row['ratio_quartiles'][0]:.3f} - {row['ratio_quartiles'][1]:.3f})"
        )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
