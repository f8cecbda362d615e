"""Runs lm-eval tasks on a checkpoint, with a journal of responses, and returns what lm-eval returns."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...conversion.checkpoint_files import ConversionError
from ...conversion.command_errors import one_line
from .suites import LOCAL_SUFFIX, TASKS_FOLDER, Suite

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from .journal import ResponseJournal
    from .model import DepthAttnLM


# For the standard error of LAMBADA's perplexity; lm-eval's 100,000 take minutes in one process. 0 would leave out the
# standard errors of all metrics.
_BOOTSTRAP_ITERS = 1000


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What decides the responses of a model.

    Args:
        pretrained: folder of the checkpoint.
        peft: folder of an adapter on top of it.
        dtype: of the weights; `"auto"` is the checkpoint's own.
        device: where the model runs.
        batch_size: requests per forward pass, or `"auto"`.
        max_length: tokens that the model reads at once; the config's limit when None.
        trust_remote_code: for a tokenizer or model that brings its own code.
    """

    pretrained: str
    peft: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    batch_size: int | str = 1
    max_length: int | None = None
    trust_remote_code: bool = False

    def hflm_arguments(self) -> dict[str, Any]:
        """As lm-eval's model classes take them."""
        arguments = dataclasses.asdict(self)
        return {name: value for name, value in arguments.items() if value is not None}


def go_offline() -> None:
    """No library asks the Hub for anything in this process, also when it was imported before."""
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    # `datasets` reads the constant when it is imported; perplexity of files does without it.
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def prepare_environment() -> None:
    """Settings that lm-eval reads when it is imported: above all, its request cache lies outside site-packages."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("LM_HARNESS_CACHE_PATH", str(cache / "hf_depthattn" / "lm_eval"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_tasks(suite: Suite | None, names: Sequence[str], *, confirm_run_unsafe_code: bool = False) -> TaskManager:
    """Build tasks with their data.

    Args:
        suite: a suite, or None.
        names: tasks, groups or tags instead of a suite.
        confirm_run_unsafe_code: whether tasks that run generated code are allowed.

    Returns:
        A task manager of lm-eval that hands out these tasks.

    Raises:
        ConversionError: a name is unknown, data are missing, or a task runs generated code without leave.
    """
    prepare_environment()
    need_lm_eval()
    # It warns once for every task with local data and for every prompt that is too long.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    # Reading lm-eval's own 13,000 files takes ten seconds, which local tasks do without.
    is_local = suite.is_local if suite else all(name.endswith(LOCAL_SUFFIX) for name in names)
    manager = TaskManager(include_path=str(TASKS_FOLDER), include_defaults=not is_local)
    if suite:
        names = [suite.group]
        entry = manager.task_index[suite.group]
        config = {**entry.cfg, "task": copy.deepcopy(list(suite.members))}
        manager.task_index[suite.group] = dataclasses.replace(entry, yaml_path=None, cfg=config)
    for name in names:
        if name not in manager.task_index:
            listed = "python -m hf_depthattn.lm_eval ls tasks"
            raise ConversionError(f"--tasks {name}: unknown; `{listed}` lists what there is.")
    if not confirm_run_unsafe_code:
        # Before anything is downloaded, and again for tasks inside of groups.
        members = [member for member in (suite.members if suite else names) if isinstance(member, str)]
        _refuse_unsafe(name for name in members if (manager.task_index[name].cfg or {}).get("unsafe_code"))
    with _one_line_errors(names):
        loaded = manager.load(list(names))
    if not confirm_run_unsafe_code:
        _refuse_unsafe(name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False))
    # `simple_evaluate` asks the manager for the tasks after it has built the model; a mistake would show up late.
    manager.load = lambda _: loaded
    return manager


def _refuse_unsafe(names: Iterable[str]) -> None:
    if unsafe := sorted(names):
        raise ConversionError(
            f"{', '.join(unsafe)}: runs code that the model writes; give --confirm_run_unsafe_code, or leave it out "
            f"(--exclude {','.join(unsafe)})."
        )


def build_model(settings: ModelSettings, journal: ResponseJournal, *, progress: bool | None) -> DepthAttnLM:
    """Load a checkpoint as a model of lm-eval.

    Args:
        settings: see there.
        journal: keeps its responses.
        progress: as in `conversion.progress.progress_bar`.

    Raises:
        ConversionError: the checkpoint, the adapter or the tokenizer cannot be loaded.
    """
    from .model import JournalledDepthAttnLM

    try:
        return JournalledDepthAttnLM(journal, progress=progress, **settings.hflm_arguments())
    except ConversionError:
        raise
    except Exception as error:
        # lm-eval reads the config and the tokenizer itself; what damaged ones raise has no common class.
        raise ConversionError(f"{settings.pretrained}: cannot be loaded: {one_line(error)}") from error


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
    """lm-eval's `simple_evaluate` on a model that exists.

    Args:
        model: of lm-eval.
        manager: from `load_tasks`.
        settings: noted in the results as `model_args`.
        limit: items per task, all when None.
        confirm_run_unsafe_code: lm-eval's flag.
        gen_kwargs: replace those of the tasks.
        tracker: lm-eval's writer of results.

    Returns:
        Its results, the samples included.

    Raises:
        ConversionError: an answer does not fit into the context.
    """
    from lm_eval import simple_evaluate

    # lm-eval generates after it has scored all log-likelihoods, which may take hours.
    tasks = manager.load([])["tasks"].values()
    generating = [task for task in tasks if task.OUTPUT_TYPE == "generate_until"]
    model.need_room([{**(task.config.generation_kwargs or {}), **(gen_kwargs or {})} for task in generating])
    with _quiet():
        results = simple_evaluate(
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
            "and lost their beginning",
            file=sys.stderr,
        )
    # The name of the class, as if lm-eval had built the model from `--model depthattn`.
    results["config"]["model"] = "depthattn"
    return results


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval does and has no switch for.

    It shows a bar for the prompts of every task, of which MMLU has 57, and for every bootstrap, which it also
    announces on stdout and runs in forks of this process with all its threads; and it calls `git describe`, which
    prints an error outside of a repository, and inside of one notes the commit of whatever lies in the current folder.
    """
    import tqdm
    from lm_eval import evaluator
    from lm_eval.api import task

    no_bar = functools.partial(tqdm.tqdm, disable=True)
    # Read whenever a bootstrap starts.
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


def need_lm_eval() -> None:
    """Refuse to go on without lm-eval.

    Raises:
        ConversionError: it is not installed.
    """
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ConversionError("lm_eval is not installed; pip install 'hf-depthattn[eval]'.")


@contextmanager
def _one_line_errors(names: Sequence[str]) -> Iterator[None]:
    """Failures of third parties while data are fetched: whatever it was, the user reads one line about it."""
    try:
        yield
    except ConversionError:
        raise
    except ImportError as error:
        what = f"{', '.join(names)}: needs the package {error.name}" if error.name else one_line(error)
        raise ConversionError(f"{what}; pip install 'lm_eval[math]' has what Math needs, or --exclude it.") from error
    except Exception as error:
        raise ConversionError(f"{', '.join(names)}: the data could not be loaded: {one_line(error)}") from error
