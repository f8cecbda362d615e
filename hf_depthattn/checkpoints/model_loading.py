"""Load models for the commands, with an error if the checkpoint and the model do not match.

`from_pretrained` only logs missing tensors, which it initialises randomly, and unexpected tensors, which it ignores.
Results of such a model would be wrong, so the functions here raise instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# Registers the model type `depthattn` with transformers' Auto classes.
import hf_depthattn  # noqa: F401

from ..errors import UserError
from ..errors.messages import one_line
from .adapter_files import check_no_adapter
from .carried_files import has_tokenizer
from .checkpoint_files import check_index, read_json, read_weight_files
from .config_check import check_counts
from .devices import check_device
from .foreign_tensors import check_types
from .loading_info import check_loading_info
from .weights_check import check_before_loading

_GENERATION_CONFIG = "generation_config.json"


def load_config(folder: Path, *, name: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the config of a checkpoint.

    Args:
        folder: the checkpoint.
        name: its name in messages; the folder by default.
        trust_remote_code: allow the custom code of a checkpoint.

    Raises:
        UserError: if it is missing or invalid.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config
    except Exception as error:
        # transformers, huggingface_hub and the model's config class each raise errors of their own.
        raise UserError(f"{name or folder}: its config cannot be used: {_reason(error)}") from error


def load_tokenizer(
    folder: Path, *, name: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; arguments as in `load_config`.

    Raises:
        UserError: if there is none, or it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not has_tokenizer(folder):
            raise UserError(f"{name or folder}: has no tokenizer; save one into this folder.") from error
        # Tokenizers are read by several libraries, which raise different errors.
        raise UserError(f"{name or folder}: its tokenizer cannot be loaded: {_reason(error)}") from error


def check_checkpoint(
    folder: Path,
    *,
    model_class: Any = AutoModelForCausalLM,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """Check a checkpoint as far as possible without reading weights, so that errors come early.

    Args:
        folder: the checkpoint.
        model_class: an Auto class or a model class of transformers.
        name: its name in messages; the folder by default.
        trust_remote_code: allow the custom code of a checkpoint.

    Returns:
        Its config.

    Raises:
        UserError: if it is an adapter, its config or a weight file is missing or damaged, or its tensors are not those
            of the model.
    """
    check_no_adapter(folder, name)
    called = name or str(folder)
    check_counts(called, read_json(folder / "config.json"))
    if (folder / _GENERATION_CONFIG).is_file():
        read_json(folder / _GENERATION_CONFIG)
    config = load_config(folder, name=name, trust_remote_code=trust_remote_code)
    entries = dict(read_weight_files(folder).entries())
    check_index(folder)
    if getattr(config, "quantization_config", None) is None:
        check_types(called, entries)
        check_before_loading(called, config, model_class, entries)
    return config


def load_model(
    folder: Path,
    *,
    model_class: Any = AutoModelForCausalLM,
    name: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a model from a checkpoint, check that all tensors match, and set it to evaluation mode.

    Args:
        folder: the checkpoint.
        model_class: an Auto class or a model class of transformers.
        name: its name in messages; the folder by default.
        dtype: dtype of the weights; `"auto"`: that of the checkpoint.
        device: device of the model.
        adapter: folder of a PEFT adapter to load into the model.
        trust_remote_code: allow the custom code of a checkpoint.
        **kwargs: other arguments of `from_pretrained`.

    Raises:
        UserError: if the device cannot be used; a config, a weight file or the adapter is missing or damaged; a tensor
            is missing, has another shape, or is not part of the model; or the model cannot run with its config.
    """
    check_device(device)
    name = name or str(folder)
    model = load_complete(model_class, folder, name=name, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    # Quantised models are already on the device of their quantizer.
    if str(model.device) != device:
        # transformers wraps the method so that mypy takes it for a function.
        model = model.to(device)  # type: ignore[arg-type]
    if adapter is not None:
        from .adapter_loading import load_adapter

        model = load_adapter(model, adapter)
    model.eval()
    _check_runs(model, name)
    return model


@torch.no_grad()
def _check_runs(model: PreTrainedModel, name: str) -> None:
    """Run the model once: some errors in a config only appear then, such as more experts per token than experts."""
    try:
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:
        raise UserError(f"{name}: its model cannot run: {_reason(error)}") from error


def load_complete(model_class: Any, folder: Path, *, name: str, **kwargs: Any) -> PreTrainedModel:
    """Call `from_pretrained`, and raise for problems that it only logs.

    Args:
        model_class: an Auto class or a model class of transformers.
        folder: the checkpoint.
        name: its name in messages.
        **kwargs: other arguments of `from_pretrained`.

    Raises:
        UserError: as in `load_model`.
    """
    trust_remote_code = bool(kwargs.get("trust_remote_code"))
    check_checkpoint(folder, model_class=model_class, name=name, trust_remote_code=trust_remote_code)
    try:
        model, info = model_class.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **kwargs
        )
    except Exception as error:
        # The errors that damaged checkpoints cause have no common class: SafetensorError, errors of strict configs,
        # ZeroDivisionError for a config without heads.
        raise UserError(f"{name}: cannot be loaded: {_reason(error)}") from error
    check_loading_info(info, model, name)
    return cast(PreTrainedModel, model)


def check_token_ids(ids: Iterable[int] | torch.Tensor, model: PreTrainedModel, name: str) -> None:
    """Check that the model has embeddings for all token ids.

    Args:
        ids: the token ids.
        model: the model.
        name: name of the checkpoint in messages.

    Raises:
        UserError: if the largest id is too large.
    """
    largest = int(ids.max()) if isinstance(ids, torch.Tensor) else max(ids, default=0)
    num_embeddings = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if largest >= num_embeddings:
        raise UserError(
            f"{name}: its tokenizer returns token id {largest}, but the model has only {num_embeddings} embeddings."
        )


def _reason(error: Exception) -> str:
    """Return the message of an error in one line, with the class of errors whose message means little alone."""
    said = one_line(error)
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    is_bare = isinstance(cause, LookupError | ArithmeticError | TypeError | AttributeError | AssertionError)
    return f"{type(cause).__name__}: {said}" if is_bare and type(cause).__name__ != said else said
