"""The subcommand `depthattn report`."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoints.adapter_files import adapter_folder
from ..cli.run_command import advice_after_interrupt
from ..errors import UserError
from ..utils.paths import read_text, user_path
from .command_arguments import check_at_least
from .model_folder import find_model, written_limit

_LIBRARIES = {"altair": "altair", "vl_convert": "vl-convert-python"}


def add_report(commands: Any) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = commands.add_parser(
        "report",
        help="measure what a model does with its depth, as one HTML page",
        description="Measures depth metrics of any causal language model, stock or with depth attention, and writes "
        "report.html (one file, no network), report.json and figures/*.png. An interrupted report continues when the "
        "same command is given.",
        epilog="Exit codes: 0 done, 2 something to put right (said in one line), 130 interrupted.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_report)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a checkpoint")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the report")
    parser.add_argument("--peft", metavar="ADAPTER", help="folder of a PEFT adapter on top of MODEL, merged into it")
    parser.add_argument("--compare", metavar="OTHER", help="another checkpoint, measured on the same text")
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="UTF-8 text to read (default: a built-in passage, which is short)"
    )
    parser.add_argument(
        "--full", action="store_true", help="the expensive metrics too (Jacobians, all swaps, all single drops)"
    )
    parser.add_argument(
        "--num-sequences", type=int, metavar="N", help="windows of the text, spread over it (default: 16, or all)"
    )
    parser.add_argument("--sequence-length", type=int, metavar="T", help="tokens of a window (128)")
    parser.add_argument("--batch-size", type=int, metavar="B", default=4, help="windows per forward pass (4)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="where the models run (cpu)")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a checkpoint that brings its own code")
    parser.add_argument("--overwrite", action="store_true", help="forget a report that lies there")
    parser.add_argument("--json", action="store_true", help="print where the files are and the summary as JSON")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress on stderr: a bar on a terminal, a line every few seconds elsewhere (default)",
    )


def run_report(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Returns:
        The exit code.

    Raises:
        UserError: see the modules that it calls.
    """
    _check(args)
    # Shells leave `--out=~/x` as it is.
    args.out = user_path(args.out)
    text, text_name = _text(args.text)
    # Before torch is imported: most mistakes are found here, at once.
    if args.peft is not None:
        adapter_folder(args.peft)
    folders = [(args.model, find_model(args.model, args.revision))]
    if args.compare is not None:
        folders.append((args.compare, find_model(args.compare)))
    for name, folder in folders:
        limit = written_limit(folder)
        if limit is not None and (args.sequence_length or 0) > limit:
            raise UserError(f"--sequence-length {args.sequence_length}: {name} reads {limit} tokens at most.")

    from ..checkpoints.devices import check_device
    from ..utils.text_table import table
    from .report.report_folder import FIGURES, PAGE, REPORT
    from .report.run import write_report
    from .report.subject import ReportOptions
    from .report.summary import summary_rows

    check_device(args.device)
    options = ReportOptions(
        text=text,
        text_name=text_name,
        num_sequences=args.num_sequences,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        full=args.full,
    )
    with advice_after_interrupt("the same command continues the report"):
        report = write_report(
            args.model,
            args.out,
            options,
            compare=args.compare,
            peft=args.peft,
            revision=args.revision,
            overwrite=args.overwrite,
            progress=args.progress,
        )
    parts = [part for part in (report["model"], report["compare"]) if part]
    rows = summary_rows(report)
    if args.json:
        files = {"page": str(args.out / PAGE), "report": str(args.out / REPORT), "figures": str(args.out / FIGURES)}
        summary = {row.title: dict(zip([p["name"] for p in parts], row.values, strict=True)) for row in rows}
        failed = {part["name"]: part["failed"] for part in parts}
        print(json.dumps({**files, "summary": summary, "left_out": failed}, indent=2))
    else:
        print(table([["", *(part["name"] for part in parts)], *([row.title, *row.values] for row in rows)]))
        print(f"\nreport: {args.out / PAGE}")
    return 0


def _check(args: argparse.Namespace) -> None:
    check_at_least({"num_sequences": args.num_sequences, "sequence_length": args.sequence_length}, 2)
    check_at_least({"batch_size": args.batch_size}, 1)
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {args.dtype}: must be one of float32, bfloat16, float16.")
    missing = [package for module, package in _LIBRARIES.items() if find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed; pip install 'hf-depthattn[eval]'.")


def _text(path: Path | None) -> tuple[str, str]:
    """The text, and what to call it."""
    if path is None:
        from .verify.default_text import DEFAULT_TEXT

        return DEFAULT_TEXT, "built-in passage"
    return read_text(path), path.name
