"""The folder of what is retrofitted: a checkpoint, or a model in memory that is saved beside the output."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..checkpoints.source_folder import find_folder
from ..errors import UserError
from ..errors.messages import one_line
from ..model_card import hub_id_of
from .folder_lock import dead_siblings, folder_lock, sibling
from .output_folder import check_apart


@dataclass(frozen=True)
class SourceFolder:
    """The folder of a source.

    Attributes:
        folder: the folder.
        name: name of the source in reports and messages.
        hub_id: its Hub id, if it is from the Hub.
        is_saved_model: whether it holds a model from memory, and is removed afterwards.
    """

    folder: Path
    name: str
    hub_id: str | None
    is_saved_model: bool = False


@contextmanager
def source_folder(source: str | Path | PreTrainedModel, target: Path, revision: str | None) -> Iterator[SourceFolder]:
    """Yield the folder of a source.

    Args:
        source: a folder or Hub id, or a model in memory.
        target: the output folder, an absolute path; a model is saved beside it, so that its files can be linked.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        UserError: if there is no such folder or Hub repository, the output is inside the source, or the model cannot
            be saved.
    """
    if not isinstance(source, PreTrainedModel):
        if not isinstance(source, str | Path):
            raise UserError(
                f"source: is a {type(source).__name__}; give a folder, a Hub id or a model of transformers. Of a PEFT "
                "model, give what merge_and_unload() returns."
            )
        folder, hub_id = find_folder(source, revision)
        check_apart(target, folder)
        yield SourceFolder(folder, str(source), hub_id)
        return
    if revision is not None:
        raise UserError(f"revision: {revision!r} is only allowed for a Hub id, not for a model in memory.")
    origin = source.name_or_path or ""
    name = f"{type(source).__name__} in memory" + (f", from {origin}" if origin else "")
    # Locked as long as it is needed, and apart from the output, which is locked while it is written.
    saved = target.with_name(f"{target.name}.source")
    folder = sibling(saved, "saved")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(saved) as locked:
            for leftover in dead_siblings(saved, "saved") if locked else ():
                shutil.rmtree(leftover)
            _save(source, folder, name)
            yield SourceFolder(folder, name, hub_id_of(origin), is_saved_model=True)
    except UserError as error:
        # The folder is gone when the user reads the message.
        raise UserError(str(error).replace(str(folder), name)) from error
    except OSError as error:
        raise UserError(f"{error.filename or target}: {error.strerror or error}; {target} was not written.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _save(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Save a model under the names of its class.

    transformers reverts the conversions with which a model was loaded. For a model that was dequantised while loading,
    versions before 5.24 would then write names of packed weights.
    """
    conversions = vars(model).pop("_weight_conversions", None)
    try:
        model.save_pretrained(folder)
    except Exception as error:
        # Quantizers and file systems raise errors of their own.
        raise UserError(f"{name}: cannot be saved: {one_line(error)}") from error
    finally:
        if conversions is not None:
            model._weight_conversions = conversions
