"""Export of the model code beside a checkpoint: it then loads with `trust_remote_code=True` without this package.

transformers loads remote code from flat folders: only single-dot imports of names from a sibling file survive. The
model files are written that way; kernel files live in a sub-package, so an import of `.kernels.<name>` is rewritten to
`.kernels_<name>` and the file exported under that name. The export follows the imports of the modelling file, so there
is no list to keep.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.utils import CONFIG_NAME

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

_MODELING_MODULE = "modeling_depthattn"
MODELING_FILE = f"{_MODELING_MODULE}.py"
CONFIGURATION_FILE = "configuration_depthattn.py"

#: Auto class -> our class, for `config.auto_map`.
AUTO_MAP = {
    "AutoConfig": "configuration_depthattn.DepthAttnConfig",
    "AutoModel": "modeling_depthattn.DepthAttnModel",
    "AutoModelForCausalLM": "modeling_depthattn.DepthAttnForCausalLM",
    "AutoModelForSequenceClassification": "modeling_depthattn.DepthAttnForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_depthattn.DepthAttnForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_depthattn.DepthAttnForQuestionAnswering",
}

_RELATIVE_IMPORT = re.compile(r"^(\s*from )\.(\w+(?:\.\w+)*)( import )", re.MULTILINE)


def export_model_code(folder: str | os.PathLike) -> list[Path]:
    """Write the modelling file and everything it imports from this package into a folder, flat.

    Args:
        folder: an existing checkpoint folder.

    Returns:
        The files written.
    """
    code_folder = Path(__file__).parent
    written, pending, seen = [], [MODELING_FILE, CONFIGURATION_FILE], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        text = _source_file(code_folder, name).read_text(encoding="utf-8")
        inside_kernels = name.startswith("kernels_")

        def flatten(match: re.Match, inside_kernels: bool = inside_kernels) -> str:
            module = match[2].replace(".", "_")
            # A kernel file imports its siblings; flat, they all carry the folder's name.
            if inside_kernels and not module.startswith("kernels_"):
                module = f"kernels_{module}"
            pending.append(f"{module}.py")
            return f"{match[1]}.{module}{match[3]}"

        text = _RELATIVE_IMPORT.sub(flatten, text)
        target = Path(folder) / name
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        written.append(target)
    return written


def export_beside_config(folder: str | os.PathLike) -> None:
    """`export_model_code`, unless the folder holds an adapter only and has no config that refers to the code."""
    if (Path(folder) / CONFIG_NAME).is_file():
        export_model_code(folder)


@contextmanager
def saved_as_own_class(model: "PreTrainedModel") -> Iterator[None]:
    """While a model is saved: the class under FSDP2's wrapper, our export of code, and the complete `auto_map`."""
    wrapped_class, auto_map = type(model), getattr(model.config, "auto_map", None)
    # FSDP2 renames the class of a wrapped model to one of torch's, and transformers would export torch's files.
    bases = wrapped_class.__mro__
    own_class: type[PreTrainedModel] = next(cls for cls in bases if not cls.__module__.startswith("torch."))
    auto_class = own_class._auto_class
    model.config.auto_map = {**(auto_map or {}), **AUTO_MAP}
    model.__class__ = own_class
    # A user's subclass that is registered for an Auto class is exported by transformers, with an entry of its own. For
    # ours it would export one class of five, and no kernels.
    if own_class.__module__.split(".")[-1] == _MODELING_MODULE:
        own_class._auto_class = None
    try:
        yield
    finally:
        own_class._auto_class = auto_class
        model.__class__ = wrapped_class
        # Left in memory it would be written by `config.save_pretrained` too, into folders without code.
        if auto_map is None:
            del model.config.auto_map
        else:
            model.config.auto_map = auto_map


def _source_file(code_folder: Path, flat_name: str) -> Path:
    """Where a flat file comes from: beside this file, or in the `kernels` folder of the package or the checkout."""
    candidates = [code_folder / flat_name]
    if flat_name.startswith("kernels_"):
        kernel_name = flat_name.removeprefix("kernels_")
        candidates += [code_folder / "kernels" / kernel_name, code_folder.parent / "kernels" / kernel_name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{flat_name}: not found at {' or '.join(str(candidate) for candidate in candidates)}.")
