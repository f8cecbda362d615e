"""Run a suite or tasks of lm-eval on a checkpoint, with results in one folder."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...checkpoints.adapter_files import adapter_folder
from ...checkpoints.source_folder import find_checkpoint
from ...errors import UserError
from ...utils.argument_checks import AUTO, DTYPES, check_at_least, check_batch_size, check_dtype
from ...utils.paths import user_path
from ..model_folder import default_run_folder, fingerprint, is_local, usable_device
from ..offline import go_offline
from .evaluation import ModelSettings, build_model, evaluate
from .journal import ResponseJournal
from .suites import LOCAL_SUFFIX, Suite, load_suite
from .table import suite_table, tasks_table
from .task_folder import TaskFolder
from .tasks import check_local_names, is_local_data, load_tasks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of `run_tasks`.

    Attributes:
        model: folder or Hub id of a checkpoint.
        suite: name of a suite in `suites.SUITES`, or None.
        tasks: tasks, groups or tags, if no suite is given.
        exclude: benchmarks or tasks of the suite to skip.
        offline: use the variant of the suite that reads local data.
        limit: number of items per task; all by default.
        max_new_tokens: length of generated answers; by default that of the task.
        confirm_run_unsafe_code: allow tasks that run generated code.
        peft: folder of a PEFT adapter for the model.
        dtype: dtype of the weights; `"auto"` uses that of the checkpoint.
        device: device of the model; by default a GPU if one is available.
        batch_size: requests per forward pass, or `"auto"`.
        max_length: context length; by default `max_position_embeddings` of the config.
        revision: branch, tag or commit of a Hub repository.
        trust_remote_code: allow code that is part of the checkpoint.
        out: folder of the run; by default a folder in `eval_results`.
        overwrite: discard an existing run in the folder instead of resuming it.
        progress: as in `utils.progress.progress_bar`.
    """

    model: str
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    offline: bool = False
    limit: int | None = None
    max_new_tokens: int | None = None
    confirm_run_unsafe_code: bool = False
    peft: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_size: int | str = 8
    max_length: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    out: Path | None = None
    overwrite: bool = False
    progress: bool | None = None

    def check(self) -> None:
        """Check the values, without torch.

        Raises:
            UserError: if one is invalid, or is not allowed with another one.
        """
        names = ("limit", "max_new_tokens", "max_length")
        check_at_least({name: getattr(self, name) for name in names}, 1)
        check_batch_size(self.batch_size)
        check_dtype(self.dtype, (AUTO, *DTYPES))
        if self.peft is not None:
            adapter_folder(self.peft)
        if (self.suite is None) == (not self.tasks):
            raise UserError("--suite, --tasks: give one of them.")
        if self.exclude and self.suite is None:
            raise UserError(f"--exclude {','.join(self.exclude)}: only allowed with --suite.")
        if self.offline and self.suite is None:
            raise UserError(f"--offline: only allowed with --suite; names of local tasks are NAME{LOCAL_SUFFIX}.")


class TaskRun(NamedTuple):
    """Result of `run_tasks`.

    Attributes:
        folder: folder of the run.
        results_file: lm-eval's results file.
        results: content of the results file.
        table: the Markdown table.
    """

    folder: Path
    results_file: Path
    results: dict[str, Any]
    table: str

    def values(self) -> dict[str, dict[str, Any]]:
        """Return the metrics of each task and group."""
        return {**self.results["results"], **self.results.get("groups", {})}


def run_tasks(options: TaskOptions) -> TaskRun:
    """Run tasks or resume an interrupted run; a complete run is only read.

    Args:
        options: model, tasks and output folder.

    Raises:
        UserError: if the options, the data or the checkpoint are invalid.
    """
    # Check everything before the model is loaded, and write nothing before the checks.
    options.check()
    suite = load_suite(options.suite, local=options.offline) if options.suite is not None else None
    check_local_names(options.tasks)
    if suite and options.exclude:
        suite = suite.without(options.exclude)
    if is_local_data(suite, options.tasks) and is_local(options.model):
        go_offline()
    folder = find_checkpoint(options.model, options.revision)
    device = usable_device(options.device)
    # Imported late because it imports torch: the checks above report mistakes without that delay.
    from ...checkpoints.model_loading import check_checkpoint

    check_checkpoint(folder, name=options.model, trust_remote_code=options.trust_remote_code)
    manager = load_tasks(suite, options.tasks, confirm_run_unsafe_code=options.confirm_run_unsafe_code)
    out = options.out or default_run_folder(options.model, _name_parts(options))
    run_folder = TaskFolder(out, _deciding_settings(options, folder, suite), overwrite=options.overwrite)
    results = run_folder.results() or _evaluate(options, folder, device, manager, run_folder)
    table = suite_table(suite, results) if suite else tasks_table(results)
    run_folder.write_table(table)
    results_file = run_folder.results_file()
    assert results_file is not None, "a complete run has results"
    return TaskRun(run_folder.path, results_file, results, table)


def _name_parts(options: TaskOptions) -> list[str]:
    """Return the parts of the default folder name after the model."""
    parts = [options.suite or "+".join(options.tasks)]
    parts += ["offline"] if options.offline else []
    return parts + ([f"limit{options.limit}"] if options.limit else [])


def _deciding_settings(options: TaskOptions, folder: Path, suite: Suite | None) -> dict[str, Any]:
    """Return the settings that determine the numbers, as JSON values."""
    import hf_depthattn

    return {
        "model": str(folder.resolve()) if is_local(options.model) else options.model,
        # The cache folder of a Hub repository is named after its commit.
        "commit": None if is_local(options.model) else folder.name,
        "model_fingerprint": fingerprint(folder),
        "peft": options.peft,
        "peft_fingerprint": fingerprint(user_path(options.peft)) if options.peft else None,
        "dtype": options.dtype,
        "max_length": options.max_length,
        "tasks": list(suite.members if suite else options.tasks),
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "versions": {
            "hf_depthattn": hf_depthattn.__version__,
            **{name: version(name) for name in ("lm_eval", "transformers", "torch", "datasets")},
        },
    }


def _evaluate(
    options: TaskOptions, folder: Path, device: str, manager: TaskManager, run_folder: TaskFolder
) -> dict[str, Any]:
    settings = ModelSettings(
        pretrained=str(folder),
        peft=options.peft,
        dtype=options.dtype,
        device=device,
        batch_size=options.batch_size,
        max_length=options.max_length,
        trust_remote_code=options.trust_remote_code,
    )
    journal = ResponseJournal(run_folder.responses)
    try:
        if journal.num_loaded:
            print(f"resuming: {journal.num_loaded} responses are stored already", file=sys.stderr)
        tracker = run_folder.tracker()
        results = evaluate(
            build_model(settings, journal, progress=options.progress),
            manager,
            # Results name the Hub repository, not the local cache folder.
            dataclasses.replace(settings, pretrained=options.model),
            limit=options.limit,
            confirm_run_unsafe_code=options.confirm_run_unsafe_code,
            gen_kwargs={"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None,
            tracker=tracker,
        )
    finally:
        journal.close()
    return run_folder.finish(tracker, results)
