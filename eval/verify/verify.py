"""Compares a retrofitted checkpoint with its source: logits, greedy text, perplexity.

The two models are loaded one after the other, so the larger one has to fit into memory, not both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import hf_depthattn

from ...checkpoints.carried_files import has_tokenizer
from ...checkpoints.checkpoint_files import read_weight_files
from ...checkpoints.devices import check_device
from ...checkpoints.foreign_tensors import check_stock_tensors
from ...checkpoints.model_loading import check_token_ids, load_model, load_tokenizer
from ...checkpoints.source_folder import find_folder
from ...configuration_depthattn import DepthAttnConfig
from ...conversion.depth_shards import check_depth_tensors
from ...conversion.sources import (
    Architecture,
    architecture_of,
    depth_architecture_of,
    host_class_of,
    key_prefix_of,
    read_depth_config,
    read_host_config,
)
from ...errors import UserError
from ...utils.paths import user_path
from ...utils.progress import progress_bar
from .comparison import TOLERANCES, VerifyReport, compare
from .default_text import DEFAULT_TEXT
from .reading import (
    MAX_NEW_TOKENS,
    NUM_WINDOWS,
    PERPLEXITY_TOKENS,
    WINDOW_TOKENS,
    measure,
    plan_reading,
)

__all__ = ["check_device", "verify"]

# Enough characters for the tokens above, whatever the tokenizer.
_MAX_CHARACTERS = 2**17


def verify(
    source: str | Path,
    output_dir: str | Path,
    *,
    text: str | None = None,
    max_new_tokens: int = 32,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    allow_missing_tokenizer: bool = False,
    trust_remote_code: bool = False,
    ignore_model_code: bool = False,
    progress: bool | None = None,
) -> VerifyReport:
    """Compare a retrofitted checkpoint with its source.

    The source is loaded by transformers' own classes, the other by the classes of this package. Checkpoints without a
    language-modelling head are compared by what their model returns first.

    Args:
        source: the stock checkpoint, a folder or a Hub id.
        output_dir: the retrofitted one.
        text: what to read; by default a passage of English and of Python.
        max_new_tokens: length of the greedy text, at most 4096.
        dtype: a key of `TOLERANCES`; both models run in it.
        device: where they run.
        revision: branch, tag or commit of a Hub repository.
        allow_missing_tokenizer: without a tokenizer, compare on fixed random tokens instead of raising.
        trust_remote_code: for tokenizers that bring their own code.
        ignore_model_code: take transformers' class for a source that brings its own model code, instead of raising.
        progress: as in `progress_bar`: `None` shows a bar on a terminal and a line every few seconds elsewhere.

    Returns:
        The rows of the comparison, and whether they are all within the tolerance.

    Raises:
        UserError: a checkpoint that is missing, damaged, incomplete or of the wrong kind, or holds tensors that
            its model would leave out; the message is one line.
    """
    if dtype not in TOLERANCES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(TOLERANCES)}.")
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise UserError(f"max_new_tokens: {max_new_tokens} must be between 1 and {MAX_NEW_TOKENS}.")
    check_device(device)
    folder, _ = find_folder(source, revision)
    output = user_path(output_dir)
    if not output.is_dir():
        raise UserError(f"{output_dir}: no such folder.")
    host = read_host_config(folder, ignore_model_code=ignore_model_code)
    config = read_depth_config(output)
    _check_same_host(host, config)
    host_class, architecture = _check_source(folder, host)
    _check_output(output, config, architecture)

    if has_tokenizer(folder):
        ids = _text_ids(folder, DEFAULT_TEXT if text is None else text, trust_remote_code)
        perplexity_ids = ids[: PERPLEXITY_TOKENS + 1]
    elif allow_missing_tokenizer:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(host.vocab_size, (NUM_WINDOWS * WINDOW_TOKENS,), generator=generator)
        # The perplexity of noise says nothing.
        perplexity_ids = None
    else:
        raise UserError(
            f"{folder}: no tokenizer in it; add its files, or compare on random tokens (--allow-missing-tokenizer)."
        )
    depth_class = getattr(hf_depthattn, architecture.depth_class)
    plan = plan_reading(ids, perplexity_ids, host, max_new_tokens, with_text=architecture.suffix == "ForCausalLM")
    measured = []
    with progress_bar(2 * plan.num_steps, "verify", progress, unit=" passes") as bar:
        for model_class, path in ((host_class, folder), (depth_class, output)):
            model = load_model(path, model_class=model_class, dtype=getattr(torch, dtype), device=device)
            check_token_ids(ids, model, str(path))
            measured.append(measure(model, plan, bar))
            # This one goes before the next one is loaded.
            del model
    return VerifyReport(str(source), str(output_dir), dtype, tuple(compare(*measured, dtype)))


def _check_source(folder: Path, host: PreTrainedConfig) -> tuple[type[PreTrainedModel], Architecture]:
    """The class of the stock checkpoint, if the checkpoint is no more than that class makes of it."""
    weights = read_weight_files(folder)
    check_stock_tensors(folder, dict(weights.entries()))
    architecture = architecture_of(folder, host, key_prefix_of(folder, weights, host.num_hidden_layers))
    return host_class_of(folder, host, architecture), architecture


def _check_output(folder: Path, config: DepthAttnConfig, expected: Architecture) -> None:
    """Refuse a checkpoint with another head, or with depth tensors that its model would leave out."""
    architecture = depth_architecture_of(folder, config)
    if architecture.depth_class != expected.depth_class:
        raise UserError(
            f"{folder}: is a {architecture.depth_class}, the retrofit of the source is a {expected.depth_class}."
        )
    weights = read_weight_files(folder)
    key_prefix = key_prefix_of(folder, weights, config.text_config.num_hidden_layers)
    check_depth_tensors(folder, config, key_prefix, dict(weights.entries()))


def _check_same_host(host: PreTrainedConfig, config: DepthAttnConfig) -> None:
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        ours, theirs = getattr(config.text_config, name), getattr(host, name)
        if ours != theirs:
            raise UserError(f"{name}: the source has {theirs!r}, the retrofit's host {ours!r}; not the same model.")


def _text_ids(folder: Path, text: str, trust_remote_code: bool) -> Tensor:
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = torch.tensor(tokenizer(text[:_MAX_CHARACTERS], verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise UserError(f"text: {len(ids)} tokens are too few to compare anything; give a longer one.")
    return ids
