"""The small files that are copied with a checkpoint: tokenizer, generation config, chat templates, licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..utils.paths import check_inside
from .checkpoint_files import INDEX_FILE

#: Patterns of the small files that are copied unchanged.
CARRIED_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.vocab", "*.bpe", "LICENSE*", "NOTICE*")
#: Folders whose files are copied as well.
CARRIED_FOLDERS = ("additional_chat_templates",)
#: Folder of evaluation results, as the Hub reads them; they are those of one model and are not carried.
EVAL_RESULTS_FOLDER = ".eval_results"
#: Files that match a pattern but are not copied: rewritten files, indices of the weights, states of a training run.
NOT_CARRIED = (
    "config.json",
    INDEX_FILE,
    "pytorch_model.bin.index.json",
    "all_results.json",
    "train_results.json",
    "trainer_state.json",
)
#: A folder with one of these files has a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "tekken.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Files of a checkpoint that are read and rewritten.
_REWRITTEN = ("config.json", "README.md")


def check_carried(folder: Path, weight_files: Iterable[str], *, copy_tokenizer_code: bool) -> list[str]:
    """Check that the files of a checkpoint are safe to copy.

    Args:
        folder: the checkpoint.
        weight_files: names of its shards.
        copy_tokenizer_code: allow a tokenizer with custom code.

    Returns:
        The tokenizer's code: files, and references to other repositories.

    Raises:
        UserError: if a symbolic link points outside the folder, or the tokenizer has custom code that is not allowed.
    """
    for name in (*carried_files(folder), *_REWRITTEN, INDEX_FILE, *sorted(set(weight_files))):
        check_inside(folder / name, folder)
    code = [*_tokenizer_code(folder), *_code_elsewhere(folder)]
    if code and not copy_tokenizer_code:
        raise UserError(
            f"{folder}: its tokenizer has its own code ({', '.join(code)}), which would run when the output is loaded "
            "with trust_remote_code; review it, then allow it (`copy_tokenizer_code=True`, --copy-tokenizer-code)."
        )
    return code


def carried_files(folder: Path) -> list[str]:
    """Return the paths, relative to a checkpoint folder, of the small files that are copied unchanged."""
    names = {
        path.name
        for pattern in CARRIED_PATTERNS
        for path in folder.glob(pattern)
        if path.is_file() and path.name not in NOT_CARRIED
    }
    names |= {f"{sub}/{path.name}" for sub in CARRIED_FOLDERS for path in (folder / sub).glob("*.jinja")}
    return sorted(names | set(_tokenizer_code(folder)))


def carry_files(source: Path, target: Path) -> None:
    """Copy the small files of a checkpoint to another folder."""
    for name in carried_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a checkpoint folder contains a tokenizer."""
    return any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)) or bool(_tokenizer_code(folder))


def check_tokenizer(
    folder: Path, require_tokenizer: bool, name: str | None = None, *, named: str | None = None
) -> None:
    """Warn if a checkpoint that is converted has no tokenizer.

    Args:
        folder: the checkpoint.
        require_tokenizer: raise instead.
        name: its name in messages; the folder by default.
        named: name of the tokenizer in its config, for the message.

    Raises:
        UserError: if it has none and must have one.
    """
    if has_tokenizer(folder):
        return
    hint = f" (config.json names {named!r})" if named else ""
    problem = f"{name or folder}: has no tokenizer{hint}"
    if require_tokenizer:
        raise UserError(
            f"{problem}; add its files, or continue without one (`require_tokenizer=False`, "
            "--allow-missing-tokenizer)."
        )
    from transformers.utils import logging

    logging.get_logger(__name__).warning(f"{problem}; the output has no tokenizer either.")


def _tokenizer_code(folder: Path) -> list[str]:
    """Return the files of a tokenizer's custom code (`auto_map` in tokenizer_config.json)."""
    names: set[str] = set()
    for entry in _code_entries(folder / _TOKENIZER_CONFIG):
        code = folder / f"{entry.rpartition('.')[0]}.py"
        if "--" not in entry and code.parent == folder and code.is_file():
            from transformers.dynamic_module_utils import get_relative_import_files

            names |= {code.name, *(Path(name).name for name in get_relative_import_files(code))}
    return sorted(name for name in names if (folder / name).is_file())


def _code_elsewhere(folder: Path) -> list[str]:
    """Return references of tokenizers and processors to code in other repositories: `owner/name--module.Class`."""
    configs = [folder / name for name in carried_files(folder) if name.endswith("_config.json")]
    return sorted({entry for config in configs for entry in _code_entries(config) if "--" in entry})


def _code_entries(config_file: Path) -> Iterator[str]:
    """Yield the classes in `auto_map` of a file; none if the file or its `auto_map` is missing or invalid."""
    try:
        auto_map: Any = json.loads(config_file.read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError, RecursionError):
        return
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and entry:
                yield entry
