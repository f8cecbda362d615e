"""Run lm-eval's `simple_evaluate` on a checkpoint, with a journal of responses."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...errors.messages import one_line

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from .journal import ResponseJournal
    from .model import DepthAttnLM


# For the standard error of LAMBADA's perplexity: lm-eval's default of 100,000 takes minutes in one process. 0 would
# disable the standard errors of all metrics.
_BOOTSTRAP_ITERS = 1000


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Settings that determine the responses of a model.

    Attributes:
        pretrained: folder of the checkpoint.
        peft: folder of a PEFT adapter for the model.
        dtype: dtype of the weights; `"auto"` uses that of the checkpoint.
        device: device of the model.
        batch_size: requests per forward pass, or `"auto"`.
        max_length: context length; by default `max_position_embeddings` of the config.
        trust_remote_code: allow code that is part of the checkpoint.
    """

    pretrained: str
    peft: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    batch_size: int | str = 1
    max_length: int | None = None
    trust_remote_code: bool = False

    def hflm_arguments(self) -> dict[str, Any]:
        """Return the settings as keyword arguments of lm-eval's `HFLM`."""
        arguments = dataclasses.asdict(self)
        return {name: value for name, value in arguments.items() if value is not None}


def build_model(settings: ModelSettings, journal: ResponseJournal, *, progress: bool | None) -> DepthAttnLM:
    """Load a checkpoint as an lm-eval model.

    Args:
        settings: checkpoint and how to run it.
        journal: stores the responses.
        progress: as in `utils.progress.progress_bar`.

    Raises:
        UserError: if the checkpoint, the adapter or the tokenizer cannot be loaded.
    """
    from .model import JournalledDepthAttnLM

    try:
        return JournalledDepthAttnLM(journal, progress=progress, **settings.hflm_arguments())
    except UserError:
        raise
    except Exception as error:
        # lm-eval reads the config and the tokenizer itself; damaged ones raise errors of many classes.
        raise UserError(f"{settings.pretrained}: cannot be loaded: {one_line(error)}") from error


def evaluate(
    model: DepthAttnLM,
    manager: TaskManager,
    settings: ModelSettings,
    *,
    limit: int | None = None,
    confirm_run_unsafe_code: bool = False,
    gen_kwargs: dict[str, Any] | None = None,
    tracker: EvaluationTracker | None = None,
) -> dict[str, Any]:
    """Run lm-eval's `simple_evaluate` on a loaded model.

    Args:
        model: model from `build_model`.
        manager: task manager from `load_tasks`.
        settings: stored in the results as `model_args`.
        limit: number of items per task; all by default.
        confirm_run_unsafe_code: lm-eval's flag.
        gen_kwargs: generation arguments that override those of the tasks.
        tracker: lm-eval's writer of results.

    Returns:
        The results of lm-eval including samples.

    Raises:
        UserError: if an answer does not fit into the context.
    """
    from lm_eval import simple_evaluate

    # Check first: lm-eval generates only after scoring all log-likelihoods, which may take hours.
    tasks = manager.load([])["tasks"].values()
    generating = [task for task in tasks if task.OUTPUT_TYPE == "generate_until"]
    model.need_room([{**(task.config.generation_kwargs or {}), **(gen_kwargs or {})} for task in generating])
    with _quiet():
        results: dict[str, Any] = simple_evaluate(
            model=model,
            model_args=settings.hflm_arguments(),
            tasks=["as loaded"],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_BOOTSTRAP_ITERS,
            batch_size=settings.batch_size,
            device=settings.device,
            log_samples=True,
            gen_kwargs=gen_kwargs,
            evaluation_tracker=tracker,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    if model.num_truncated_prompts:
        print(
            f"warning: {model.num_truncated_prompts} prompts were longer than max_length={model.max_length} allows "
            "and were truncated on the left",
            file=sys.stderr,
        )
    # As if lm-eval had built the model from `--model depthattn`.
    results["config"]["model"] = "depthattn"
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output and side effects of lm-eval that have no option.

    lm-eval shows a progress bar for the prompts of every task (57 for MMLU) and for every bootstrap, which it also
    announces on stdout and runs in forks of this multi-threaded process. It calls `git describe` in the current
    folder, which prints an error outside a repository and otherwise records an unrelated commit.
    """
    import tqdm
    from lm_eval import evaluator
    from lm_eval.api import task

    no_bar = functools.partial(tqdm.tqdm, disable=True)
    # lm-eval reads this at the start of each bootstrap.
    os.environ["DISABLE_MULTIPROC"] = "1"
    with (
        _replaced(task, "tqdm", no_bar),
        _replaced(tqdm, "tqdm", no_bar),
        _replaced(evaluator, "get_git_commit_hash", lambda: None),
        redirect_stdout(io.StringIO()),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
