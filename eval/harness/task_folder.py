"""The folder of a run of tasks: its settings, the responses so far, and at the end lm-eval's files and a table.

run.json                 settings; a run with others is refused
responses.jsonl          while the run goes on
results_<time>.json      lm-eval's own file; when it is there, the run is complete
samples_<task>_<time>.jsonl
table.md
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from ...errors.messages import one_line
from ...utils.result_files import encodable, json_text, write_text
from ..run_folder import RunFolder, RunLayout

if TYPE_CHECKING:
    from lm_eval.loggers import EvaluationTracker

_RESPONSES, _TABLE, _UNCHECKED = "responses.jsonl", "table.md", ".partial"
_LAYOUT = RunLayout(
    content="run",
    settings_file="run.json",
    required_settings=frozenset({"model_fingerprint", "tasks", "versions"}),
    own_files=("run.json", _RESPONSES, _TABLE, "results_*.json", "samples_*.jsonl"),
)


class TaskFolder(RunFolder):
    """See the module.

    Args:
        path: the folder.
        settings: what decides the numbers, as JSON values.
        overwrite: discard another run in the folder.

    Raises:
        UserError: the folder holds a run with other settings, or something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        super().__init__(path, _LAYOUT, {".": settings}, overwrite=overwrite)

    def clear(self) -> None:
        super().clear()
        shutil.rmtree(self.path / _UNCHECKED, ignore_errors=True)

    @property
    def responses(self) -> Path:
        """The file of the journal."""
        return self.path / _RESPONSES

    @property
    def table(self) -> Path:
        """The Markdown table."""
        return self.path / _TABLE

    def results_file(self) -> Path | None:
        """The newest results, None while the run is incomplete."""
        return max(self.path.glob("results_*.json"), default=None)

    def results(self) -> dict[str, Any] | None:
        """The newest results, None while the run is incomplete."""
        file = self.results_file()
        if file is None:
            return None
        # Left by a process that was killed behind its last file.
        self.responses.unlink(missing_ok=True)
        return self.read(file.name)

    def tracker(self) -> EvaluationTracker:
        """lm-eval's writer, aimed at a folder inside this one."""
        from lm_eval.loggers import EvaluationTracker

        shutil.rmtree(self.path / _UNCHECKED, ignore_errors=True)
        return EvaluationTracker(output_path=str(self.path / _UNCHECKED))

    def finish(self, tracker: EvaluationTracker, results: dict[str, Any]) -> dict[str, Any]:
        """Write lm-eval's files; the results come last, and every file is complete when it has its name.

        lm-eval only logs what it could not write. So its files are read again and counted, and the responses of the
        model are kept until all of them are on the disk.

        Args:
            tracker: from `tracker`, after the run.
            results: of lm-eval, with the samples.

        Returns:
            The results as they are in the file.

        Raises:
            UserError: they could not be written; the run can be continued.
        """
        # For half a character in one of them, lm-eval leaves a whole file out.
        samples = encodable(results.pop("samples"))
        counts = {task: len(samples[task]) for task in results["configs"]}
        written: dict[str, str] = {}
        try:
            tracker.save_results_aggregated(results=results, samples=samples)
            for task in results["configs"]:
                tracker.save_results_samples(task_name=task, samples=samples[task])
            written = self._checked_files(counts)
            for file, text in written.items():
                write_text(self.path / file, text)
        except (OSError, ValueError) as error:
            # Samples without results would take the room of the next try.
            for file in written:
                (self.path / file).unlink(missing_ok=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
            raise UserError(
                f"{self.path}: the results could not be written ({reason}); the responses are kept, and the same "
                "command continues when there is room."
            ) from error
        finally:
            shutil.rmtree(self.path / _UNCHECKED, ignore_errors=True)
        self.responses.unlink(missing_ok=True)
        plain: dict[str, Any] = json.loads(text)
        return plain

    def _checked_files(self, counts: dict[str, int]) -> dict[str, str]:
        """Name -> content of lm-eval's files as strict JSON, the results last.

        Args:
            counts: task -> number of its samples.

        Raises:
            ValueError: a file or a line is missing or cut short.
        """
        files = {file.name: file for file in (self.path / _UNCHECKED).rglob("*.json*")}
        (results,) = [name for name in files if name.startswith("results_")] or [""]
        if not results:
            raise ValueError("no room for the results")
        time = results.removeprefix("results_").removesuffix(".json")
        content = {}
        for task, count in counts.items():
            name = f"samples_{task}_{time}.jsonl"
            lines = files[name].read_text(encoding="utf-8").split("\n") if name in files else []
            if len(lines) != count + 1 or lines.pop():
                raise ValueError(f"{len(lines)} of {count} samples of {task} are there")
            content[name] = "".join(json_text(json.loads(line), indent=None) for line in lines)
        content[results] = json_text(json.loads(files[results].read_text(encoding="utf-8")))
        return content

    def write_table(self, text: str) -> None:
        """Write the Markdown table."""
        write_text(self.table, text)
