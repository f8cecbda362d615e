"""CPU cost of depth attention: forward and backward of one attention call and of a decoder.

    python benchmarks/cpu_overhead.py [--output benchmarks/results/cpu_overhead.json] [--parts decoder narrow ...]

Attention: `moda_attention` with and without a gate, and a naive form (concatenated scores, one softmax), relative to
    `scaled_dot_product_attention` over the sequence alone.

Decoder, relative to the stock host: our classes with the residual connection; Block and Full AttnRes with grouped
reads, with single reads and with the paper's pseudo-code (stack, normalise, einsum); MoDA with slots of attention
sublayers and of all sublayers; and Block AttnRes with MoDA. Further parts repeat the rows with AttnRes in bfloat16,
with gradient checkpointing, at other sizes, and at several depths.

Before timing, output and gradients of every row are compared in float64 with a plain form: `moda_attention_reference`
for one call, pseudo-code and naive attention in the decoder. All rows are timed in turn in each round, since the speed
of a machine drifts; the result is the median ratio to the first row of the same round, in wall time and in CPU time.

The result is written after every part. Parts that are not named keep their numbers from the output file.
"""

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import attention_rows
import decoder_rows
import torch
from decoder_rows import Setting
from timing import machine, print_rows

GROWTH = (8, 16, 32, 64)


def settings(arguments: argparse.Namespace) -> dict[str, Setting]:
    """Return the setting of each part with a decoder."""
    num_layers, hidden_size, length = arguments.num_layers, arguments.hidden_size, arguments.sequence_length
    rounds = arguments.rounds
    usual = Setting(num_layers, hidden_size, length, rounds=rounds)
    return {
        "decoder": usual,
        "bfloat16": Setting(num_layers, hidden_size, length, dtype="bfloat16", rounds=rounds),
        "checkpointed": Setting(num_layers, hidden_size, length, checkpointed=True, rounds=rounds),
        "wide": Setting(num_layers, 2 * hidden_size, length // 2, rounds=rounds),
        "narrow": Setting(-(-2 * num_layers // 3), hidden_size // 8, length // 2, rounds=4 * rounds),
        **{f"depth_{depth}": Setting(depth, hidden_size // 2, length // 2, rounds=rounds) for depth in GROWTH},
    }


def parts(arguments: argparse.Namespace) -> dict[str, Callable[[], dict]]:
    """Return the measurement of each part."""
    of_decoder = {
        name: partial(decoder_rows.measure, setting, every_row=name == "decoder")
        for name, setting in settings(arguments).items()
    }
    attention = partial(
        attention_rows.measure, arguments.attention_sequence_length, arguments.num_slots, arguments.rounds
    )
    return {"attention": attention, **of_decoder}


def main() -> None:
    """Run the benchmark, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=512, help="sequence length of the decoder")
    parser.add_argument(
        "--attention-sequence-length", type=int, default=1024, help="sequence length of the attention call"
    )
    parser.add_argument("--num-slots", type=int, default=16, help="number of depth slots of the attention call")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parts", nargs="+", default=None, help="names of the parts to measure; all by default")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    measurements = parts(arguments)
    chosen = list(measurements) if arguments.parts is None else arguments.parts
    if unknown := sorted(set(chosen) - measurements.keys()):
        parser.error(f"--parts: {', '.join(unknown)} must be among {', '.join(measurements)}")
    torch.set_num_threads(arguments.threads)

    output: Path | None = arguments.output
    found: dict[str, dict] = {}
    if output is not None and output.exists() and arguments.parts is not None:
        found = json.loads(output.read_text())["parts"]
    for name in chosen:
        found[name] = {**machine(), **measurements[name]()}
        print(f"{name}: {found[name]['setting']}")
        print_rows(found[name]["rows"])
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            unfinished = output.with_name(f"{output.name}.part")
            result = {
                "benchmark": "cpu_overhead",
                "parts": {name: found[name] for name in measurements if name in found},
            }
            unfinished.write_text(json.dumps(result, indent=2) + "\n")
            unfinished.replace(output)


if __name__ == "__main__":
    main()
