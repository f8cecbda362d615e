"""Folder of a run of tasks: settings, responses so far, and finally lm-eval's files and a table.

run.json                       settings; a run with other settings is refused
responses.jsonl                journal of responses, until the run is complete
results_<time>.json            lm-eval's results; the run is complete once it exists
samples_<task>_<time>.jsonl    lm-eval's samples
table.md                       the table
.partial/                      lm-eval's files until they are checked
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
    own_files=("run.json", _RESPONSES, _TABLE, "results_*.json", "samples_*.jsonl", _UNCHECKED),
)


class TaskFolder(RunFolder):
    """Folder of a run of tasks; see the module docstring.

    Args:
        path: the folder.
        settings: settings that determine the numbers, as JSON values.
        overwrite: discard an existing run with other settings.

    Raises:
        UserError: if the folder contains a run with other settings, or unrelated files.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        super().__init__(path, _LAYOUT, {".": settings}, overwrite=overwrite)

    @property
    def responses(self) -> Path:
        """Path of the response journal."""
        return self.path / _RESPONSES

    @property
    def table(self) -> Path:
        """Path of the Markdown table."""
        return self.path / _TABLE

    def results_file(self) -> Path | None:
        """Path of the newest results, or None while the run is incomplete."""
        return max(self.path.glob("results_*.json"), default=None)

    def results(self) -> dict[str, Any] | None:
        """Return the newest results, or None while the run is incomplete."""
        file = self.results_file()
        if file is None:
            return None
        # Left over if the process was killed after writing its last file.
        self.responses.unlink(missing_ok=True)
        return self.read(file.name)

    def tracker(self) -> EvaluationTracker:
        """Return lm-eval's result writer for a sub-folder of this one."""
        from lm_eval.loggers import EvaluationTracker

        shutil.rmtree(self.path / _UNCHECKED, ignore_errors=True)
        return EvaluationTracker(output_path=str(self.path / _UNCHECKED))

    def finish(self, tracker: EvaluationTracker, results: dict[str, Any]) -> dict[str, Any]:
        """Write lm-eval's files atomically, the results last.

        lm-eval only logs write errors. Its files are therefore read back and counted, and the response journal is kept
        until all of them are written.

        Args:
            tracker: return value of `tracker`, after the run.
            results: results of lm-eval including samples.

        Returns:
            The results as stored in the file.

        Raises:
            UserError: if they could not be written; the run can be resumed.
        """
        # lm-eval skips a whole file of samples if one of them contains a lone surrogate.
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
            # Samples without results would take disk space from the next attempt.
            for file in written:
                (self.path / file).unlink(missing_ok=True)
            reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
            raise UserError(
                f"{self.path}: the results could not be written ({reason}); the responses are kept: free disk space, "
                "and the same command continues the run."
            ) from error
        finally:
            shutil.rmtree(self.path / _UNCHECKED, ignore_errors=True)
        self.responses.unlink(missing_ok=True)
        plain: dict[str, Any] = json.loads(text)
        return plain

    def _checked_files(self, counts: dict[str, int]) -> dict[str, str]:
        """Return name and content of lm-eval's files as strict JSON, the results last.

        Args:
            counts: number of samples of each task.

        Raises:
            ValueError: if a file or line is missing or truncated.
        """
        files = {file.name: file for file in (self.path / _UNCHECKED).rglob("*.json*")}
        (results,) = [name for name in files if name.startswith("results_")] or [""]
        if not results:
            raise ValueError("the results file is missing")
        time = results.removeprefix("results_").removesuffix(".json")
        content = {}
        for task, count in counts.items():
            name = f"samples_{task}_{time}.jsonl"
            lines = files[name].read_text(encoding="utf-8").split("\n") if name in files else []
            if len(lines) != count + 1 or lines.pop():
                raise ValueError(f"{len(lines)} of {count} samples of {task} were written")
            content[name] = "".join(json_text(json.loads(line), indent=None) for line in lines)
        content[results] = json_text(json.loads(files[results].read_text(encoding="utf-8")))
        return content

    def write_table(self, text: str) -> None:
        """Write the Markdown table."""
        write_text(self.table, text)
