"""The folder of one run: its settings, the responses so far, and at the end lm-eval's files and a table.

run.json                 settings; a run with others is refused
responses.jsonl          while the run goes on
results_<time>.json      lm-eval's own file; when it is there, the run is complete
samples_<task>_<time>.jsonl
table.md
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_depthattn.conversion.checkpoint_files import ConversionError

_SETTINGS, _RESPONSES, _TABLE, _PARTIAL = "run.json", "responses.jsonl", "table.md", ".partial"
_OWN_PATTERNS = (_SETTINGS, _RESPONSES, _TABLE, "results_*.json", "samples_*.jsonl")


class RunFolder:
    """See the module.

    Args:
        path: the folder.
        settings: what decides the numbers, as JSON values.
        overwrite: forget another run that lies there.

    Raises:
        ConversionError: a run with other settings, or something else, lies there.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConversionError(f"{path}: exists and is not a folder.")
        # A folder that holds no run of ours is never cleared.
        if overwrite and (path / _SETTINGS).is_file():
            self._clear()
        self._check(settings)
        path.mkdir(parents=True, exist_ok=True)
        _write(path / _SETTINGS, json.dumps(settings, indent=2) + "\n")

    def _check(self, settings: dict[str, Any]) -> None:
        known = self.path / _SETTINGS
        if not known.is_file():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConversionError(f"{self.path}: is not empty and holds no run; choose another folder (--out).")
            return
        try:
            before = json.loads(known.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{known}: is not JSON; --overwrite starts afresh.") from error
        for name in {**before, **settings}:
            if before.get(name) != settings.get(name):
                raise ConversionError(
                    f"{self.path}: holds a run with {name} {before.get(name)}, not {settings.get(name)}; choose "
                    "another folder (--out), or --overwrite."
                )

    def _clear(self) -> None:
        for pattern in _OWN_PATTERNS:
            for file in self.path.glob(pattern):
                file.unlink()
        shutil.rmtree(self.path / _PARTIAL, ignore_errors=True)

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

    def tracker(self) -> Any:
        """lm-eval's writer, aimed at a folder inside this one."""
        from lm_eval.loggers import EvaluationTracker

        shutil.rmtree(self.path / _PARTIAL, ignore_errors=True)
        return EvaluationTracker(output_path=str(self.path / _PARTIAL))

    def finish(self, tracker: Any, results: dict[str, Any]) -> dict[str, Any]:
        """Write lm-eval's files; the results come last, and every file is complete when it has its name.

        Args:
            tracker: from `tracker`, after the run.
            results: of lm-eval, with the samples.

        Returns:
            The results as they are in the file.

        Raises:
            ConversionError: they could not be written (lm-eval only logs that).
        """
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for task in results["configs"]:
            tracker.save_results_samples(task_name=task, samples=samples[task])
        written = sorted((self.path / _PARTIAL).rglob("*.json*"), key=lambda file: file.name.startswith("results_"))
        if len(written) != len(results["configs"]) + 1:
            raise ConversionError(f"{self.path}: the results could not be written; is the disk full?")
        for file in written:
            os.replace(file, self.path / file.name)
        shutil.rmtree(self.path / _PARTIAL)
        self.responses.unlink(missing_ok=True)
        return json.loads((self.path / written[-1].name).read_text(encoding="utf-8"))

    def write_table(self, text: str) -> None:
        """Write the Markdown table."""
        _write(self.table, text)


def fingerprint(folder: Path) -> str:
    """Of a checkpoint or an adapter: its small files and its code by content, its weights by name, size and time."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model", ".py"):
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".bin"):
            status = file.stat()
            digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def default_run_folder(model: str, parts: Sequence[str]) -> Path:
    """`eval_results/<model>-<suite>...` in the current folder."""
    name = Path(model).resolve().name if Path(model).exists() else model.replace("/", "__")
    return Path("eval_results", "-".join([name, *parts]))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
