"""The subcommand `depthattn report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..eval.report.options import BATCH_SIZE, ReportOptions, check_models, check_values
from ..utils.paths import read_text, user_path
from .options import (
    Commands,
    add_batch_size,
    add_command,
    add_device,
    add_dtype,
    add_overwrite,
    add_peft,
    add_remote_code,
    add_revision,
    add_text,
)
from .run_command import advice_after_interrupt

if TYPE_CHECKING:
    from ..eval.report.result import Report


def add_report(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "report",
        run_report,
        help="measure how a model uses its depth, and write an HTML page",
        description="Measure depth metrics of any causal language model, stock or with depth attention, and write "
        "report.html (a single file that works offline), report.json and figures/*.png. To continue an interrupted "
        "report, give the same command again.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a checkpoint")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the report")
    add_peft(parser, "merge")
    parser.add_argument("--compare", metavar="OTHER", help="another checkpoint to measure on the same text")
    add_text(parser)
    parser.add_argument(
        "--full", action="store_true", help="also the expensive metrics (Jacobians, all swaps, all single drops)"
    )
    parser.add_argument(
        "--num-sequences",
        type=int,
        metavar="N",
        help="number of windows, spread evenly over the text (default: 16, or as many as the text has)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="T",
        help="tokens per window (default: 128, or the context length if that is smaller)",
    )
    add_batch_size(parser, "windows", BATCH_SIZE)
    add_dtype(parser, "float32")
    add_device(parser)
    add_revision(parser, of="MODEL on the Hub")
    add_remote_code(parser)
    add_overwrite(parser, "discard an existing report in that folder")


def run_report(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Returns:
        The exit code.

    Raises:
        UserError: if an argument is invalid, or as in the functions that do the work.
    """
    check_values(
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        dtype=args.dtype,
    )
    text, text_name = _text(args.text)
    options = ReportOptions(
        model=args.model,
        # Shells leave `--out=~/x` as it is.
        out=user_path(args.out),
        text=text,
        text_name=text_name,
        compare=args.compare,
        peft=args.peft,
        revision=args.revision,
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        full=args.full,
        overwrite=args.overwrite,
        progress=args.progress,
    )
    # Before torch is imported, so that most mistakes are reported without delay.
    check_models(options)

    from ..checkpoints.devices import check_device
    from ..eval.report.run import write_report

    check_device(options.device)
    with advice_after_interrupt("the same command continues the report"):
        report = write_report(options)
    _print(report, options.out, as_json=args.json)
    return 0


def _print(report: Report, out: Path, *, as_json: bool) -> None:
    """Print the summary and the paths of the files."""
    from ..eval.report.report_folder import FIGURES, PAGE, REPORT
    from ..eval.report.summary import summary_rows
    from ..utils.text_table import table

    names = [model.name for model in report.models]
    rows = summary_rows(report.models)
    if as_json:
        files = {"page": str(out / PAGE), "report": str(out / REPORT), "figures": str(out / FIGURES)}
        summary = {row.title: dict(zip(names, row.values, strict=True)) for row in rows}
        failed = {model.name: model.failed for model in report.models}
        print(json.dumps({**files, "summary": summary, "left_out": failed}, indent=2))
    else:
        print(table([["", *names], *([row.title, *row.values] for row in rows)]))
        print(f"\nreport: {out / PAGE}")


def _text(path: Path | None) -> tuple[str, str]:
    """Return the text and its name."""
    if path is None:
        from ..eval.verify.default_text import DEFAULT_TEXT

        return DEFAULT_TEXT, "built-in passage"
    return read_text(path), path.name
