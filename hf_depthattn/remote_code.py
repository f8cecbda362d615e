"""Copy the model code into a checkpoint, so that it loads with `trust_remote_code=True` without this package.

transformers loads remote code from flat folders and only supports imports of the form `from .module import name`. The
model files use this form. Kernel files are in a sub-package, so imports of `.kernels.<name>` are rewritten to
`.kernels_<name>`, and the files are copied under that name. The files are found by following the imports of the
modeling file.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.utils import cached_file, logging

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

logger = logging.get_logger(__name__)

_MODELING_MODULE = "modeling_depthattn"
_CONFIGURATION_MODULE = "configuration_depthattn"
MODELING_FILE = f"{_MODELING_MODULE}.py"
CONFIGURATION_FILE = f"{_CONFIGURATION_MODULE}.py"

#: Auto class -> our class, for `config.auto_map`.
AUTO_MAP = {
    "AutoConfig": "configuration_depthattn.DepthAttnConfig",
    "AutoModel": "modeling_depthattn.DepthAttnModel",
    "AutoModelForCausalLM": "modeling_depthattn.DepthAttnForCausalLM",
    "AutoModelForSequenceClassification": "modeling_depthattn.DepthAttnForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_depthattn.DepthAttnForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_depthattn.DepthAttnForQuestionAnswering",
}

# The base model in the `auto_map` of configs that change attention.
_MODEL_WITH_OWN_ATTENTION = "modeling_depthattn.DepthAttnModelWithOwnAttention"

_RELATIVE_IMPORT = re.compile(r"^(\s*from )\.(\w+(?:\.\w+)*)( import )", re.MULTILINE)


def export_model_code(folder: str | os.PathLike, config: "PreTrainedConfig | None" = None) -> list[Path]:
    """Write the modeling file and all files that it imports from this package into a flat folder.

    Args:
        folder: an existing checkpoint folder.
        config: the config that is saved there. If this code was itself loaded as remote code with only a config, it
            has only the files that the config imports; the others are copied from the origin of the config.

    Returns:
        The files; identical existing files are not rewritten.

    Raises:
        FileNotFoundError: if a file is not found; nothing is written.
    """
    own_folder = Path(__file__).parent
    texts: dict[str, str] = {}
    pending = [MODELING_FILE, CONFIGURATION_FILE]
    while pending:
        name = pending.pop()
        if name in texts:
            continue
        text = _source_file(own_folder, name, Path(folder), config).read_text(encoding="utf-8")
        inside_kernels = name.startswith("kernels_")

        def flatten(match: re.Match, inside_kernels: bool = inside_kernels) -> str:
            module = match[2].replace(".", "_")
            # Kernel files import each other; in the flat folder, their names have the prefix `kernels_`.
            if inside_kernels and not module.startswith("kernels_"):
                module = f"kernels_{module}"
            pending.append(f"{module}.py")
            return f"{match[1]}.{module}{match[3]}"

        texts[name] = _RELATIVE_IMPORT.sub(flatten, text)
    for name, text in texts.items():
        target = Path(folder) / name
        if target.is_file() and target.read_text(encoding="utf-8") == text:
            continue
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    return [Path(folder) / name for name in texts]


def without_code(files_timestamps: dict[str, float]) -> dict[str, float]:
    """Return the timestamps without Python files, so that `push_to_hub` treats those as modified and uploads them."""
    return {name: time for name, time in files_timestamps.items() if not name.endswith(".py")}


@contextmanager
def saved_with_code(config: "PreTrainedConfig", folder: str | os.PathLike) -> Iterator[None]:
    """Within the context, let a config be saved with the model code and a complete `auto_map`.

    Args:
        config: the config, which is unchanged afterwards.
        folder: the folder to save to, created if necessary.
    """
    os.makedirs(folder, exist_ok=True)
    auto_map = getattr(config, "auto_map", None)
    # Entries of code that is not ours: a tokenizer, a user's subclass.
    others = {auto: name for auto, name in (auto_map or {}).items() if _is_elsewhere(auto, name, folder)}
    try:
        export_model_code(folder, config)
        own = {"AutoModel": _MODEL_WITH_OWN_ATTENTION} if getattr(config, "changes_attention", False) else {}
        config.auto_map = {**AUTO_MAP, **own, **others}
    except FileNotFoundError as error:
        logger.warning(f"The model code could not be saved ({error}) Install hf_depthattn to load the folder.")
        config.auto_map = others
    # A class loaded as remote code is registered, and transformers would copy only the files that the config imports.
    is_ours = type(config).__module__.rpartition(".")[2] == _CONFIGURATION_MODULE
    if is_ours:
        config._auto_class = None  # type: ignore[misc]
    try:
        yield
    finally:
        if is_ours:
            del config._auto_class
        if auto_map is None:
            del config.auto_map
        else:
            config.auto_map = auto_map


def _is_elsewhere(auto_name: str, reference: object, folder: str | os.PathLike) -> bool:
    """Return whether an entry of an `auto_map` is kept: another Auto class, or a class whose file is in the folder."""
    if auto_name not in AUTO_MAP:
        return True
    module = reference.partition(".")[0] if isinstance(reference, str) else ""
    is_ours = module in (_CONFIGURATION_MODULE, _MODELING_MODULE)
    return not is_ours and (Path(folder) / f"{module}.py").is_file()


@contextmanager
def saved_as_own_class(model: "PreTrainedModel") -> Iterator[None]:
    """Within the context, let a model be saved under the public name of its class.

    Args:
        model: the model, which is unchanged afterwards.
    """
    class_in_memory = type(model)
    # FSDP2 changes the class of a wrapped model to one of torch, and transformers would copy the files of torch.
    on_host = next(cls for cls in class_in_memory.__mro__ if not cls.__module__.startswith("torch."))
    own_class: type[PreTrainedModel] = getattr(on_host, "_own_class", None) or on_host
    namespace: dict[str, str | None] = {"__module__": own_class.__module__}
    # transformers copies the file of a user's subclass that is registered for an Auto class. The files of our own
    # classes are copied with the config.
    if own_class.__module__.split(".")[-1] == _MODELING_MODULE:
        namespace["_auto_class"] = None
    # transformers looks up renamings by class name, so they are determined before the class changes.
    has_renamings = hasattr(model, "_weight_conversions")
    if not has_renamings:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in mapping if not isinstance(entry, PrefixChange)]
        # To torch's types, every attribute is a tensor or a module.
        model._weight_conversions = conversions  # type: ignore[assignment]
    model.__class__ = type(own_class.__name__, (on_host,), namespace)
    try:
        yield
    finally:
        model.__class__ = class_in_memory
        if not has_renamings:
            del model._weight_conversions


def _source_file(own_folder: Path, flat_name: str, target: Path, config: "PreTrainedConfig | None") -> Path:
    """Return the source of a file in the flat folder: in this package, or where the config was loaded from."""
    candidates = [own_folder / flat_name]
    if flat_name.startswith("kernels_"):
        kernel_name = flat_name.removeprefix("kernels_")
        candidates += [own_folder / "kernels" / kernel_name, own_folder.parent / "kernels" / kernel_name]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if config is not None:
        # If a model is saved, all files have already been written to the target before its config is saved.
        for folder in (target, Path(config.name_or_path or ""), *own_folder.parent.iterdir()):
            if (folder / flat_name).is_file() and _is_same_version(folder, own_folder):
                return folder / flat_name
        from_hub = _from_hub(config.name_or_path or "", flat_name, revision=own_folder.name)
        if from_hub is not None:
            return from_hub
    raise FileNotFoundError(f"{flat_name}: not found at {' or '.join(str(candidate) for candidate in candidates)}.")


def _is_same_version(folder: Path, own_folder: Path) -> bool:
    other = folder / CONFIGURATION_FILE
    return other.is_file() and other.read_bytes() == (own_folder / CONFIGURATION_FILE).read_bytes()


def _from_hub(repo_id: str, name: str, revision: str) -> Path | None:
    """Return a file of the Hub repository from which remote code was loaded; its folder is named after the commit."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        return None
    try:
        file = cached_file(repo_id, name, revision=revision)
    except OSError:
        return None
    return None if file is None else Path(file)
