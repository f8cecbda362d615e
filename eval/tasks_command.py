"""`depthattn eval MODEL --suite` and `--tasks`: runs lm-eval's tasks in a folder of their own, and prints a table."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from ..conversion.paths import user_path
from .command_arguments import default_run_folder, find_model, is_local, usable_device
from .eval_command import names_of
from .harness.suites import load_suite
from .result_files import json_text


def run_tasks(args: argparse.Namespace) -> int:
    """Run the tasks of `args.suite` or `args.tasks`.

    Args:
        args: of `depthattn eval`.

    Returns:
        The exit code.

    Raises:
        ConversionError: see the modules that it calls.
    """
    # In this order: what can be wrong is found before the model is loaded, and nothing is written before that.
    from .harness.environment import go_offline
    from .harness.task_results import RunFolder
    from .harness.tasks import check_local_names, load_tasks
    from .harness.tasks import is_local as is_local_data

    suite = load_suite(args.suite, local=args.offline) if args.suite else None
    names = names_of(args.tasks)
    check_local_names(names)
    if suite and args.exclude:
        suite = suite.without(names_of(args.exclude))
    if is_local_data(suite, names) and is_local(args.model):
        go_offline()
    folder = find_model(args.model, args.revision)
    device = usable_device(args.device)
    from ..conversion.model_loading import check_checkpoint

    check_checkpoint(folder, name=args.model, trust_remote_code=args.trust_remote_code)
    manager = load_tasks(suite, names, confirm_run_unsafe_code=args.confirm_run_unsafe_code)

    parts = [args.suite or "+".join(names), *(["offline"] if args.offline else [])]
    parts += [f"limit{args.limit}"] if args.limit else []
    out = args.out or default_run_folder(args.model, parts)
    run = RunFolder(out, _run_settings(args, folder, suite, names), overwrite=args.overwrite)
    results = run.results() or _evaluate(args, folder, device, manager, run)
    return _report(args, suite, run, results)


def _run_settings(args: argparse.Namespace, folder: Path, suite: Any, names: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    import hf_depthattn

    from .harness.task_results import fingerprint

    return {
        "model": str(folder.resolve()) if is_local(args.model) else args.model,
        # A Hub repository lies in a folder that is called by its commit.
        "commit": None if is_local(args.model) else folder.name,
        "model_fingerprint": fingerprint(folder),
        "peft": args.peft,
        "peft_fingerprint": fingerprint(user_path(args.peft)) if args.peft else None,
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


def _evaluate(args: argparse.Namespace, folder: Path, device: str, manager: Any, run: Any) -> dict[str, Any]:
    from .harness.evaluation import ModelSettings, build_model, evaluate
    from .harness.journal import ResponseJournal

    settings = ModelSettings(
        pretrained=str(folder),
        peft=args.peft,
        dtype=args.dtype,
        device=device,
        batch_size=args.batch_size if args.batch_size == "auto" else int(args.batch_size),
        max_length=args.max_length,
        trust_remote_code=args.trust_remote_code,
    )
    journal = ResponseJournal(run.responses)
    try:
        if journal.num_loaded:
            print(f"continues: {journal.num_loaded} responses are there already", file=sys.stderr)
        tracker = run.tracker()
        results = evaluate(
            build_model(settings, journal, progress=args.progress),
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


def _report(args: argparse.Namespace, suite: Any, run: Any, results: dict[str, Any]) -> int:
    from .harness.table import suite_table, tasks_table

    text = suite_table(suite, results) if suite else tasks_table(results)
    run.write_table(text)
    if args.json:
        values = {**results["results"], **results.get("groups", {})}
        print(json_text({"out": str(run.path), "results_file": str(run.results_file()), "results": values}).rstrip())
    else:
        print(text)
        print(f"in {run.path}")
    return 0
