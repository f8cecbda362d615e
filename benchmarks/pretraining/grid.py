"""Train the models of the study on CPUs: every arm with several learning rates, the best one with several seeds.

    python -m benchmarks.pretraining.grid --corpus stdlib --tokens 2000000 --workers 2

Every run writes one JSON file when it is finished. A run that has a file is skipped, and a run that was interrupted
starts again, so the command can be stopped at any time and repeated. Weights are kept in `--models`, since some arms
continue the training of others; where they were not kept, these are trained again.
`python -m benchmarks.pretraining.evidence` makes tables, plots and the page.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from hf_depthattn.errors import UserError

from .arms import ARMS
from .corpora import CORPORA, read_corpus
from .plan import Plan, Study
from .results import RESULTS, Conditions, Results, check_alike, conditions, read_result, read_results
from .runs import Run, Setting
from .training import carry_out, result_file, versions

HERE = Path(__file__).resolve().parent


def train_all(study: Study, setting: Setting, results: Path, models: Path, workers: int) -> Results:
    """Train everything that has no result yet.

    Args:
        study: what is to be trained.
        setting: what all runs have in common.
        results: folder of all results.
        models: folder of all trained weights.
        workers: number of processes.

    Returns:
        All results in the folder.

    Raises:
        UserError: if the folder has results with another setting or another corpus.
    """
    found = read_results(results)
    check_alike(
        [("this command", _conditions(study, setting)), *((str(run.path), conditions(r)) for run, r in found.items())]
    )
    context = multiprocessing.get_context("spawn")
    running: dict[Future[None], tuple[Run, float]] = {}
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        while True:
            under_way = {run for run, _ in running.values()}
            missing = [run for run in Plan(study, _losses(found)).missing() if run not in under_way]
            for run in missing[: workers - len(running)]:
                running[pool.submit(carry_out, run, setting, results, models)] = run, time.monotonic()
            if not running:
                return found
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                run, started = running.pop(future)
                future.result()
                found[run] = read_result(result_file(run, results))
                seconds = time.monotonic() - started
                print(f"{run.path}: {found[run].loss:.4f} nats per byte, {seconds:.0f} s", flush=True)


def _losses(results: Results) -> dict[Run, float]:
    return {run: result.loss for run, result in results.items()}


def _conditions(study: Study, setting: Setting) -> Conditions:
    installed = versions()
    return {
        ("setting", ""): setting.to_dict(),
        ("corpus", study.corpus): read_corpus(study.corpus).facts(),
        ("version of", ""): {name: installed[name] for name in ("torch", "transformers")},
        **{("fields of arm", name): ARMS[name].fields for name in study.arms},
    }


def _end_with_parent() -> None:
    """End a worker when the command is killed: it would train on, unnoticed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: command line; that of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=CORPORA, default="stdlib", help="text; the books need DEPTHATTN_DATA")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="training budget of a run in bytes")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), metavar="ARM", help="; ".join(ARMS))
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds with the best rate")
    parser.add_argument("--depths", type=int, nargs="*", default=[], help="further numbers of layers")
    parser.add_argument("--depth-arms", nargs="*", choices=ARMS, default=[], metavar="ARM", help="arms of --depths")
    parser.add_argument("--budgets", type=int, nargs="*", default=[], help="further budgets in bytes")
    parser.add_argument("--budget-arms", nargs="*", choices=ARMS, default=[], metavar="ARM", help="arms of --budgets")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of `runs.Setting`")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--models", type=Path, default=HERE / "runs", help="folder of the trained weights")
    options = parser.parse_args(arguments)
    study = Study(
        corpus=options.corpus,
        tokens=options.tokens,
        arms=tuple(options.arms),
        num_layers=options.num_layers,
        num_seeds=options.seeds,
        depths=tuple(options.depths),
        depth_arms=tuple(options.depth_arms),
        budgets=tuple(options.budgets),
        budget_arms=tuple(options.budget_arms),
    )
    try:
        setting = Setting().with_values(options.set)
        train_all(study, setting, options.results, options.models, options.workers)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
