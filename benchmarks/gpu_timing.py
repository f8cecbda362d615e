"""Timing of a step on a device: CUDA events with a cold L2 cache, or the CPU clock in a dry run."""

from __future__ import annotations

import contextlib
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch

# Larger than the L2 cache of any supported GPU (60 MB on an H200, 256 MB with the last level on MI300).
_FLUSH_BYTES = 512 << 20
_NUM_WARMUPS = 2
_COPY_BYTES = 2 << 30


class OutOfTime(BaseException):
    """Raised when the time of a row or of the run is up; not an `Exception`, which compilers and peers catch."""


class Effort(NamedTuple):
    """Number of repetitions of a timed step.

    Attributes:
        min_runs: least number of timed runs, unless time is up.
        max_runs: largest number of timed runs.
        seconds: time after which no further run starts, once there are `min_runs`.
    """

    min_runs: int = 5
    max_runs: int = 50
    seconds: float = 1.0


_DEFAULT_EFFORT = Effort()


class Clock:
    """Times steps on one device.

    Args:
        device: device of the tensors, `"cuda"`, or `"cpu"` for a dry run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self.on_gpu else 0, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait for the device; raises errors of earlier kernels."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def measure(self, step: Callable[[], object], effort: Effort = _DEFAULT_EFFORT) -> dict:
        """Measure median and quartiles of a step in seconds, and its additional memory.

        Args:
            step: function to time; its result is discarded.
            effort: number of repetitions.
        """
        for _ in range(_NUM_WARMUPS):
            step()
        self.synchronize()
        before = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        seconds: list[float] = []
        started = time.monotonic()
        while len(seconds) < effort.max_runs:
            if len(seconds) >= effort.min_runs and time.monotonic() - started > effort.seconds:
                break
            seconds.append(self._run(step))
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.on_gpu else None
        return {
            "median_s": statistics.median(seconds),
            "quartiles_s": [quartiles[0], quartiles[2]],
            "num_runs": len(seconds),
            "peak_bytes": peak,
        }

    def copy_bandwidth(self, num_bytes: int = _COPY_BYTES) -> float:
        """Measure the bandwidth of a copy in bytes read and written per second, with which floors are compared."""
        source = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.measure(lambda: target.copy_(source), Effort(seconds=0.3))["median_s"]

    def _run(self, step: Callable[[], object]) -> float:
        if not self.on_gpu:
            started = time.perf_counter()
            step()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The write takes long enough for the host to queue the first launches of the step meanwhile.
        self._flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Budget:
    """Time budget of a run, divided among its parts.

    Args:
        seconds: time limit of the whole run.
        shares: weight of each part; unused time is passed on to later parts.
    """

    def __init__(self, seconds: float, shares: dict[str, float]):
        self._end = time.monotonic() + seconds
        self._shares = dict(shares)
        self._part_end = self._end

    def begin(self, part: str) -> None:
        """Start a part; parts must start in the order of `shares`."""
        names = list(self._shares)
        rest = sum(self._shares[name] for name in names[names.index(part) :])
        left = self._end - time.monotonic()
        self._part_end = time.monotonic() + max(0.0, left) * self._shares[part] / rest

    def left(self) -> float:
        """Return the seconds left for the current part."""
        return self._part_end - time.monotonic()


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after a time limit, since compilers and autotuners of peers may take minutes."""
    if seconds <= 0:
        raise OutOfTime("no time left")

    def stop(*_):
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """Capture a step as a CUDA graph, without Python's launch overhead; return `None` if that is not possible."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        return None
    return graph.replay


def environment(device: torch.device) -> dict:
    """Return device, driver and versions."""
    names = ("torch", "triton", "transformers", "flash-linear-attention", "flash-attn-res", "liger-kernel")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "driver": None,
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["memory_bytes"] = properties.total_memory
        found["num_multiprocessors"] = properties.multi_processor_count
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    with contextlib.suppress(OSError), open("/proc/driver/nvidia/version", encoding="utf-8") as file:
        return file.readline().strip()
    return None
