"""CPU cost of depth attention: forward and backward of one attention call and of a decoder.

    python benchmarks/cpu_overhead.py [--output benchmarks/results/cpu_overhead.json]

Attention: `moda_attention` with and without a gate, and a naive form (concatenated scores, one softmax), relative to
    `scaled_dot_product_attention` over the sequence alone.

Decoder, relative to the stock host: our classes with the residual connection; Block and Full AttnRes, with our read
and with the paper's pseudo-code (stack, normalise, einsum); MoDA with slots of attention sublayers and of all
sublayers; and Block AttnRes with MoDA.

Before timing, output and gradients of every row are compared in float64 with a plain form: `moda_attention_reference`
for one call, pseudo-code and naive attention in the decoder. All rows are timed in turn in each round, since the speed
of a machine drifts; the result is the median ratio to the first row of the same round.
"""

import argparse
import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention_rows
import torch
from naive_moda import naive_moda_attention
from timing import check_parity, gradient_of, machine, print_rows, time_in_turn, unrounded_norms
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from hf_depthattn import DepthAttnConfig, DepthAttnModel, attn_res_connection, moda_attention
from hf_depthattn.attn_res_ops import AttnResInputs

PARITY_SEQUENCE_LENGTH = 64
STOCK = "residual host (stock)"


def plain_read(inputs: AttnResInputs, **_) -> tuple[Tensor, None]:
    """Compute the paper's pseudo-code (arXiv 2603.15031, Fig. 2), with the norm's weight folded into the query."""
    values = torch.stack(list(inputs.sources))  # [N, B, T, D]
    keys = nn.functional.rms_norm(values, values.shape[-1:], eps=inputs.eps)
    logits = torch.einsum("d,nbtd->nbt", inputs.score_weight, keys)
    return inputs.read_scale * torch.einsum("nbt,nbtd->btd", logits.softmax(0), values), None


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Replace our ops by their plain forms in the modules where the layers look them up."""
    ours = attn_res_connection.attn_res_read_tapped, moda_attention.moda_attention
    attn_res_connection.attn_res_read_tapped = plain_read
    # It gives no log-sum-exp, which layers need for weights only.
    moda_attention.moda_attention = naive_moda_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        attn_res_connection.attn_res_read_tapped, moda_attention.moda_attention = ours


@dataclass(frozen=True)
class Runner:
    """Runs a model.

    Attributes:
        model: the model.
        plain: with the plain forms in place of our ops.
    """

    model: nn.Module
    plain: bool = False

    def __call__(self, embeddings: Tensor) -> Tensor:
        with plain_forms() if self.plain else contextlib.nullcontext():
            return self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state


def build(host: LlamaModel, plain: bool = False, **fields) -> Runner:
    """A model that can be run; all share the host's weights and get the same random depth parameters.

    Args:
        host: the stock model.
        plain: use the plain forms instead of our ops.
        **fields: fields of `DepthAttnConfig`.
    """
    config = DepthAttnConfig(text_config=copy.deepcopy(host.config), **fields)
    model = DepthAttnModel(config).train()
    # All rows share the host's parameters to save memory, and for equal cache behaviour.
    model.load_state_dict(host.state_dict(keep_vars=True), strict=False, assign=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_depth.query"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "mlp_depth_kv." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Runner(model, plain)


def results(run: Runner, embeddings: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the input and of the depth parameters in float64.

    In float32, rounding errors grow over the depth of the network.
    """
    run.model.double()
    embeddings.grad = None
    with unrounded_norms():
        output = run(embeddings)
    output.backward(cotangent)
    depth = [parameter for name, parameter in run.model.named_parameters() if "_depth" in name]
    found = [output.detach(), *(gradient_of(leaf) for leaf in (embeddings, *depth))]
    run.model.zero_grad(set_to_none=True)
    run.model.float()
    return found


def measure_decoder(arguments: argparse.Namespace) -> dict:
    """Check the parity of every row with its plain form, then time the rows."""
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

    stock = Runner(host)
    block: dict[str, Any] = {"num_blocks": min(8, 2 * arguments.num_layers)}
    full: dict[str, Any] = {"sublayers_per_block": 1}
    moda: dict[str, dict[str, Any]] = {
        "MoDA, attention": {"connection": "residual", "depth_kv": "attention"},
        "MoDA, attention and MLP": {"connection": "residual", "depth_kv": "attention+mlp"},
        "Block AttnRes and MoDA": {**block, "depth_kv": "attention+mlp"},
    }
    rows = {
        STOCK: stock,
        "residual connection": build(host, connection="residual"),
        "Block AttnRes, 8 blocks": build(host, **block),
        "Full AttnRes": build(host, **full),
        "Block, plain pseudo-code": build(host, plain=True, **block),
        "Full, plain pseudo-code": build(host, plain=True, **full),
        **{name: build(host, **fields) for name, fields in moda.items()},
    }
    plain_of = {
        "residual connection": stock,
        "Block AttnRes, 8 blocks": rows["Block, plain pseudo-code"],
        "Full AttnRes": rows["Full, plain pseudo-code"],
        **{name: build(host, plain=True, **fields) for name, fields in moda.items()},
    }
    short = embeddings[:, :PARITY_SEQUENCE_LENGTH].detach().double().requires_grad_()
    short_cotangent = torch.randn_like(short)
    parity = {
        name: check_parity(name, results(rows[name], short, short_cotangent), results(plain, short, short_cotangent))
        for name, plain in plain_of.items()
    }

    def step(run: Runner) -> Callable[[], float]:
        def timed() -> float:
            run.model.zero_grad(set_to_none=True)
            embeddings.grad = None
            started = time.perf_counter()
            run(embeddings).backward(cotangent)
            return time.perf_counter() - started

        return timed

    return {
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
        "rows": time_in_turn({name: step(run) for name, run in rows.items()}, arguments.rounds),
    }


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
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    attention = attention_rows.measure(arguments.attention_sequence_length, arguments.num_slots, arguments.rounds)
    decoder = measure_decoder(arguments)
    result = {"benchmark": "cpu_overhead", **machine(), **decoder, "attention": attention}
    print_rows(attention["rows"])
    print_rows(decoder["rows"])
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
