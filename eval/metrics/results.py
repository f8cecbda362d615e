"""What a depth metric is: its result, its entry for the registry, and the wrapper that runs it."""

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
    """What a metric took.

    Attributes:
        num_forwards: forward passes of a batch.
        num_backwards: backward passes of a batch; through a single layer they count 1 / num_layers.
        seconds: wall time.
    """

    num_forwards: float
    num_backwards: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class TextStamp:
    """The text a metric ran on.

    Attributes:
        sha256: of the token ids (`TextBatches.sha256`).
        num_tokens: tokens, all sequences together.
        num_sequences: sequences.
    """

    sha256: str
    num_tokens: int
    num_sequences: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MetricResult:
    """Base of the results: tensors are float64 on the CPU, NaN where an entry does not exist.

    Attributes:
        family: the model's `DepthFamily`, which decides the conventions.
        cost: passes and seconds; set by `depth_metric`.
        text: the text; set by `depth_metric`.
    """

    family: str = ""
    cost: MetricCost | None = None
    text: TextStamp | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them: nested lists for tensors, `None` for NaN and infinities."""
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
    """A metric with what a report needs to know of it beforehand.

    Attributes:
        run: `run(model or probe, batches)`.
        num_forwards: estimated passes over the whole text; a backward pass counts as two.
        is_cheap: whether it is part of the default report.
        applies: whether a model has what it measures.
    """

    run: Callable[..., MetricResult]
    num_forwards: Callable[[DepthProbe], float]
    is_cheap: bool
    applies: Callable[[DepthProbe], bool] = _always


Result = TypeVar("Result", bound=MetricResult)


def depth_metric(function: Callable[..., Result]) -> Callable[..., Result]:
    """Makes a function of `(probe, TextBatches, ...)` a metric of `(model or probe, batches, ...)`.

    The model is in evaluation mode and without gradients while it runs and as before afterwards, whatever happens;
    the result carries `family`, `cost` and `text`.
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
        return dataclasses.replace(result, family=str(probe.family), cost=cost, text=stamp)

    return metric
