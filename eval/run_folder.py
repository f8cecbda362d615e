"""Result folder of a command that can be interrupted and resumed.

Files are written atomically (`utils.result_files`). A folder with results of other settings, or with unrelated files,
is refused; `--overwrite` removes only files of the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import UserError
from ..utils.result_files import json_text, read_object, write_text


@dataclass(frozen=True, slots=True)
class RunLayout:
    """File names of a command's result folder.

    Attributes:
        content: word for the content in messages, e.g. `"run"`.
        settings_file: name of the settings file.
        required_settings: settings that every run has; a file of this name without them belongs to another program.
        without_results: names of further files that contain no results and may be discarded.
        own_files: glob patterns of all files of the command, which `--overwrite` removes.
    """

    content: str
    settings_file: str
    required_settings: frozenset[str]
    own_files: tuple[str, ...]
    without_results: tuple[str, ...] = ()


class RunFolder:
    """Result folder of one run; see the module docstring.

    Args:
        path: the folder.
        layout: file names.
        settings: for each part, the settings that determine its numbers, as JSON values. A part is a sub-folder, or
            `"."` if there is only one; every run has the first part.
        overwrite: discard an existing run in the folder instead of resuming it.

    Raises:
        UserError: if the folder contains a run with other settings, or unrelated files.
    """

    def __init__(
        self, path: Path, layout: RunLayout, settings: Mapping[str, Mapping[str, Any]], *, overwrite: bool
    ) -> None:
        self.path = path
        self._layout = layout
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: exists and is not a folder.")
        if self._holds_run(next(iter(settings))) and overwrite:
            self.clear()
        for part, wanted in settings.items():
            self._check(part, wanted)
        for part, wanted in settings.items():
            self.write(f"{part}/{layout.settings_file}", wanted)

    def read(self, name: str) -> dict[str, Any] | None:
        """Read a JSON object; return None if the file does not exist.

        Args:
            name: path of the file relative to the folder.

        Raises:
            UserError: if the file is not a JSON object.
        """
        file = self.path / name
        return read_object(file, advice="remove it, or --overwrite starts afresh") if file.is_file() else None

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON object.

        Args:
            name: path of the file relative to the folder.
            content: the object.
        """
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json_text(content))

    def clear(self) -> None:
        """Remove the files of a run; keep all others."""
        for pattern in self._layout.own_files:
            for file in self.path.glob(pattern):
                file.unlink()

    def _holds_run(self, first_part: str) -> bool:
        """Return whether the folder contains a run.

        Raises:
            UserError: if the folder contains unrelated files, which are never removed.
        """
        settings_file = self.path / first_part / self._layout.settings_file
        if not settings_file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise UserError(
                    f"{self.path}: is not empty and holds no {self._layout.content}; choose another folder (--out)."
                )
            return False
        if not self._layout.required_settings <= read_object(settings_file).keys():
            raise UserError(f"{settings_file}: belongs to another program; choose another folder (--out).")
        return True

    def _check(self, part: str, wanted: Mapping[str, Any]) -> None:
        before = self.read(f"{part}/{self._layout.settings_file}")
        if before is None or before == wanted:
            return
        if self._has_results(part):
            name = PurePosixPath(part).name
            holds = f"a {self._layout.content} {f'whose {name} has' if name else 'with'}"
            refuse_other_settings(self.path, holds, before, wanted, "choose another folder (--out), or --overwrite")
        # Left over from an attempt in which the model could not be loaded.
        for name in self._layout.without_results:
            (self.path / part / name).unlink(missing_ok=True)

    def _has_results(self, part: str) -> bool:
        ignored = {self._layout.settings_file, *self._layout.without_results}
        return any(file.is_file() and file.name not in ignored for file in (self.path / part).iterdir())


def refuse_other_settings(
    place: Path, holds: str, before: Mapping[str, Any], wanted: Mapping[str, Any], advice: str
) -> None:
    """Raise an error if the settings differ from those of the existing results.

    Args:
        place: the folder or file.
        holds: description of the content, followed in the message by the setting: `"a run with"`.
        before: settings of the existing results.
        wanted: requested settings.
        advice: what the user can do.

    Raises:
        UserError: if a setting differs.
    """
    for name in {**before, **wanted}:
        if before.get(name) != wanted.get(name):
            raise UserError(f"{place}: holds {holds} {name} {before.get(name)}, not {wanted.get(name)}; {advice}.")
