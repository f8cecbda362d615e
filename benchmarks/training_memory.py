"""Memory kept for backward by number of layers: AttnRes, MoDA, its naive forms and the stock host.

    python benchmarks/training_memory.py [--output benchmarks/results/training_memory.json]

Rows: the stock host and AttnRes, also in bfloat16 and with gradient checkpointing; MoDA with slots of all sublayers,
    alone and with Block AttnRes; MoDA with the slots of a token gathered into one tensor in every layer, as in a depth
    cache, with the same attention op; and MoDA with naive attention (concatenated scores, one softmax, autograd).

Bytes are those of all storages that are alive after the forward pass, without parameters and inputs (`kept_bytes`);
they only depend on shapes and kernels. The sequence is short, so that the T x T scores of the naive form do not hide
the cost of its slots. First, the gradients of both other forms of MoDA are compared with ours.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from kept_bytes import kept_bytes
from naive_moda import naive_moda_attention
from timing import check_parity, gradient_of, unrounded_norms
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from hf_depthattn import DepthAttnConfig, DepthAttnModel, moda_attention
from hf_depthattn.moda_attention_ops import ModaInputs

BLOCK = {"connection": "attn_res", "num_blocks": 8}
FULL = {"connection": "attn_res", "sublayers_per_block": 1}
MODA = {"connection": "residual", "depth_kv": "attention+mlp"}
BLOCK_AND_MODA = {"connection": "attn_res", "num_blocks": 8, "depth_kv": "attention+mlp"}
OURS = moda_attention.moda_attention


def gathered_slots(inputs: ModaInputs, **options) -> tuple[Tensor, Tensor]:
    """Run our op on slots that are first gathered into one tensor [B, T, L, Hk, d]."""
    keys, values = (
        torch.stack([slot.transpose(1, 2) for slot in slots], 2).transpose(1, 3).unbind(2)
        for slots in (inputs.depth_keys, inputs.depth_values)
    )
    return OURS(inputs._replace(depth_keys=keys, depth_values=values), **options)


@dataclass(frozen=True)
class Row:
    """A row of the result.

    Attributes:
        fields: fields of the config; `None` for the stock model.
        dtype: dtype of the weights of the host and of the input.
        checkpointed: with gradient checkpointing.
        attention: the attention function of MoDA.
    """

    fields: dict | None
    dtype: str = "float32"
    checkpointed: bool = False
    attention: Callable = OURS


STOCK = "stock host"
ROWS: dict[str, Row] = {
    STOCK: Row(None),
    "Block AttnRes": Row(BLOCK),
    "Full AttnRes": Row(FULL),
    f"{STOCK}, bfloat16": Row(None, dtype="bfloat16"),
    "Block AttnRes, bfloat16": Row(BLOCK, dtype="bfloat16"),
    "Full AttnRes, bfloat16": Row(FULL, dtype="bfloat16"),
    f"{STOCK}, checkpointed": Row(None, checkpointed=True),
    "Block AttnRes, checkpointed": Row(BLOCK, checkpointed=True),
    "Full AttnRes, checkpointed": Row(FULL, checkpointed=True),
    "MoDA": Row(MODA),
    "Block AttnRes and MoDA": Row(BLOCK_AND_MODA),
    "MoDA, slots gathered in every layer": Row(MODA, attention=gathered_slots),
    "MoDA, naive": Row(MODA, attention=naive_moda_attention),
}
#: Row -> the row that must have the same gradients.
SAME_AS = {"MoDA, slots gathered in every layer": "MoDA", "MoDA, naive": "MoDA"}


@contextlib.contextmanager
def attention_of(row: str) -> Iterator[None]:
    """Set the attention function of a row in the module where layers look it up."""
    moda_attention.moda_attention = ROWS[row].attention
    try:
        yield
    finally:
        moda_attention.moda_attention = OURS


def build(row: str, num_layers: int, arguments: argparse.Namespace) -> LlamaModel | DepthAttnModel:
    """Build the model of a row, with the same random weights in all rows."""
    torch.manual_seed(0)
    host = LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.hidden_size,
        intermediate_size=2 * arguments.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    fields = ROWS[row].fields
    model = LlamaModel(host) if fields is None else DepthAttnModel(DepthAttnConfig(text_config=host, **fields))
    return model.train()


def embeddings(arguments: argparse.Namespace) -> Tensor:
    """Return the input of all rows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, arguments.sequence_length, arguments.hidden_size, generator=generator).requires_grad_()


def gradients(row: str, num_layers: int, arguments: argparse.Namespace) -> list[Tensor]:
    """Return the gradients of the input and of every parameter in float64."""
    model, inputs = (
        build(row, num_layers, arguments).double(),
        embeddings(arguments).detach().double().requires_grad_(),
    )
    cotangent = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)).double()
    with attention_of(row), unrounded_norms():
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.backward(cotangent)
    return [gradient_of(leaf) for leaf in (inputs, *model.parameters())]


def step_bytes(row: str, num_layers: int, arguments: argparse.Namespace) -> int:
    """Return the bytes that a forward pass keeps."""
    dtype = getattr(torch, ROWS[row].dtype)
    model, inputs = build(row, num_layers, arguments).to(dtype), embeddings(arguments).detach().to(dtype)
    inputs.requires_grad_()
    if ROWS[row].checkpointed:
        model.gradient_checkpointing_enable()
    with attention_of(row):
        return kept_bytes(
            lambda: model(inputs_embeds=inputs, use_cache=False).last_hidden_state, [*model.parameters(), inputs]
        )


def main() -> None:
    """Run the benchmark, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    fewest = min(arguments.num_layers)
    parity = {
        row: check_parity(row, gradients(row, fewest, arguments), gradients(same, fewest, arguments))
        for row, same in SAME_AS.items()
    }
    rows: list[dict[str, Any]] = []
    for row in ROWS:
        num_bytes = [step_bytes(row, num_layers, arguments) for num_layers in arguments.num_layers]
        per_layer = [count / num_layers for count, num_layers in zip(num_bytes, arguments.num_layers, strict=True)]
        rows.append({"name": row, "dtype": ROWS[row].dtype, "bytes": num_bytes, "bytes_per_layer": per_layer})
    result = {
        "benchmark": "training_memory",
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "setting": {
            "num_layers": arguments.num_layers,
            "hidden_size": arguments.hidden_size,
            "intermediate_size": 2 * arguments.hidden_size,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "sequence_length": arguments.sequence_length,
            "batch_size": 1,
        },
        "parity_relative_error": parity,
        "rows": rows,
    }
    print(f"{'KiB per layer at L =':36}" + "".join(f"{num_layers:10}" for num_layers in arguments.num_layers))
    for found in rows:
        print(f"{found['name']:36}" + "".join(f"{count / 1024:10.1f}" for count in found["bytes_per_layer"]))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
