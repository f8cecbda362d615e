"""Measure depth metrics of one or two models on one text, and write report.json, figures and the HTML page."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from ...errors.messages import one_line
from ...utils.progress import progress_bar
from ...utils.result_files import json_text, write_text
from ..metrics.probing.probe import DepthProbe
from ..metrics.registry import DEPTH_METRICS, depth_metrics_of, estimate_seconds
from .health import health_findings
from .options import ReportOptions
from .report_folder import COMPARE, FIGURES, MODEL, PAGE, REPORT, ReportFolder
from .result import MeasuredCost, MeasuredModel, ModelInfo, Report, ReportedText
from .subject import Subject, describe, load_probe, prepare, short_names, versions

FORMAT = 1

#: Function that shows a line to the user.
Say = Callable[[str], None]


@dataclass(frozen=True)
class About:
    """Facts about a model, stored so that a complete report need not load the model again.

    Attributes:
        info: size and kind.
        cheap: names of cheap metrics that apply to it.
        all: names of all metrics that apply to it.
        estimate_seconds: estimated seconds of each metric.
        has_full_estimate: whether the estimate includes expensive metrics.
    """

    info: ModelInfo
    cheap: list[str]
    all: list[str]
    estimate_seconds: dict[str, float]
    has_full_estimate: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "info": self.info.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> About:
        """Build from the output of `to_dict`."""
        return cls(**{**values, "info": ModelInfo.from_dict(values["info"])})


def print_to_stderr(line: str) -> None:
    """Print a line to stderr, apart from the results on stdout."""
    print(line, file=sys.stderr, flush=True)


def write_report(options: ReportOptions, *, say: Say = print_to_stderr) -> Report:
    """Measure all metrics that are not yet in the output folder, and write the report.

    Args:
        options: models, text, and how to run them.
        say: called with estimates and with what was omitted.

    Returns:
        Content of report.json.

    Raises:
        UserError: if the options, the text or a checkpoint are invalid.
    """
    # Import before measuring, so that a missing library for figures is noticed first.
    from .drawing import draw_figures, save_images
    from .page import render_page

    subjects = _subjects(options)
    settings = {part: asdict(subject.settings) for part, subject in subjects.items()}
    folder = ReportFolder(options.out, settings, overwrite=options.overwrite)
    if len(subjects) > 1:
        first, second = (subject.name for subject in subjects.values())
        say(f"two models, one after the other: {first}, then {second} with its own estimate")
    measured = {part: _measure(part, subject, folder, options, say) for part, subject in subjects.items()}
    report = Report(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        full=options.full,
        text=ReportedText(options.text_name, subjects[MODEL].settings.text_sha256, len(options.text)),
        model=measured[MODEL],
        compare=measured.get(COMPARE),
        figures_left_out={},
        versions={**versions(), **_figure_versions(), "python": platform.python_version()},
        machine={"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    )
    # Write the JSON first, since everything else can be regenerated from it.
    write_text(options.out / REPORT, json_text(report.to_dict(), indent=1))
    for model in report.models:
        for finding in health_findings(model):
            say(f"{model.name}: {finding}")
    figures, left_out = draw_figures(report.models)
    if left_out:
        report = report.without_figures(left_out)
        write_text(options.out / REPORT, json_text(report.to_dict(), indent=1))
    without_image = save_images(figures, options.out / FIGURES)
    write_text(options.out / PAGE, render_page(report, figures))
    for name, reason in {**left_out, **without_image}.items():
        say(f"figure {name} is omitted: {reason}")
    return report


def _subjects(options: ReportOptions) -> dict[str, Subject]:
    """Return the models of the report by part (`"model"`, `"compare"`)."""
    names = short_names([options.model] if options.compare is None else [options.model, options.compare])
    if options.peft is not None:
        names[0] = f"{names[0].removesuffix(' (1)')} + {short_names([options.peft])[0]}"
        names[1:] = [name.removesuffix(" (2)") for name in names[1:]]
    subjects = {MODEL: prepare(options.model, names[0], options, options.revision, options.peft)}
    if options.compare is not None:
        subjects[COMPARE] = prepare(options.compare, names[1], options)
    return subjects


def _measure(part: str, subject: Subject, folder: ReportFolder, options: ReportOptions, say: Say) -> MeasuredModel:
    """Measure one model."""
    stored = folder.about(part)
    about = None if stored is None else About.from_dict(stored)
    probe = None
    if about is None or (options.full and not about.has_full_estimate) or _missing(folder, part, about, options):
        probe = load_probe(subject, options)
        about = _about(probe, subject, options, about)
        folder.store_about(part, about.to_dict())
    names = about.all if options.full else about.cheap
    failed: dict[str, str] = {}
    to_do = _missing(folder, part, about, options)
    if probe is not None and to_do:
        seconds = {name: about.estimate_seconds[name] for name in to_do}
        say(_announce(subject.name, seconds, len(names)))
        failed = _run(part, subject, folder, probe, to_do, options.progress, say)
    else:
        say(f"{subject.name}: all {len(names)} metrics have been measured already")
    results = {name: result for name in names if (result := folder.result(part, name)) is not None}
    return MeasuredModel(
        name=subject.name,
        source=subject.source,
        peft=subject.adapter,
        info=about.info,
        settings=subject.settings,
        seeds={name: result["seed"] for name, result in results.items() if "seed" in result},
        costs={
            name: MeasuredCost(**result["cost"], estimated_seconds=about.estimate_seconds[name])
            for name, result in results.items()
        },
        failed=failed,
        metrics=results,
    )


def _about(probe: DepthProbe, subject: Subject, options: ReportOptions, before: About | None) -> About:
    estimate = estimate_seconds(probe, subject.text, full=options.full)
    return About(
        info=describe(probe),
        cheap=list(depth_metrics_of(probe)),
        all=list(depth_metrics_of(probe, full=True)),
        estimate_seconds=estimate if before is None else {**before.estimate_seconds, **estimate},
        has_full_estimate=options.full or (before is not None and before.has_full_estimate),
    )


def _missing(folder: ReportFolder, part: str, about: About, options: ReportOptions) -> list[str]:
    names = about.all if options.full else about.cheap
    return [name for name in names if folder.result(part, name) is None]


def _run(
    part: str,
    subject: Subject,
    folder: ReportFolder,
    probe: DepthProbe,
    names: list[str],
    progress: bool | None,
    say: Say,
) -> dict[str, str]:
    """Measure and store metrics; return the error messages of those that failed."""
    failed = {}
    with _progress(probe, subject, names, shown=progress) as start:
        for name in names:
            start(name)
            try:
                result = DEPTH_METRICS[name].run(probe, subject.text)
            except Exception as error:
                # One metric may fail (remote code, memory, NaN); still report the others.
                failed[name] = one_line(error)
                say(f"{subject.name}: {name} is omitted: {failed[name]}")
                continue
            folder.store_result(part, name, result.to_dict())
    return failed


@contextmanager
def _progress(
    probe: DepthProbe, subject: Subject, names: list[str], *, shown: bool | None
) -> Iterator[Callable[[str], None]]:
    """Show progress in estimated forward passes; yield a function that starts the next metric."""
    passes = {name: max(1, round(DEPTH_METRICS[name].num_forwards(probe) * len(subject.text))) for name in names}
    shown_passes = done = end = 0
    with progress_bar(sum(passes.values()), subject.name, shown, unit="passes") as bar:

        def advance(to: int) -> None:
            nonlocal shown_passes
            if to > shown_passes:
                bar.update(to - shown_passes)
                shown_passes = to

        def start(name: str) -> None:
            nonlocal done, end
            advance(done)
            done += passes[name]
            end = done

        # Progress of a metric stops at the end of its share, however rough the estimate is.
        probe.on_forward = lambda: advance(min(end, shown_passes + 1))
        try:
            yield start
            advance(done)
        finally:
            probe.on_forward = None


def _announce(name: str, seconds: dict[str, float], total: int) -> str:
    longest = max(seconds, key=seconds.__getitem__)
    already = f" of {total}" if len(seconds) < total else ""
    return (
        f"{name}: {len(seconds)}{already} metrics to measure, about {_duration(sum(seconds.values()))} "
        f"(longest: {longest}, {_duration(seconds[longest])}); estimated from one batch"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _figure_versions() -> dict[str, str]:
    import altair
    import vl_convert

    # Its type stubs lack `__version__`.
    return {"altair": altair.__version__, "vl-convert-python": vl_convert.__version__}  # type: ignore[attr-defined]
