"""Base classes of depth metrics: result, registry entry, and the decorator that runs a metric."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .probe import DepthProbe
from .text import TextBatches


@dataclasses.dataclass(frozen=True)
class MetricCost:
    """Cost of a metric.

    Attributes:
        num_forwards: number of forward passes of a batch.
        num_backwards: number of backward passes of a batch; one through a single layer counts 1 / num_layers.
        seconds: wall time.
    """

    num_forwards: float
    num_backwards: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TextStamp:
    """Identity of the text on which a metric was measured.

    Attributes:
        sha256: hash of the token ids (`TextBatches.sha256`).
        num_tokens: number of tokens in all sequences.
        num_sequences: number of sequences.
    """

    sha256: str
    num_tokens: int
    num_sequences: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MetricResult:
    """Base class of results. Tensors are float64 on the CPU, with NaN for entries that do not exist.

    Attributes:
        family: `DepthProbe.family` of the model, which determines the conventions.
        cost: number of passes and seconds; set by `depth_metric`.
        text: identity of the text; set by `depth_metric`.
    """

    family: str = ""
    cost: MetricCost | None = None
    text: TextStamp | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: nested lists for tensors, `None` for NaN and infinities."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: object) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value if value is None or isinstance(value, bool | int) else str(value)


def _always(probe: DepthProbe) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class DepthMetric:
    """Registry entry of a metric.

    Attributes:
        run: function of `(model or probe, batches)`.
        num_forwards: estimated number of passes over the whole text; a backward pass counts as two.
        is_cheap: whether it is part of the default report.
        applies: function that returns whether the metric applies to a model.
    """

    run: Callable[..., MetricResult]
    num_forwards: Callable[[DepthProbe], float]
    is_cheap: bool
    applies: Callable[[DepthProbe], bool] = _always


Result = TypeVar("Result", bound=MetricResult)


def depth_metric(function: Callable[..., Result]) -> Callable[..., Result]:
    """Turn a function of `(probe, TextBatches, ...)` into a metric of `(model or probe, batches, ...)`.

    The metric runs in eval mode without gradients and restores the model's mode afterwards. It sets `family`, `cost`
    and `text` of the result.
    """

    @wraps(function)
    def metric(
        model: PreTrainedModel | DepthProbe,
        batches: TextBatches | Tensor | Iterable[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Result:
        probe = DepthProbe.of(model)
        text = TextBatches.of(batches)
        start, forwards, backwards = time.perf_counter(), probe.num_forwards, probe.num_backwards
        with probe.evaluation(), torch.no_grad():
            result = function(probe, text, *args, **kwargs)
        cost = MetricCost(probe.num_forwards - forwards, probe.num_backwards - backwards, time.perf_counter() - start)
        stamp = TextStamp(text.sha256, text.num_tokens, text.num_sequences)
        return dataclasses.replace(result, family=probe.family, cost=cost, text=stamp)

    return metric
