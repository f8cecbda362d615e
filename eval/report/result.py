"""Content of report.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

#: Result of a metric as in its JSON file: numbers and nested lists, with None for NaN and infinities.
StoredResult = dict[str, Any]


@dataclass(frozen=True)
class ModelInfo:
    """Size and kind of a model.

    Attributes:
        class_name: name of the model class.
        family: its `DepthProbe.family`.
        num_layers: number of decoder layers.
        hidden_size: width of the states.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key-value heads.
        num_parameters: number of parameters.
        non_finite_parameters: names of parameters with NaN or infinite values.
        depth_attention: config fields of the depth attention.
    """

    class_name: str
    family: str
    num_layers: int
    hidden_size: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    num_parameters: int
    non_finite_parameters: list[str] = field(default_factory=list)
    depth_attention: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = asdict(self)
        return {"class": values.pop("class_name"), **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelInfo:
        """Build from the output of `to_dict`."""
        values = dict(values)
        return cls(class_name=values.pop("class"), **values)


@dataclass(frozen=True)
class MeasureSettings:
    """Settings that determine the numbers of a model; a rerun in the same folder with other settings is refused.

    Attributes:
        fingerprint: hash of the checkpoint's files.
        revision: branch, tag or commit on the Hub.
        peft_fingerprint: hash of the adapter's files.
        text_sha256: hash of the text.
        tokens_sha256: hash of its token ids.
        num_sequences: number of windows.
        sequence_length: tokens per window.
        batch_size: windows per forward pass.
        dtype: dtype of the parameters.
        device: device of the model.
        versions: versions of the libraries that compute the numbers.
    """

    fingerprint: str
    revision: str | None
    peft_fingerprint: str | None
    text_sha256: str
    tokens_sha256: str
    num_sequences: int
    sequence_length: int
    batch_size: int
    dtype: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True)
class MeasuredCost:
    """Cost of a metric: passes of a batch, seconds, and estimated seconds."""

    num_forwards: float
    num_backwards: float
    seconds: float
    estimated_seconds: float


@dataclass(frozen=True)
class MeasuredModel:
    """One model of a report.

    Attributes:
        name: short name, unique in the report.
        source: folder or Hub id.
        peft: folder of the PEFT adapter, if any.
        info: size and kind.
        settings: settings that determine the numbers.
        seeds: seeds of metrics that draw random numbers.
        costs: cost of each metric.
        failed: error messages of metrics that failed.
        metrics: result of each metric.
    """

    name: str
    source: str
    peft: str | None
    info: ModelInfo
    settings: MeasureSettings
    seeds: dict[str, int]
    costs: dict[str, MeasuredCost]
    failed: dict[str, str]
    metrics: dict[str, StoredResult]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "info": self.info.to_dict()}


@dataclass(frozen=True)
class ReportedText:
    """The text that the models read."""

    name: str
    sha256: str
    num_characters: int


@dataclass(frozen=True)
class Report:
    """The content of report.json.

    Attributes:
        format: version of these fields.
        created: date and time in UTC.
        full: whether the expensive metrics were asked for.
        text: the text that was read.
        model: the model.
        compare: the second model, if any.
        figures_left_out: reasons for figures that could not be drawn.
        versions: versions of Python and libraries.
        machine: platform, cores, threads.
    """

    format: int
    created: str
    full: bool
    text: ReportedText
    model: MeasuredModel
    compare: MeasuredModel | None
    figures_left_out: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, str | int | None]

    @property
    def models(self) -> list[MeasuredModel]:
        """The measured models; the second one, if any, is that of `--compare`."""
        return [self.model] if self.compare is None else [self.model, self.compare]

    def without_figures(self, left_out: dict[str, str]) -> Report:
        """Return the report with reasons for figures that could not be drawn."""
        return replace(self, figures_left_out=left_out)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        compare = None if self.compare is None else self.compare.to_dict()
        return {**asdict(self), "model": self.model.to_dict(), "compare": compare}
