"""Tiny settings and made-up results of the pretraining study."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.group import Group, groups
from benchmarks.pretraining.plan import Plan, Study
from benchmarks.pretraining.results import Result, Results
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


#: Arm -> how far it is below the loss of PreNorm, and its CPU time.
MADE_UP = {
    "prenorm": (0.0, 10.0),
    "prenorm_scaled": (0.3, 10.0),
    "block_attn_res_scaled": (0.4, 15.0),
    "block_attn_res": (0.1, 15.0),
    "static_mix": (-0.2, 12.0),
    "moda": (0.001, 20.0),
    "postnorm": (None, 10.0),
    "moda_postnorm": (0.0, 20.0),
    "retrofit_control": (0.3, 10.0),
    "retrofit_moda": (0.35, 20.0),
}


def loss_of(run: Run) -> float | None:
    """Return the loss of a run with an arm of `MADE_UP`, or `None` if it diverges."""
    lower, _ = MADE_UP[run.arm]
    if lower is None:
        return None
    noise = 0.01 * (run.seed * (len(run.arm) % 5) % 3)
    off_best = 0.05 * (run.learning_rate != 4e-3)
    if len(ARMS[run.arm].depth_lr_factors) > 1:
        off_best += 0.05 * (run.depth_lr_factor != 3)
    return 2.0 + 0.1 * run.seed + noise + off_best - lower + 0.2 * (1000 / run.tokens) - 0.001 * run.num_layers


def made_up_results(loss: Callable[[Run], float | None] = loss_of, study: Study | None = None, **more) -> Results:
    """Return the results of all runs of a study, by default with the arms of `MADE_UP`."""
    study = Study("stdlib", 1000, tuple(MADE_UP), **more) if study is None else study
    results: Results = {}
    while True:
        losses = {run: result.loss for run, result in results.items()}
        missing = Plan(study, losses).missing()
        if not missing:
            return results
        for run in missing:
            results[run] = made_up_result(run, loss(run), MADE_UP[run.arm][1] * run.tokens / 1000)


def made_up_group() -> Group:
    """Return results of `MADE_UP`, of two arms with another depth and of two with other budgets."""
    results = made_up_results(
        depths=(8,), depth_arms=("prenorm", "moda"), budgets=(500, 2000), budget_arms=("prenorm", "block_attn_res")
    )
    (group,) = groups(results)
    return group


def row_of(lines: list[str], label: str) -> list[str]:
    """Return the cells of the row of a table that begins with a label."""
    (row,) = [line for line in lines if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]
