"""The subcommand `depthattn eval`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from ..eval.harness.suites import SUITES
from ..utils.argument_checks import AUTO
from ..utils.paths import user_path
from ..utils.result_files import json_text
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
)
from .run_command import EXIT_OK, advice_after_interrupt


def add_eval(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "eval",
        run_eval,
        help="run lm-eval tasks, measure perplexity, or compare two runs",
        description="Run lm-eval tasks or measure perplexity on any causal language model, stock or with depth "
        "attention, or compare two runs. Suites show their results next to those of the papers. To continue an "
        "interrupted run, give the same command again.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub id of a checkpoint")
    what = parser.add_argument_group("action (exactly one)").add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", metavar="SUITE", help=f"a list of benchmarks: {', '.join(SUITES)}")
    what.add_argument("--tasks", metavar="NAMES", help="comma-separated tasks or groups of lm-eval or this package")
    what.add_argument(
        "--perplexity",
        metavar="SOURCE",
        nargs="+",
        help="perplexity and bits per byte of texts: files, folders, .jsonl or .json files with a field 'text', or "
        "data sets as hf:ID[@CONFIG]:SPLIT[:COLUMN]; NAME=SOURCE sets the name of a source",
    )
    what.add_argument(
        "--compare",
        metavar=("RUN_A", "RUN_B"),
        nargs=2,
        type=Path,
        help="paired differences between two runs, per item for tasks or per document for --perplexity, with standard "
        "errors",
    )
    _add_task_options(parser.add_argument_group("tasks"))
    _add_perplexity_options(parser.add_argument_group("perplexity"))
    _add_model_options(parser.add_argument_group("model"))
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="folder of the run, or a .json file with --perplexity (default: eval_results/MODEL-...)",
    )
    parser.add_argument(
        "--update-card",
        action="store_true",
        help="write the results into README.md of MODEL, a local folder, and those of benchmarks of the Hub into "
        ".eval_results/",
    )
    add_overwrite(parser, "discard an existing run in the folder instead of resuming it")


def _add_task_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--offline",
        action="store_true",
        help="run only the tasks of the suite whose data is in the folder DEPTHATTN_DATA, without network access",
    )
    group.add_argument("--limit", type=int, metavar="N", help="use only the first N items of each task, for testing")
    group.add_argument("--exclude", metavar="NAMES", help="comma-separated benchmarks or tasks of the suite to skip")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="length of generated answers (default: set by the task)"
    )
    group.add_argument(
        "--confirm_run_unsafe_code",
        "--confirm-run-unsafe-code",
        action="store_true",
        help="allow HumanEval and MBPP to run code written by the model, in a process with limits on time and memory "
        "but with your permissions (the flag of lm-eval)",
    )


def _add_perplexity_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--window", type=int, metavar="W", help="tokens per window (default: the model's limit, at most 2048)"
    )
    group.add_argument("--stride", type=int, metavar="S", help="step between windows in tokens (default: W / 2)")


def _add_model_options(group: argparse._ArgumentGroup) -> None:
    add_peft(group, "load")
    add_dtype(group, AUTO)
    add_device(group, of="the model", default=None)
    add_batch_size(group, "requests (windows with --perplexity)", 8, auto=True)
    group.add_argument(
        "--max-length", type=int, metavar="N", help="maximum number of tokens per request (default: the model's limit)"
    )
    add_revision(group)
    add_remote_code(group)


def run_eval(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Returns:
        The exit code.

    Raises:
        UserError: if an argument is invalid, or as in the functions that do the work.
    """
    if args.out is not None:
        # Shells leave `--out=~/x` as it is.
        args.out = user_path(args.out)
    if args.compare and args.update_card:
        raise UserError("--update-card: not allowed with --compare.")
    if args.compare:
        from ..eval.harness.compare import compare_results

        comparison = compare_results(*args.compare)
        print(json_text(comparison.to_dict()).rstrip() if args.json else comparison)
        return EXIT_OK
    _check(args)
    with advice_after_interrupt("the same command continues the run"):
        return _run_perplexity(args) if args.perplexity else _run_tasks(args)


# Imported inside the functions, so that mistakes in arguments are reported without delay.


def _run_tasks(args: argparse.Namespace) -> int:
    from ..eval.harness.run import TaskOptions, run_tasks

    run = run_tasks(
        TaskOptions(
            model=args.model,
            suite=args.suite,
            tasks=_names(args.tasks),
            exclude=_names(args.exclude),
            offline=args.offline,
            limit=args.limit,
            max_new_tokens=args.max_new_tokens,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            peft=args.peft,
            dtype=args.dtype,
            device=args.device,
            batch_size=args.batch_size,
            max_length=args.max_length,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            out=args.out,
            overwrite=args.overwrite,
            progress=args.progress,
        )
    )
    if args.update_card:
        from ..eval.card import update_card
        from ..eval.harness.card_results import benchmark_results, card_results

        update_card(
            args.model,
            card_results(run.results),
            benchmarks=benchmark_results(run.results),
            section=args.suite or args.tasks,
            table=f"#{run.table}",
        )
    if args.json:
        report = {"out": str(run.folder), "results_file": str(run.results_file), "results": run.values()}
        print(json_text(report).rstrip())
    else:
        print(f"{run.table}\nin {run.folder}")
    return EXIT_OK


def _run_perplexity(args: argparse.Namespace) -> int:
    from ..eval.perplexity_run import PerplexityOptions, run_perplexity

    run = run_perplexity(
        PerplexityOptions(
            model=args.model,
            sources=tuple(args.perplexity),
            window=args.window,
            stride=args.stride,
            max_length=args.max_length,
            peft=args.peft,
            dtype=args.dtype,
            device=args.device,
            batch_size=args.batch_size,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            out=args.out,
            overwrite=args.overwrite,
            progress=args.progress,
        )
    )
    if args.update_card:
        from ..eval.card import update_card
        from ..eval.perplexity_card import card_results

        table = f"## Perplexity\n\n```\n{run.report.to_table()}\n```"
        section = f"perplexity of {', '.join(run.report.domains)}"
        update_card(args.model, card_results(run.report), section=section, table=table)
    if args.json:
        print(json_text(run.report.to_dict(documents=False)).rstrip())
    else:
        print(f"{run.report.to_table()}\n\nin {run.file}")
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    """Check what only the command line knows: MODEL, and options of the other action, which would be ignored."""
    if args.model is None:
        raise UserError("MODEL: is missing; give a folder or a Hub id.")
    of_tasks = ("offline", "limit", "max_new_tokens", "confirm_run_unsafe_code")
    of_perplexity = ("window", "stride")
    names, where = (of_tasks, "--suite and --tasks") if args.perplexity else (of_perplexity, "--perplexity")
    for name in names:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: only allowed with {where}.")
    if args.perplexity and args.exclude:
        raise UserError(f"--exclude {args.exclude}: only allowed with --suite.")
    if args.update_card:
        _check_card(args)
    if args.tasks is not None and not _names(args.tasks):
        raise UserError(f"--tasks {args.tasks}: contains no name; give comma-separated tasks or groups.")


def _check_card(args: argparse.Namespace) -> None:
    """Check that the results are those of the whole tasks and of the model alone, and that it has a card."""
    for name in ("limit", "peft"):
        if getattr(args, name) is not None:
            raise UserError(f"--update-card: not allowed with --{name}.")
    from ..eval.card import read_card

    read_card(args.model)


def _names(argument: str | None) -> tuple[str, ...]:
    """Return the names in a comma-separated list."""
    return tuple(name.strip() for name in (argument or "").split(",") if name.strip())
