"""The one way by which commands load a model: all of the checkpoint that was named, or one line that says why not.

`from_pretrained` starts what a checkpoint lacks at random and leaves out what it has no place for; both are only
logged. A score of such a model is a score of another model, so nothing here returns one.
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
from .checkpoint_files import check_index, read_json, read_weight_files
from .config_check import check_counts
from .devices import check_device
from .foreign_tensors import check_types
from .loading_info import check_loading_info
from .weights_check import check_before_loading

_GENERATION_CONFIG = "generation_config.json"


def load_config(folder: Path, *, name: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a checkpoint.

    Args:
        folder: the checkpoint.
        name: how the user named it; the folder by default.
        trust_remote_code: for a checkpoint that brings its own code.

    Raises:
        UserError: it is missing or invalid.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return config
    except Exception as error:
        # Strict configs raise errors of their own, by transformers, huggingface_hub or the model's config class.
        raise UserError(f"{name or folder}: its config cannot be used: {_reason(error)}") from error


def load_tokenizer(
    folder: Path, *, name: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; arguments as in `load_config`.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Tokenizer files of every origin are read here, and each library raises its own errors.
        raise UserError(f"{name or folder}: its tokenizer cannot be loaded: {_reason(error)}") from error


def check_checkpoint(
    folder: Path,
    *,
    model_class: Any = AutoModelForCausalLM,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """Refuse what can be seen to be wrong without reading a weight, so that no work is lost over it.

    Args:
        folder: the checkpoint.
        model_class: an Auto class or a model class of transformers.
        name: how the user named it; the folder by default.
        trust_remote_code: for a checkpoint that brings its own code.

    Returns:
        Its config.

    Raises:
        UserError: an adapter instead of a model; a config or a weight file that is missing or damaged; tensors
            that are not those of the model.
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
    """Load a checkpoint completely, in evaluation mode.

    Args:
        folder: the checkpoint.
        model_class: an Auto class or a model class of transformers.
        name: how the user named the checkpoint; the folder by default.
        dtype: of the weights; `"auto"` is the checkpoint's own.
        device: where the model runs.
        adapter: folder of a PEFT adapter on top of it.
        trust_remote_code: for a checkpoint that brings its own code.
        **kwargs: of `from_pretrained`.

    Raises:
        UserError: a device that cannot be used; a config, a weight file or an adapter that is missing or
            damaged; a tensor that is missing, has another shape, or has no place in the model; a config with which
            the model cannot run.
    """
    check_device(device)
    name = name or str(folder)
    model = load_complete(model_class, folder, name=name, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    # Quantised models are where their quantiser has put them.
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
    """Some values of a config only show when a model runs: more experts per token than there are, and the like."""
    try:
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:
        raise UserError(f"{name}: its model cannot run: {_reason(error)}") from error


def load_complete(model_class: Any, folder: Path, *, name: str, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained` that refuses what it would only log.

    Args:
        model_class: an Auto class or a model class of transformers.
        folder: the checkpoint.
        name: how the user named it.
        **kwargs: of `from_pretrained`.

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
        # What a damaged checkpoint makes libraries raise has no common class: SafetensorError, errors of strict
        # configs, ZeroDivisionError for a width without heads.
        raise UserError(f"{name}: cannot be loaded: {_reason(error)}") from error
    check_loading_info(info, model, name)
    return cast(PreTrainedModel, model)


def check_token_ids(ids: Iterable[int] | torch.Tensor, model: PreTrainedModel, name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        ids: of a text.
        model: the model that would read them.
        name: how the user named the checkpoint.

    Raises:
        UserError: the largest is too large.
    """
    largest = int(ids.max()) if isinstance(ids, torch.Tensor) else max(ids, default=0)
    num_embeddings = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if largest >= num_embeddings:
        raise UserError(f"{name}: its tokenizer gives token {largest}, the model knows {num_embeddings}.")


def _reason(error: Exception) -> str:
    """The message of an error; one that is only a name or a number says what kind it is."""
    said = one_line(error)
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    is_bare = isinstance(cause, LookupError | ArithmeticError | TypeError | AttributeError | AssertionError)
    return f"{type(cause).__name__}: {said}" if is_bare and type(cause).__name__ != said else said
