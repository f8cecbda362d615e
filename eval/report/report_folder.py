"""The folder of a report: every measured metric is a file, so that an interrupted report goes on.

report.html, report.json, figures/*.png     the report
metrics/model/settings.json                 what decides the numbers; a rerun with others is refused
metrics/model/about.json                    the model, the metrics it has, the estimate
metrics/model/<metric>.json                 one result
metrics/compare/...                         the same of the other model
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...conversion.checkpoint_files import ConversionError
from ..result_files import json_text, read_object, write_text

#: The two models of a report.
MODEL, COMPARE = "model", "compare"
PAGE, REPORT, FIGURES = "report.html", "report.json", "figures"
_METRICS, _SETTINGS, _ABOUT = "metrics", "settings.json", "about.json"


class ReportFolder:
    """See the module.

    Args:
        path: the folder.
        settings: by model (`"model"`, `"compare"`), what decides its numbers, as JSON values.
        overwrite: forget another report that lies there.

    Raises:
        ConversionError: a report with other settings, or something else, lies there.
    """

    def __init__(self, path: Path, settings: dict[str, dict[str, Any]], *, overwrite: bool) -> None:
        self.path = path
        if path.exists() and not path.is_dir():
            raise ConversionError(f"{path}: exists and is not a folder.")
        settings_file = path / _METRICS / MODEL / _SETTINGS
        holds_report = (
            settings_file.is_file() and {"fingerprint", "tokens_sha256"} <= read_object(settings_file).keys()
        )
        if not holds_report and path.is_dir() and any(path.iterdir()):
            raise ConversionError(f"{path}: is not empty and holds no report; choose another folder (--out).")
        if holds_report and overwrite:
            self._clear()
        for part, wanted in settings.items():
            self._check(part, wanted)
        for part, wanted in settings.items():
            self._part(part).mkdir(parents=True, exist_ok=True)
            write_text(self._part(part) / _SETTINGS, json_text(wanted))

    def result(self, part: str, metric: str) -> dict[str, Any] | None:
        """A stored result, or None."""
        return self._read(self._part(part) / f"{metric}.json")

    def store_result(self, part: str, metric: str, result: dict[str, Any]) -> None:
        """Store the result of a metric."""
        write_text(self._part(part) / f"{metric}.json", json_text(result))

    def about(self, part: str) -> dict[str, Any] | None:
        """What is known about a model that has been loaded before, or None."""
        return self._read(self._part(part) / _ABOUT)

    def store_about(self, part: str, about: dict[str, Any]) -> None:
        """Store what is known about a model."""
        write_text(self._part(part) / _ABOUT, json_text(about))

    def _part(self, part: str) -> Path:
        return self.path / _METRICS / part

    def _check(self, part: str, wanted: dict[str, Any]) -> None:
        before = self._read(self._part(part) / _SETTINGS)
        if before is None or before == wanted:
            return
        if not self._has_results(part):
            # Left by a model that could not be loaded: nothing would be lost.
            (self._part(part) / _ABOUT).unlink(missing_ok=True)
            return
        for name in {**before, **wanted}:
            if before.get(name) != wanted.get(name):
                raise ConversionError(
                    f"{self.path}: holds a report whose {part} has {name} {before.get(name)}, not {wanted.get(name)}; "
                    "choose another folder (--out), or --overwrite."
                )

    def _has_results(self, part: str) -> bool:
        return any(file.name not in (_SETTINGS, _ABOUT) for file in self._part(part).glob("*.json"))

    def _clear(self) -> None:
        """Remove what a report consists of; other files in the folder stay."""
        from .drawing import remove_images

        for name in (PAGE, REPORT):
            (self.path / name).unlink(missing_ok=True)
        remove_images(self.path / FIGURES)
        for part in (MODEL, COMPARE):
            for pattern in ("*.json", "*.json.partial"):
                for file in self._part(part).glob(pattern):
                    file.unlink()

    def _read(self, file: Path) -> dict[str, Any] | None:
        if not file.is_file():
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{file}: is not JSON; remove it, or --overwrite starts afresh.") from error
