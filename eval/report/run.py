"""Measures the depth metrics of one or two models on one text, and writes report.json, the figures and the page."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ...errors.messages import one_line
from ...utils.progress import progress_bar
from ...utils.result_files import json_text, write_text
from ..metrics.probe import DepthProbe
from ..metrics.registry import DEPTH_METRICS, depth_metrics_of, estimate_seconds
from .health import health_findings
from .report_folder import COMPARE, FIGURES, MODEL, PAGE, REPORT, ReportFolder
from .subject import ReportOptions, Subject, describe, load_probe, prepare, short_names, versions

FORMAT = 1


def write_report(
    model: str,
    out: Path,
    options: ReportOptions,
    *,
    compare: str | None = None,
    peft: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool | None = False,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Measure, and write everything into a folder. What is measured there already is not measured again.

    Args:
        model: folder or Hub id of a checkpoint.
        out: the folder.
        options: how to read the text and to run the models.
        compare: another checkpoint, measured on the same text.
        peft: folder of a PEFT adapter on top of `model`.
        revision: branch, tag or commit of `model` on the Hub.
        overwrite: forget another report that lies in the folder.
        progress: as in `utils.progress.progress_bar`.
        say: is given the estimate and what has been left out.

    Returns:
        The content of report.json.

    Raises:
        UserError: something that the user can put right; the message is one line.
    """
    # Before anything is measured: a missing library for the figures must not turn up at the end.
    from .drawing import build_figures, save_images
    from .page import render_page

    names = short_names([model] if compare is None else [model, compare])
    if peft is not None:
        names[0] = f"{names[0].removesuffix(' (1)')} + {short_names([peft])[0]}"
        names[1:] = [name.removesuffix(" (2)") for name in names[1:]]
    subjects = {MODEL: prepare(model, names[0], options, revision, peft)}
    if compare is not None:
        subjects[COMPARE] = prepare(compare, names[1], options)
    folder = ReportFolder(out, {part: subject.settings for part, subject in subjects.items()}, overwrite=overwrite)
    if compare is not None:
        say(f"two models, one after the other: {names[0]}, then {names[1]} with an estimate of its own")
    measured = {
        part: _measure(part, subject, folder, options, progress=progress, say=say)
        for part, subject in subjects.items()
    }
    report = {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "full": options.full,
        "text": {
            "name": options.text_name,
            "sha256": subjects[MODEL].settings["text_sha256"],
            "num_characters": len(options.text),
        },
        "model": measured[MODEL],
        "compare": measured.get(COMPARE),
        "figures_left_out": {},
        "versions": {**versions(), **_figure_versions(), "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }
    # The JSON comes first: it is what cannot be made again from the rest.
    write_text(out / REPORT, json_text(report, indent=1))
    for part in (report["model"], report["compare"]):
        for finding in health_findings(part) if part else ():
            say(f"{part['name']}: {finding}")
    figures = build_figures(report)
    if report["figures_left_out"]:
        write_text(out / REPORT, json_text(report, indent=1))
    without_image = save_images(figures, out / FIGURES) or {}
    write_text(out / PAGE, render_page(report, figures))
    for name, reason in {**report["figures_left_out"], **without_image}.items():
        say(f"figure {name} is left out: {reason}")
    return report


def _measure(
    part: str,
    subject: Subject,
    folder: ReportFolder,
    options: ReportOptions,
    *,
    progress: bool | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One model's part of the report."""
    about = folder.about(part)
    probe = None
    if about is None or (options.full and not about["has_full_estimate"]) or _missing(folder, part, about, options):
        probe = load_probe(subject, options)
        estimate = estimate_seconds(probe, subject.text, full=options.full)
        about = {
            "info": describe(probe),
            "cheap": list(depth_metrics_of(probe)),
            "all": list(depth_metrics_of(probe, full=True)),
            "estimate_seconds": {**(about or {}).get("estimate_seconds", {}), **estimate},
            "has_full_estimate": options.full or bool(about and about["has_full_estimate"]),
        }
        folder.store_about(part, about)
    names = about["all"] if options.full else about["cheap"]
    to_do = _missing(folder, part, about, options)
    failed: dict[str, str] = {}
    if to_do:
        seconds = {name: about["estimate_seconds"][name] for name in to_do}
        say(_announce(subject.name, seconds, len(names)))
        failed = _run(part, subject, folder, probe, to_do, progress=progress, say=say)
    else:
        say(f"{subject.name}: all {len(names)} metrics are there already")
    results = {name: result for name in names if (result := folder.result(part, name)) is not None}
    return {
        "name": subject.name,
        "source": subject.source,
        "peft": subject.adapter,
        "info": about["info"],
        "settings": subject.settings,
        "seeds": {name: result["seed"] for name, result in results.items() if "seed" in result},
        "costs": {
            name: {**result["cost"], "estimated_seconds": about["estimate_seconds"][name]}
            for name, result in results.items()
        },
        "failed": failed,
        "metrics": results,
    }


def _missing(folder: ReportFolder, part: str, about: dict[str, Any], options: ReportOptions) -> list[str]:
    names = about["all"] if options.full else about["cheap"]
    return [name for name in names if folder.result(part, name) is None]


def _run(
    part: str,
    subject: Subject,
    folder: ReportFolder,
    probe: DepthProbe,
    names: list[str],
    *,
    progress: bool | None,
    say: Callable[[str], None],
) -> dict[str, str]:
    """Measures and stores; the messages of metrics that this model does not allow."""
    failed = {}
    with _progress(probe, subject, names, shown=progress) as start:
        for name in names:
            start(name)
            try:
                result = DEPTH_METRICS[name].run(probe, subject.text)
            except Exception as error:
                # Remote code, memory or NaN may be in one metric's way: the others are worth a report.
                failed[name] = one_line(error)
                say(f"{subject.name}: {name} is left out: {failed[name]}")
                continue
            folder.store_result(part, name, result.to_dict())
    return failed


@contextmanager
def _progress(
    probe: DepthProbe, subject: Subject, names: list[str], *, shown: bool | None
) -> Iterator[Callable[[str], None]]:
    """Progress in estimated forward passes; gives a function that begins the next metric."""
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

        # A metric never runs past the end of its own part, however rough its estimate is.
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

    return {"altair": altair.__version__, "vl-convert-python": vl_convert.__version__}
