"""Cost of MoDA's depth slots in one attention call, forward and backward, relative to plain attention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from naive_moda import naive_moda_attention
from timing import check_parity, gradient_of, time_in_turn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_depthattn import moda_attention_ops

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64


@dataclass
class Inputs:
    """Inputs of one attention call, [B, H, T, d] with the memory layout [B, T, H, d] of projections."""

    query: Tensor
    key: Tensor
    value: Tensor
    depth_keys: list[Tensor]
    depth_values: list[Tensor]
    gate: Tensor
    cotangent: Tensor

    def leaves(self) -> list[Tensor]:
        """Return all tensors that require gradients."""
        return [self.query, self.key, self.value, *self.depth_keys, *self.depth_values, self.gate]

    def clear(self) -> None:
        """Clear the gradients."""
        for leaf in self.leaves():
            leaf.grad = None


def random_inputs(sequence_length: int, num_slots: int, dtype: torch.dtype) -> Inputs:
    """Draw inputs, with the same random numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def leaf(num_heads: int) -> Tensor:
        x = torch.randn(1, sequence_length, num_heads, HEAD_DIM, generator=generator)
        return x.to(dtype).transpose(1, 2).requires_grad_()

    return Inputs(
        query=leaf(NUM_HEADS),
        key=leaf(NUM_KV_HEADS),
        value=leaf(NUM_KV_HEADS),
        depth_keys=[leaf(NUM_KV_HEADS) for _ in range(num_slots)],
        depth_values=[leaf(NUM_KV_HEADS) for _ in range(num_slots)],
        gate=torch.rand(NUM_HEADS, generator=generator).to(dtype).requires_grad_(),
        cotangent=torch.randn(1, sequence_length, NUM_HEADS, HEAD_DIM, generator=generator).to(dtype),
    )


def sequence_only(x: Inputs) -> Tensor:
    """Compute the baseline: torch's attention over the sequence alone."""
    out = scaled_dot_product_attention(x.query, x.key, x.value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def joint(attention: Callable, gated: bool = False) -> Callable[[Inputs], Tensor]:
    """Return a row that attends to sequence and slots in one softmax.

    Args:
        attention: `moda_attention` or a function with the same arguments.
        gated: use the gate.
    """

    def forward(x: Inputs) -> Tensor:
        states = x.query, x.key, x.value, x.depth_keys, x.depth_values
        inputs = moda_attention_ops.ModaInputs(
            *states, scale=HEAD_DIM**-0.5, causal=True, gate=x.gate if gated else None
        )
        return attention(inputs)[0]

    return forward


def measure(sequence_length: int, num_slots: int, rounds: int) -> dict:
    """Check the parity of every row with `moda_attention_reference`, then time the rows.

    Args:
        sequence_length: number of tokens.
        num_slots: number of depth slots L.
        rounds: number of timed runs per row.
    """
    fast, reference = moda_attention_ops.moda_attention, moda_attention_ops.moda_attention_reference
    rows = {
        "SDPA, sequence only": sequence_only,
        "MoDA": joint(fast),
        "MoDA with a gate": joint(fast, gated=True),
        "concatenated, one softmax (naive)": joint(naive_moda_attention),
    }
    expected = {gated: _results(joint(reference, gated), sequence_length, num_slots) for gated in (False, True)}
    parity = {
        name: check_parity(name, _results(row, sequence_length, num_slots), expected[name == "MoDA with a gate"])
        for name, row in rows.items()
        if row is not sequence_only
    }
    x = random_inputs(sequence_length, num_slots, torch.float32)

    def step(row: Callable[[Inputs], Tensor]) -> Callable[[], None]:
        def run() -> None:
            row(x).backward(x.cotangent)

        return run

    return {
        "setting": {
            "sequence_length": sequence_length,
            "num_slots": num_slots,
            "num_attention_heads": NUM_HEADS,
            "num_key_value_heads": NUM_KV_HEADS,
            "head_dim": HEAD_DIM,
            "batch_size": 1,
            "dtype": "float32",
            "rounds": rounds,
        },
        "parity_relative_error": parity,
        "rows": time_in_turn({name: step(row) for name, row in rows.items()}, rounds, x.clear),
    }


def _results(row: Callable[[Inputs], Tensor], sequence_length: int, num_slots: int) -> list[Tensor]:
    """Return the output and all gradients in float64."""
    x = random_inputs(sequence_length, num_slots, torch.float64)
    out = row(x)
    out.backward(x.cotangent)
    return [out.detach(), *(gradient_of(leaf) for leaf in x.leaves())]
