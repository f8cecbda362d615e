"""The subcommand `depthattn eval`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from hf_depthattn.conversion.checkpoint_files import ConversionError
from hf_depthattn.eval.lm_eval_suites import LOCAL_SUFFIX, SUITES, load_suite

_INTERRUPTED = 130


def add_eval(commands: Any) -> None:
    """Add the subcommand to the parser of `depthattn`."""
    parser = commands.add_parser(
        "eval",
        help="run lm-eval's tasks or measure perplexity, and compare two runs",
        description="Runs a suite of lm-eval tasks on any causal language model, stock or with depth attention, and "
        "sets the numbers beside those of the papers. An interrupted run continues when the same command is given.",
        epilog="Exit codes: 0 done, 2 something to put right (said in one line), 130 interrupted.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_eval)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or Hub id of a checkpoint")
    what = parser.add_argument_group("what to do, one of").add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", metavar="SUITE", help=f"a list of benchmarks: {', '.join(SUITES)}")
    what.add_argument("--tasks", metavar="NAMES", help="tasks or groups of lm-eval or of this package, with commas")
    what.add_argument(
        "--perplexity",
        metavar="SOURCE",
        nargs="+",
        help="perplexity and bits per byte of texts: files, folders, .jsonl with a field text, or data sets as "
        "hf:ID[@CONFIG]:SPLIT[:COLUMN]; NAME=SOURCE names one",
    )
    what.add_argument(
        "--compare",
        metavar=("RUN_A", "RUN_B"),
        nargs=2,
        type=Path,
        help="paired differences of two folders of results, with a standard error per task",
    )
    _add_task_options(parser.add_argument_group("tasks"))
    _add_perplexity_options(parser.add_argument_group("perplexity"))
    _add_model_options(parser.add_argument_group("model"))
    parser.add_argument("--out", metavar="PATH", type=Path, help="folder of the run (default: eval_results/MODEL-...)")
    parser.add_argument("--overwrite", action="store_true", help="forget a run that lies there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bars on stderr (default: on a terminal)",
    )


def _add_task_options(group: Any) -> None:
    group.add_argument(
        "--offline", action="store_true", help="the part of the suite that lies in DEPTHATTN_DATA; no network"
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
        ConversionError: see the modules that it calls.
    """
    if args.compare:
        from hf_depthattn.eval.lm_eval_compare import compare_runs

        comparison = compare_runs(*args.compare)
        print(json.dumps(comparison.to_dict(), indent=2) if args.json else comparison)
        return 0
    _check(args)
    try:
        return _run_perplexity(args) if args.perplexity else _run_tasks(args)
    except KeyboardInterrupt:
        print("depthattn: interrupted; the same command continues the run", file=sys.stderr)
        return _INTERRUPTED


def _check(args: argparse.Namespace) -> None:
    if args.model is None:
        raise ConversionError("MODEL: is missing; give a folder or a Hub id.")
    for name in ("limit", "max_new_tokens", "window", "stride", "max_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConversionError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size) >= 1):
        raise ConversionError(f"--batch-size {args.batch_size}: must be at least 1, or auto.")
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConversionError(f"--dtype {args.dtype}: must be one of auto, float32, bfloat16, float16.")
    if args.peft is not None:
        from hf_depthattn.conversion.adapter_loading import adapter_folder

        adapter_folder(args.peft)
    _refuse_ignored(args)
    if args.tasks is not None and not _names(args.tasks):
        raise ConversionError(f"--tasks {args.tasks}: names nothing; give tasks or groups with commas.")
    if args.exclude and not args.suite:
        raise ConversionError(f"--exclude {args.exclude}: has a meaning with --suite only.")
    if args.offline and args.tasks:
        raise ConversionError(
            f"--offline: has a meaning with --suite only; local tasks are called NAME{LOCAL_SUFFIX}."
        )


def _refuse_ignored(args: argparse.Namespace) -> None:
    """An option that would be ignored without a word."""
    of_tasks = ("offline", "limit", "max_new_tokens", "confirm_run_unsafe_code")
    names, where = (of_tasks, "--suite and --tasks") if args.perplexity else (("window", "stride"), "--perplexity")
    for name in names:
        if getattr(args, name):
            raise ConversionError(f"--{name.replace('_', '-')}: has a meaning with {where} only.")


def _run_tasks(args: argparse.Namespace) -> int:
    # In this order: what can be wrong is found before the model is loaded, and nothing is written before that.
    from hf_depthattn.conversion.model_loading import check_checkpoint
    from hf_depthattn.conversion.sources import find_folder
    from hf_depthattn.eval.lm_eval_run import go_offline, load_tasks
    from hf_depthattn.eval.lm_eval_run_folder import RunFolder, default_run_folder

    suite = load_suite(args.suite, local=args.offline) if args.suite else None
    names = _names(args.tasks)
    if suite and args.exclude:
        suite = suite.without(_names(args.exclude))
    if suite.is_local if suite else all(name.endswith(LOCAL_SUFFIX) for name in names):
        if Path(args.model).expanduser().is_dir():
            go_offline()
    folder, _ = find_folder(args.model, args.revision)
    check_checkpoint(folder, name=args.model, trust_remote_code=args.trust_remote_code)
    manager = load_tasks(suite, names, confirm_run_unsafe_code=args.confirm_run_unsafe_code)

    parts = [args.suite or "+".join(names), *(["offline"] if args.offline else [])]
    parts += [f"limit{args.limit}"] if args.limit else []
    out = args.out or default_run_folder(args.model, parts)
    run = RunFolder(out, _run_settings(args, folder, suite, names), overwrite=args.overwrite)
    done = run.results_file()
    results = json.loads(done.read_text(encoding="utf-8")) if done else _evaluate(args, folder, manager, run)
    return _report(args, suite, run, results)


def _names(argument: str | None) -> list[str]:
    return [name.strip() for name in (argument or "").split(",") if name.strip()]


def _run_settings(args: argparse.Namespace, folder: Path, suite: Any, names: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    import hf_depthattn
    from hf_depthattn.eval.lm_eval_run_folder import fingerprint

    return {
        "model": str(folder.resolve()) if Path(args.model).expanduser().is_dir() else args.model,
        # A Hub repository lies in a folder that is called by its commit.
        "commit": None if Path(args.model).expanduser().is_dir() else folder.name,
        "model_fingerprint": fingerprint(folder),
        "peft": args.peft,
        "peft_fingerprint": fingerprint(Path(args.peft).expanduser()) if args.peft else None,
        "dtype": args.dtype,
        "max_length": args.max_length,
        "tasks": list(suite.members) if suite else names,
        "limit": args.limit,
        "max_new_tokens": args.max_new_tokens,
        "versions": {
            "hf_depthattn": hf_depthattn.__version__,
            **{name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")},
        },
    }


def _evaluate(args: argparse.Namespace, folder: Path, manager: Any, run: Any) -> dict[str, Any]:
    from hf_depthattn.eval.lm_eval_journal import ResponseJournal
    from hf_depthattn.eval.lm_eval_run import ModelSettings, build_model, evaluate

    settings = ModelSettings(
        pretrained=str(folder),
        peft=args.peft,
        dtype=args.dtype,
        device=_device(args.device),
        batch_size=args.batch_size if args.batch_size == "auto" else int(args.batch_size),
        max_length=args.max_length,
        trust_remote_code=args.trust_remote_code,
    )
    journal = ResponseJournal(run.responses)
    try:
        if journal.num_loaded:
            print(f"continues: {journal.num_loaded} responses are there already", file=sys.stderr)
        progress = sys.stderr.isatty() if args.progress is None else args.progress
        tracker = run.tracker()
        results = evaluate(
            build_model(settings, journal, progress=progress),
            manager,
            # Results name the Hub repository, not the folder of this machine's cache.
            dataclasses.replace(settings, pretrained=args.model),
            limit=args.limit,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
            gen_kwargs={"max_gen_toks": args.max_new_tokens} if args.max_new_tokens else None,
            tracker=tracker,
        )
    finally:
        journal.close()
    return run.finish(tracker, results)


def _device(named: str | None) -> str:
    import torch

    from hf_depthattn.conversion.devices import check_device

    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def _report(args: argparse.Namespace, suite: Any, run: Any, results: dict[str, Any]) -> int:
    from hf_depthattn.eval.lm_eval_table import suite_table, tasks_table

    text = suite_table(suite, results) if suite else tasks_table(results)
    run.write_table(text)
    if args.json:
        values = {**results["results"], **results.get("groups", {})}
        print(json.dumps({"out": str(run.path), "results_file": str(run.results_file()), "results": values}, indent=2))
    else:
        print(text)
        print(f"in {run.path}")
    return 0


def _run_perplexity(args: argparse.Namespace) -> int:
    from hf_depthattn.conversion.sources import find_folder
    from hf_depthattn.eval.perplexity_command import run_perplexity

    return run_perplexity(args, find_folder(args.model, args.revision)[0], _device(args.device))
