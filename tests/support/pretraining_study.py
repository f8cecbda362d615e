"""Tiny settings and made-up results of the pretraining study."""

from __future__ import annotations

from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.results import Result
from benchmarks.pretraining.runs import Run, Setting

TINY = Setting(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    sequence_length=13,
    batch_size=2,
    heldout_sequences=3,
    num_evaluations=2,
    num_train_points=3,
)


def made_up_result(run: Run, loss: float | None, cpu_seconds: float = 10.0, **changes) -> Result:
    """Return a result whose loss falls linearly with the bytes seen, from 5 nats to its final value."""
    last = 5.0 if loss is None else loss
    curve = [(run.tokens * i // 4, cpu_seconds * i / 4, 5 + (last - 5) * i / 4) for i in range(5)]
    values = {
        "run": run,
        "fields": dict(ARMS[run.arm].fields),
        "setting": TINY.to_dict(),
        "corpus": {"train_bytes": 1000, "heldout_bytes": 100, "sha256": "0"},
        "versions": {"python": "3", "torch": "2", "transformers": "5", "commit": "0"},
        "parameters": 1000,
        "depth_parameters": 0,
        "tokens": run.tokens,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": 2 * cpu_seconds,
        "is_diverged": loss is None,
        "heldout_loss": loss,
        "train_curve": [(tokens, value) for tokens, _, value in curve[1:]],
        "heldout_curve": curve,
    }
    return Result(**{**values, **changes})
