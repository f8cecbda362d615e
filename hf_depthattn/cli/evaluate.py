"""The subcommand `depthattn eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints.adapter_files import adapter_folder
from ..errors import UserError
from ..eval.harness.suites import LOCAL_SUFFIX, SUITES
from ..utils.argument_checks import check_at_least
from ..utils.paths import user_path
from ..utils.result_files import json_text
from .options import Commands, add_command
from .run_command import EXIT_OK, advice_after_interrupt


def add_eval(commands: Commands) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = add_command(
        commands,
        "eval",
        run_eval,
        help="run lm-eval's tasks or measure perplexity, and compare two runs",
        description="Runs a suite of lm-eval tasks on any causal language model, stock or with depth attention, and "
        "sets the numbers beside those of the papers. An interrupted run continues when the same command is given.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub id of a checkpoint")
    what = parser.add_argument_group("what to do, one of").add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", metavar="SUITE", help=f"a list of benchmarks: {', '.join(SUITES)}")
    what.add_argument("--tasks", metavar="NAMES", help="tasks or groups of lm-eval or of this package, with commas")
    what.add_argument(
        "--perplexity",
        metavar="SOURCE",
        nargs="+",
        help="perplexity and bits per byte of texts: files, folders, .jsonl or .json with a field text, data sets as "
        "hf:ID[@CONFIG]:SPLIT[:COLUMN]; NAME=SOURCE names one",
    )
    what.add_argument(
        "--compare",
        metavar=("RUN_A", "RUN_B"),
        nargs=2,
        type=Path,
        help="paired differences of two runs, of tasks by item or of --perplexity by document, with standard errors",
    )
    _add_task_options(parser.add_argument_group("tasks"))
    _add_perplexity_options(parser.add_argument_group("perplexity"))
    _add_model_options(parser.add_argument_group("model"))
    parser.add_argument("--out", metavar="PATH", type=Path, help="folder of the run (default: eval_results/MODEL-...)")
    parser.add_argument("--overwrite", action="store_true", help="discard an existing run in that folder")


def _add_task_options(group: Any) -> None:
    group.add_argument(
        "--offline",
        action="store_true",
        help="only the part of the suite whose data are in DEPTHATTN_DATA; no network",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task, for testing")
    group.add_argument("--exclude", metavar="NAMES", help="benchmarks or tasks of the suite to leave out, with commas")
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="length of generated answers (default: the task's own)"
    )
    group.add_argument(
        "--confirm_run_unsafe_code",
        "--confirm-run-unsafe-code",
        action="store_true",
        help="lm-eval's flag: HumanEval and MBPP run code that the model writes, in a process with limits on time and "
        "memory but with your rights",
    )


def _add_perplexity_options(group: Any) -> None:
    group.add_argument(
        "--window", type=int, metavar="W", help="tokens read at once (default: the model's limit, at most 2048)"
    )
    group.add_argument("--stride", type=int, metavar="S", help="distance of the windows (default: half a window)")


def _add_model_options(group: Any) -> None:
    group.add_argument("--peft", metavar="ADAPTER", help="folder of a PEFT adapter on top of MODEL")
    group.add_argument(
        "--dtype", default="auto", help="auto (default, the checkpoint's own), float32, bfloat16, float16"
    )
    group.add_argument("--device", help="where the model runs (default: cuda if there is one, else cpu)")
    group.add_argument("--batch-size", default="8", metavar="B", help="requests per forward pass (8), or auto")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens read at once (default: the model's limit)")
    group.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    group.add_argument("--trust-remote-code", action="store_true", help="for a checkpoint that brings its own code")


def run_eval(args: argparse.Namespace) -> int:
    """Run the subcommand.

    Returns:
        The exit code.

    Raises:
        UserError: see the modules that it calls.
    """
    if args.out is not None:
        # Shells leave `--out=~/x` as it is.
        args.out = user_path(args.out)
    if args.compare:
        from ..eval.harness.compare import compare_results

        comparison = compare_results(*args.compare)
        print(json_text(comparison.to_dict()).rstrip() if args.json else comparison)
        return EXIT_OK
    _check(args)
    with advice_after_interrupt("the same command continues the run"):
        return _run_perplexity(args) if args.perplexity else _run_tasks(args)


# The implementations are imported when they run: mistakes in arguments do not wait for them.


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
            batch_size=args.batch_size if args.batch_size == "auto" else int(args.batch_size),
            max_length=args.max_length,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            out=args.out,
            overwrite=args.overwrite,
            progress=args.progress,
        )
    )
    if args.json:
        report = {"out": str(run.folder), "results_file": str(run.results_file), "results": run.values()}
        print(json_text(report).rstrip())
    else:
        print(f"{run.table}\nin {run.folder}")
    return EXIT_OK


def _run_perplexity(args: argparse.Namespace) -> int:
    from ..eval.perplexity_results import report_table, without_documents
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
            batch_size=8 if args.batch_size == "auto" else int(args.batch_size),
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            out=args.out,
            overwrite=args.overwrite,
            progress=args.progress,
        )
    )
    if args.json:
        print(json_text(without_documents(run.report)).rstrip())
    else:
        print(f"{report_table(run.report)}\n\nin {run.file}")
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    if args.model is None:
        raise UserError("MODEL: is missing; give a folder or a Hub id.")
    names = ("limit", "max_new_tokens", "window", "stride", "max_length")
    check_at_least({name: getattr(args, name) for name in names}, 1)
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size) >= 1):
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1, or auto.")
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {args.dtype}: must be one of auto, float32, bfloat16, float16.")
    if args.peft is not None:
        adapter_folder(args.peft)
    _refuse_ignored(args)
    if args.tasks is not None and not _names(args.tasks):
        raise UserError(f"--tasks {args.tasks}: names nothing; give tasks or groups with commas.")
    if args.exclude and not args.suite:
        raise UserError(f"--exclude {args.exclude}: only for --suite.")
    if args.offline and args.tasks:
        raise UserError(f"--offline: only for --suite; local tasks are called NAME{LOCAL_SUFFIX}.")


def _refuse_ignored(args: argparse.Namespace) -> None:
    """An option that would be ignored without a word."""
    of_tasks = ("offline", "limit", "max_new_tokens", "confirm_run_unsafe_code")
    names, where = (of_tasks, "--suite and --tasks") if args.perplexity else (("window", "stride"), "--perplexity")
    for name in names:
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')}: only for {where}.")


def _names(argument: str | None) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(name.strip() for name in (argument or "").split(",") if name.strip())
