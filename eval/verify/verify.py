"""Compare a retrofitted checkpoint with its source: logits, greedy text and perplexity.

The models are loaded one after the other, so only the larger one has to fit into memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ... import modeling_depthattn
from ...checkpoints.carried_files import has_tokenizer
from ...checkpoints.devices import check_device
from ...checkpoints.model_loading import check_token_ids, load_model, load_tokenizer
from ...checkpoints.source_folder import find_folder
from ...conversion.depth_shards import check_depth_tensors
from ...conversion.source import DepthSource, StockSource, read_depth_source, read_stock_source
from ...errors import UserError
from ...utils.argument_checks import DTYPES
from ...utils.paths import user_path
from ...utils.progress import progress_bar
from .comparison import VerifyReport, compare
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

# Enough text for the tokens of `reading` with any tokenizer.
_MAX_CHARACTERS = 2**17


def verify(
    source: str | Path,
    retrofitted: str | Path,
    *,
    text: str | None = None,
    max_new_tokens: int = 32,
    dtype: str = "float32",
    device: str = "cpu",
    revision: str | None = None,
    require_tokenizer: bool = True,
    trust_remote_code: bool = False,
    ignore_model_code: bool = False,
    progress: bool | None = None,
) -> VerifyReport:
    """Compare a retrofitted checkpoint with its source.

    The source is loaded with the classes of transformers, the retrofitted checkpoint with those of this package.
    Checkpoints without a language-modelling head are compared by the first output of the model.

    Args:
        source: the stock checkpoint, a folder or a Hub id.
        retrofitted: folder of the retrofitted checkpoint.
        text: the text to read; by default a passage of English and Python.
        max_new_tokens: length of the greedy text, at most 4096.
        dtype: dtype of both models, one of `utils.argument_checks.DTYPES`.
        device: device of both models.
        revision: branch, tag or commit of a Hub repository.
        require_tokenizer: raise an error if the source has no tokenizer, instead of comparing on fixed random tokens.
        trust_remote_code: allow tokenizer code that is part of the checkpoint.
        ignore_model_code: load a source that contains its own model code with the class of transformers, instead of
            raising an error.
        progress: as in `progress_bar`: `None` shows a bar on a terminal and a line every few seconds elsewhere.

    Returns:
        The rows of the comparison, and whether all of them are within the tolerance.

    Raises:
        UserError: if a checkpoint is missing, damaged, incomplete, of the wrong kind, or has tensors that its model
            does not use.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}.")
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise UserError(f"max_new_tokens: {max_new_tokens} must be between 1 and {MAX_NEW_TOKENS}.")
    check_device(device)
    folder, _ = find_folder(source, revision)
    output = user_path(retrofitted)
    if not output.is_dir():
        raise UserError(f"{retrofitted}: no such folder.")
    stock = read_stock_source(folder, ignore_model_code=ignore_model_code)
    depth = read_depth_source(output)
    _check_same_host(stock, depth)
    # A checkpoint with tensors that its model ignores does not agree with the source.
    check_depth_tensors(output, depth.config, depth.key_prefix, depth.entries)

    if has_tokenizer(folder):
        ids = _text_ids(folder, DEFAULT_TEXT if text is None else text, trust_remote_code)
        perplexity_ids = ids[: PERPLEXITY_TOKENS + 1]
    elif not require_tokenizer:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(stock.config.vocab_size, (NUM_WINDOWS * WINDOW_TOKENS,), generator=generator)
        # The perplexity of random tokens is meaningless.
        perplexity_ids = None
    else:
        raise UserError(
            f"{folder}: has no tokenizer; add its files, or compare on random tokens (`require_tokenizer=False`, "
            "--allow-missing-tokenizer)."
        )
    depth_class = getattr(modeling_depthattn, stock.architecture.depth_class)
    plan = plan_reading(
        ids, perplexity_ids, stock.config, max_new_tokens, with_text=stock.architecture.suffix == "ForCausalLM"
    )
    measured = []
    with progress_bar(2 * plan.num_steps, "verify", progress, unit=" passes") as bar:
        for model_class, path in ((stock.host_class, folder), (depth_class, output)):
            model = load_model(path, model_class=model_class, dtype=getattr(torch, dtype), device=device)
            check_token_ids(ids, model, str(path))
            measured.append(measure(model, plan, bar))
            # Free this model before the next one is loaded.
            del model
    return VerifyReport(str(source), str(retrofitted), dtype, tuple(compare(measured[0], measured[1], dtype)))


def _check_same_host(stock: StockSource, depth: DepthSource) -> None:
    """Check that both checkpoints are of the same model with the same head."""
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        ours, theirs = getattr(depth.config.host_config, name), getattr(stock.config, name)
        if ours != theirs:
            raise UserError(f"{name}: the source has {theirs!r}, the retrofit's host {ours!r}; not the same model.")
    if depth.architecture.depth_class != stock.architecture.depth_class:
        raise UserError(
            f"{depth.folder}: has the class {depth.architecture.depth_class}, but a retrofit of the source has the "
            f"class {stock.architecture.depth_class}."
        )


def _text_ids(folder: Path, text: str, trust_remote_code: bool) -> Tensor:
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    ids = torch.tensor(tokenizer(text[:_MAX_CHARACTERS], verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise UserError(f"text: {len(ids)} tokens are too few to compare anything; give a longer one.")
    return ids
