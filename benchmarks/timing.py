"""Helpers of the CPU benchmarks: parity check, interleaved timing, ratios, and machine information."""

import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# Relative tolerance in float64, for sums of some thousand terms in a whole network.
PARITY_TOLERANCE = 1e-10


def check_parity(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative difference of outputs and gradients; exit if it exceeds the tolerance.

    Args:
        name: name of the row, for the message.
        actual: results of the row in float64.
        expected: results of the plain form, in the same order.
    """
    # A gradient may be exactly zero, but only in both.
    smallest = torch.finfo(torch.float64).tiny
    differences = [
        (a - b).norm() / b.norm().clamp_min(smallest) for a, b in zip(actual, expected, strict=True)
    ]  # tensor.max() propagates NaN, unlike Python's `max`
    worst = torch.stack(differences).max().item()
    if not worst <= PARITY_TOLERANCE:
        raise SystemExit(f"Parity failed for {name!r} ({worst:.2e} > {PARITY_TOLERANCE:.0e}); nothing was timed.")
    return worst


@contextlib.contextmanager
def unrounded_norms() -> Iterator[None]:
    """Run Llama's norms in the dtype of their input; by default they round to float32, which distorts comparisons."""
    stock = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)

    LlamaRMSNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LlamaRMSNorm.forward = stock  # type: ignore[method-assign]


def gradient_of(tensor: Tensor) -> Tensor:
    """Return a copy of the gradient of a leaf, or zeros if there is none."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()


def time_in_turn(steps: dict[str, Callable[[], None]], rounds: int, clear: Callable[[], None]) -> list[dict]:
    """Time every row once per round; return medians, and ratios to the first row.

    Args:
        steps: for each row, a function that runs one step; the first row is the baseline.
        rounds: number of rounds. The speed of a machine drifts, so ratios are taken to the baseline of the same round.
        clear: clears the gradients before each step, outside the measured time.
    """
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            clear()
            started, cpu_started = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
    first = next(iter(steps))
    rows = []
    for name in steps:
        ratios = [own / base for own, base in zip(wall[name], wall[first], strict=True)]
        cpu_ratios = [own / base for own, base in zip(cpu[name], cpu[first], strict=True)]
        quartiles, cpu_quartiles = (statistics.quantiles(values, n=4) for values in (ratios, cpu_ratios))
        rows.append(
            {
                "name": name,
                "seconds_median": statistics.median(wall[name]),
                "ratio_median": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "cpu_seconds_median": statistics.median(cpu[name]),
                "cpu_ratio_median": statistics.median(cpu_ratios),
                "cpu_ratio_quartiles": [cpu_quartiles[0], cpu_quartiles[2]],
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    """Print one line per row; the first is the baseline of the ratios."""
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['name']:36} {row['seconds_median']:8.3f} s   {row['ratio_median']:6.3f} x {rows[0]['name']} "
            f"({low:.3f} - {high:.3f}), CPU time {row['cpu_ratio_median']:6.3f}"
        )


def machine() -> dict:
    """Return device, threads and versions."""
    return {
        "device": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
