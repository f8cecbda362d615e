"""Result folder, or single result file, of a command that can be interrupted and resumed.

Files are written atomically (`utils.result_files`). Results of other settings and unrelated files are refused;
`--overwrite` removes only files of the command.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
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
        own_files: glob patterns of all files and folders of the command; `--overwrite` removes them, and nothing else.
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
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

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


@dataclass(frozen=True, slots=True)
class FileLayout:
    """Fields of a command's result file, a JSON object with `settings` and named parts.

    Args:
        content: words for the content in messages, e.g. `"a result file of --perplexity"`.
        parts: field with the parts, by name.
        further: further fields, which are objects as well.
        required_settings: settings that every run has; a file without them belongs to another program.
    """

    content: str
    parts: str
    further: tuple[str, ...]
    required_settings: frozenset[str]


class RunFile:
    """Result file of one run, the counterpart of `RunFolder` for results that fit into one file.

    It is written as a whole, with the first results and again after every part; until then, existing results stay,
    even with `overwrite`.

    Args:
        path: the file; need not exist.
        layout: its fields.
        overwrite: discard existing results; a file that is not a result file is never replaced.

    Raises:
        UserError: if the path is a folder, another kind of file, or not writable.
    """

    def __init__(self, path: Path, layout: FileLayout, *, overwrite: bool) -> None:
        self.path = path
        self._layout = layout
        self._overwrite = overwrite
        if path.is_dir():
            raise UserError(f"{path}: is a folder; choose another file (--out).")
        if path.exists():
            read_run_file(path, layout)
            if overwrite and not os.access(path, os.W_OK):
                raise UserError(f"{path}: is write-protected; choose another file (--out).")
        # The folder is only created with the first result, so check its nearest existing parent.
        home = next(parent for parent in path.absolute().parents if parent.exists())
        if not home.is_dir() or not os.access(home, os.W_OK):
            raise UserError(f"{path}: cannot create a file in {home}; choose another place (--out).")

    def resume(self, settings: Mapping[str, Any], parts: Collection[str]) -> dict[str, Any]:
        """Return the stored parts of a run with the same settings; none if they are to be overwritten.

        Args:
            settings: settings that determine the numbers, as JSON values.
            parts: names of the parts of this run.

        Raises:
            UserError: if the file contains a run with other settings, or parts that this run does not have.
        """
        if self._overwrite or not self.path.exists():
            return {}
        advice = "choose another place (--out), or --overwrite"
        content = read_run_file(self.path, self._layout)
        refuse_other_settings(self.path, "results with", content["settings"], settings, advice)
        stored: dict[str, Any] = content[self._layout.parts]
        if lost := [name for name in stored if name not in parts]:
            raise UserError(f"{self.path}: holds results of {', '.join(lost)}, which would be lost; {advice}.")
        return stored

    def write(self, text: str) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, text)


def read_run_file(path: Path, layout: FileLayout) -> dict[str, Any]:
    """Return the content of a result file.

    Args:
        path: the file.
        layout: its fields.

    Raises:
        UserError: if it belongs to another program.
    """
    content = read_object(path)
    objects = [content.get(name) for name in ("settings", layout.parts, *layout.further)]
    if (
        not all(isinstance(value, dict) for value in objects)
        or not layout.required_settings <= content["settings"].keys()
    ):
        raise UserError(f"{path}: is not {layout.content}; choose another place (--out).")
    return content


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
