"""What the benchmarks share: parity before speed, rows timed in turn, ratios, and the machine they ran on."""

import contextlib
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# Relative, in float64: sums of some thousand terms, and a whole network without float32's amplification over depth.
PARITY_TOLERANCE = 1e-10


def check_parity(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative difference of outputs and gradients; stops the benchmark past the tolerance.

    Args:
        name: of the row, for the message.
        actual: its results in float64.
        expected: those of the plain form, in the same order.
    """
    # A gradient may be exactly zero in both, and then in both only.
    smallest = torch.finfo(torch.float64).tiny
    differences = [
        (a - b).norm() / b.norm().clamp_min(smallest) for a, b in zip(actual, expected, strict=True)
    ]  # the maximum of a tensor keeps NaN, Python's `max` may not
    worst = torch.stack(differences).max().item()
    if not worst <= PARITY_TOLERANCE:
        raise SystemExit(f"Parity failed for {name!r} ({worst:.2e} > {PARITY_TOLERANCE:.0e}); no number is printed.")
    return worst


@contextlib.contextmanager
def unrounded_norms() -> Iterator[None]:
    """Llama's norms in the dtype of their input; they round to float32, which hides or enlarges small differences."""
    stock = LlamaRMSNorm.forward

    def forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)

    LlamaRMSNorm.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LlamaRMSNorm.forward = stock  # type: ignore[method-assign]


def gradient_of(tensor: Tensor) -> Tensor:
    """A copy of the gradient of a leaf, zero where nothing came."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()


def time_in_turn(steps: dict[str, Callable[[], float]], rounds: int) -> list[dict]:
    """Times every row once per round; the rows of the result have medians, and ratios to the first row.

    Args:
        steps: row name -> a function that runs one step and returns its seconds; the first row is the base.
        rounds: how often all rows run, one after the other: the speed of a machine drifts, so that only the ratio to
            the base of the same round counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(step())
    base = seconds[next(iter(steps))]
    rows = []
    for name, times in seconds.items():
        ratios = [time / base_time for time, base_time in zip(times, base, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "name": name,
                "seconds_median": statistics.median(times),
                "ratio_median": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
            }
        )
    return rows


def print_rows(rows: list[dict]) -> None:
    """One line per row; the first is the base of the ratios."""
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['name']:36} {row['seconds_median']:8.3f} s   {row['ratio_median']:6.3f} x {rows[0]['name']} "
            f"({low:.3f} - {high:.3f})"
        )


def machine() -> dict:
    """Device, threads and versions."""
    return {
        "device": platform.processor() or platform.machine(),
        "num_threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
