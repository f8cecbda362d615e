"""Folder of a report, with one file per measured metric so that an interrupted report can be resumed.

report.html, report.json, figures/*.png  the report
metrics/model/settings.json              settings; a rerun with other settings is refused
metrics/model/about.json                 the model, its metrics, the estimated run time
metrics/model/<metric>.json              one result
metrics/compare/...                      the same for the second model
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..metrics.registry import ROWS
from ..run_folder import RunFolder, RunLayout

#: The two models of a report.
MODEL, COMPARE = "model", "compare"
PAGE, REPORT, FIGURES = "report.html", "report.json", "figures"
_SETTINGS, _ABOUT = "settings.json", "about.json"
_PARTS = {MODEL: f"metrics/{MODEL}", COMPARE: f"metrics/{COMPARE}"}
_LAYOUT = RunLayout(
    content="report",
    settings_file=_SETTINGS,
    required_settings=frozenset({"fingerprint", "tokens_sha256"}),
    without_results=(_ABOUT,),
    own_files=(
        PAGE,
        REPORT,
        *(f"{FIGURES}/{name}.png" for row in ROWS for name in row.figures),
        *(f"{part}/{files}" for part in _PARTS.values() for files in ("*.json", "*.json.partial")),
    ),
)


class ReportFolder(RunFolder):
    """Folder of a report; see the module docstring.

    Args:
        path: the folder.
        settings: for each model (`"model"`, `"compare"`), the settings that determine its numbers, as JSON values.
        overwrite: discard an existing report with other settings.

    Raises:
        UserError: if the folder contains a report with other settings, or unrelated files.
    """

    def __init__(self, path: Path, settings: dict[str, dict[str, Any]], *, overwrite: bool) -> None:
        by_part = {_PARTS[model]: wanted for model, wanted in settings.items()}
        super().__init__(path, _LAYOUT, by_part, overwrite=overwrite)

    def result(self, model: str, metric: str) -> dict[str, Any] | None:
        """Return a stored result, or None."""
        return self.read(f"{_PARTS[model]}/{metric}.json")

    def store_result(self, model: str, metric: str, result: dict[str, Any]) -> None:
        """Store the result of a metric."""
        self.write(f"{_PARTS[model]}/{metric}.json", result)

    def about(self, model: str) -> dict[str, Any] | None:
        """Return the stored facts about a model, or None."""
        return self.read(f"{_PARTS[model]}/{_ABOUT}")

    def store_about(self, model: str, about: dict[str, Any]) -> None:
        """Store facts about a model, so that a complete report need not load it again."""
        self.write(f"{_PARTS[model]}/{_ABOUT}", about)
