"""Folders that appear complete or not at all, and the files that go into them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_depthattn.conversion.checkpoint_files import INDEX_FILE, ConversionError, read_chunks

#: Small files of a checkpoint that go along unchanged: tokenizer, generation config, chat templates, licence.
CARRIED_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.vocab", "*.bpe", "LICENSE*", "NOTICE*")
#: Folders whose files go along as well.
CARRIED_FOLDERS = ("additional_chat_templates",)
#: What fits a pattern and stays behind: written anew, of the weights' layout, or of a training run or an adapter.
NOT_CARRIED = (
    "config.json",
    INDEX_FILE,
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "all_results.json",
    "train_results.json",
    "trainer_state.json",
)
#: One of these means that there is a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")


@dataclass
class ByteCounts:
    """What happened to the bytes of the weights."""

    linked: int = 0
    copied: int = 0
    written: int = 0


@contextmanager
def complete_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Write a folder beside `target`, and give it that name when everything is in it.

    Leftovers of runs that were killed are removed first. With `overwrite`, the old folder goes when the new one is
    complete.

    Args:
        target: the folder to create, resolved.
        overwrite: replace an existing checkpoint.

    Yields:
        The folder to write into.

    Raises:
        ConversionError: the target cannot be replaced, or the disk refuses (full, no permission).
    """
    check_target(target, overwrite)
    partial = _sibling(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        partial.mkdir()
        yield partial
        check_target(target, overwrite)
        _swap(partial, target)
    except OSError as error:
        problem = f"{error.filename or target}: {error.strerror or error}"
        raise ConversionError(f"{problem}; {target} was not written.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse an output that would destroy something.

    Raises:
        ConversionError: it exists and is not to be overwritten, or it is more than a checkpoint.
    """
    if not target.name or Path.cwd().is_relative_to(target):
        raise ConversionError(f"{target}: holds the current directory; choose another output folder.")
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(f"{target}: exists and is not a folder.")
    children = list(target.iterdir())
    if not children:
        return
    if not overwrite:
        raise ConversionError(
            f"{target}: exists and is not empty; choose another folder, or overwrite it (--overwrite)."
        )
    if not (target / "config.json").is_file():
        raise ConversionError(f"{target}: exists and is not a checkpoint (no config.json); it is not overwritten.")
    folders = sorted(child.name for child in children if child.is_dir() and child.name not in CARRIED_FOLDERS)
    if folders:
        raise ConversionError(f"{target}: has folders in it ({', '.join(folders)}); it is not overwritten.")


def check_apart(target: Path, source: Path) -> None:
    """Refuse an output that is, contains or lies in the source.

    Raises:
        ConversionError: see above.
    """
    source = source.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise ConversionError(f"{target}: must lie apart from the source {source}.")


def _sibling(target: Path, role: str, pid: int | str | None = None) -> Path:
    return target.with_name(f".{target.name}.{role}-{os.getpid() if pid is None else pid}")


def _clear_leftovers(target: Path) -> None:
    """Remove what killed runs left, and bring an old output back that one had moved aside and not yet replaced."""
    prefixes = {role: f".{target.name}.{role}-" for role in ("partial", "replaced")}
    for sibling in sorted(target.parent.iterdir()):
        for role, prefix in prefixes.items():
            pid = sibling.name.removeprefix(prefix)
            if not sibling.name.startswith(prefix) or not pid.isdigit() or _is_running(int(pid)):
                continue
            if role == "replaced" and not target.exists():
                os.rename(sibling, target)
            else:
                shutil.rmtree(sibling)


def _is_running(pid: int) -> bool:
    # On Windows, signal 0 is not a question; a folder in use cannot be removed there anyway.
    if pid == os.getpid() or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        os.rename(partial, target)
        return
    replaced = _sibling(target, "replaced")
    os.rename(target, replaced)
    os.rename(partial, target)
    shutil.rmtree(replaced)


def place_weights(
    source: Path,
    target: Path,
    counts: ByteCounts,
    *,
    copy: bool = False,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Hard-link a weight file, or copy it where links are not possible.

    Args:
        source: the file; symbolic links (the Hub cache has them) are followed.
        target: its new name.
        counts: receives the number of bytes.
        copy: copy in any case.
        on_bytes: called with the number of bytes after each step.
    """
    # `os.link` would link the symbolic link itself.
    source = source.resolve()
    num_bytes = source.stat().st_size
    if not copy:
        try:
            os.link(source, target)
        except OSError:
            # Another file system, one without links, or a source of another user.
            copy = True
    if not copy:
        counts.linked += num_bytes
        if on_bytes is not None:
            on_bytes(num_bytes)
        return
    with open(target, "wb") as file:
        for chunk in read_chunks(source):
            file.write(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    counts.copied += num_bytes


def carried_files(folder: Path) -> list[str]:
    """Names, relative to a checkpoint folder, of the small files that go along unchanged."""
    names = {
        path.name
        for pattern in CARRIED_PATTERNS
        for path in folder.glob(pattern)
        if path.is_file() and path.name not in NOT_CARRIED
    }
    names |= {f"{sub}/{path.name}" for sub in CARRIED_FOLDERS for path in (folder / sub).glob("*.jinja")}
    return sorted(names | set(_tokenizer_code(folder)))


def carry_files(source: Path, target: Path) -> None:
    """Copy the small files of a checkpoint."""
    for name in carried_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder holds a tokenizer."""
    return any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)) or bool(_tokenizer_code(folder))


def _tokenizer_code(folder: Path) -> list[str]:
    """Files of a tokenizer that brings its own code (`auto_map` in tokenizer_config.json)."""
    config_file = folder / "tokenizer_config.json"
    try:
        auto_map = json.loads(config_file.read_text(encoding="utf-8")).get("auto_map", {})
        entries = auto_map.get("AutoTokenizer") or []
    except (OSError, ValueError, AttributeError):
        return []
    from transformers.dynamic_module_utils import get_relative_import_files

    names = set()
    for entry in [entries] if isinstance(entries, str) else entries:
        # "repository--module.Class" is code of another repository.
        if not entry or "--" in entry:
            continue
        code = folder / f"{entry.rpartition('.')[0]}.py"
        if code.parent == folder and code.is_file():
            names |= {code.name, *(Path(name).name for name in get_relative_import_files(code))}
    return sorted(name for name in names if (folder / name).is_file())
