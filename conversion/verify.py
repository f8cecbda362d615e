"""Compares a retrofitted checkpoint with its source: logits, greedy text, perplexity.

The two models are loaded one after the other, so the larger one has to fit into memory, not both.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

import hf_depthattn
from hf_depthattn.configuration_depthattn import DepthAttnConfig
from hf_depthattn.conversion.checkpoint_files import ConversionError, read_weight_files
from hf_depthattn.conversion.comparison import TOLERANCES, Measured, VerifyReport, compare
from hf_depthattn.conversion.devices import check_device
from hf_depthattn.conversion.output_folder import has_tokenizer
from hf_depthattn.conversion.sources import (
    Architecture,
    depth_architecture_of,
    find_folder,
    one_line,
    read_depth_config,
    read_host_config,
)
from hf_depthattn.conversion.verify_text import DEFAULT_TEXT
from hf_depthattn.eval.perplexity import perplexity

#: Logits are compared on this many windows of the text, spread over it, each of at most this many tokens.
NUM_WINDOWS, WINDOW_TOKENS = 4, 128
#: Perplexity is measured on the first tokens of the text.
PERPLEXITY_TOKENS = 4096
PERPLEXITY_WINDOW = 512
#: The greedy text continues this many tokens of each of the first windows.
NUM_PROMPTS, PROMPT_TOKENS = 2, 16

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
) -> VerifyReport:
    """Compare a retrofitted checkpoint with its source.

    The source is loaded by transformers' own classes, the other by the classes of this package. Checkpoints without a
    language-modelling head are compared by what their model returns first.

    Args:
        source: the stock checkpoint, a folder or a Hub id.
        output_dir: the retrofitted one.
        text: what to read; by default a passage of English and of Python.
        max_new_tokens: length of the greedy text.
        dtype: a key of `TOLERANCES`; both models run in it.
        device: where they run.
        revision: branch, tag or commit of a Hub repository.
        allow_missing_tokenizer: without a tokenizer, compare on fixed random tokens instead of raising.
        trust_remote_code: for tokenizers that bring their own code.

    Returns:
        The rows of the comparison, and whether they are all within the tolerance.

    Raises:
        ConversionError: a checkpoint that is missing, damaged or of the wrong kind; the message is one line.
    """
    if dtype not in TOLERANCES:
        raise ConversionError(f"dtype: {dtype!r} is not one of {', '.join(TOLERANCES)}.")
    if max_new_tokens < 1:
        raise ConversionError(f"max_new_tokens: {max_new_tokens} must be at least 1.")
    check_device(device)
    folder, _ = find_folder(source, revision)
    output = Path(output_dir).expanduser()
    if not output.is_dir():
        raise ConversionError(f"{output_dir}: no such folder.")
    host = read_host_config(folder)
    config = read_depth_config(output)
    architecture = depth_architecture_of(output, config)
    _check_same_host(host, config)
    for checkpoint in (folder, output):
        read_weight_files(checkpoint)

    if has_tokenizer(folder):
        ids = _text_ids(folder, DEFAULT_TEXT if text is None else text, trust_remote_code)
        perplexity_ids = ids[: PERPLEXITY_TOKENS + 1]
    elif allow_missing_tokenizer:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(host.vocab_size, (NUM_WINDOWS * WINDOW_TOKENS,), generator=generator)
        # The perplexity of noise says nothing.
        perplexity_ids = None
    else:
        raise ConversionError(
            f"{folder}: no tokenizer in it; add its files, or compare on random tokens (--allow-missing-tokenizer)."
        )
    if ids.max() >= host.vocab_size:
        raise ConversionError(f"{folder}: its tokenizer gives token {ids.max()}, the model knows {host.vocab_size}.")
    host_class = getattr(transformers, architecture.auto_class)
    depth_class = getattr(hf_depthattn, architecture.depth_class)
    measured = [
        _measure(cls, path, architecture, ids, perplexity_ids, max_new_tokens, dtype, device)
        for cls, path in ((host_class, folder), (depth_class, output))
    ]
    return VerifyReport(str(source), str(output_dir), dtype, tuple(compare(*measured, dtype)))


def _check_same_host(host: PreTrainedConfig, config: DepthAttnConfig) -> None:
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        ours, theirs = getattr(config.text_config, name), getattr(host, name)
        if ours != theirs:
            raise ConversionError(
                f"{name}: the source has {theirs!r}, the retrofit's host {ours!r}; not the same model."
            )


def _text_ids(folder: Path, text: str, trust_remote_code: bool) -> Tensor:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Tokenizer files of every origin are read here, and each library raises its own errors.
        raise ConversionError(f"{folder}: its tokenizer cannot be loaded: {one_line(error)}") from error
    ids = torch.tensor(tokenizer(text[:_MAX_CHARACTERS], verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise ConversionError(f"text: {len(ids)} tokens are too few to compare anything; give a longer one.")
    return ids


@torch.no_grad()
def _measure(
    model_class: type[PreTrainedModel],
    folder: Path,
    architecture: Architecture,
    ids: Tensor,
    perplexity_ids: Tensor | None,
    max_new_tokens: int,
    dtype: str,
    device: str,
) -> Measured:
    try:
        model, info = model_class.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
        model = model.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        absent = sorted(str(key) for key in (*info["missing_keys"], *info["mismatched_keys"]))
        raise ConversionError(f"{folder}: {len(absent)} tensors of the model are not in it, first {absent[0]}.")
    limit = getattr(model.config, "max_position_embeddings", None) or WINDOW_TOKENS + max_new_tokens
    windows = _windows(ids, min(WINDOW_TOKENS, limit))
    outputs = [model(window[None].to(device), use_cache=False)[0].cpu() for window in windows]
    measured = Measured(outputs, [], [])
    if architecture.suffix != "ForCausalLM":
        return measured
    num_new = min(max_new_tokens, limit - 1)
    for window in windows[:NUM_PROMPTS]:
        prompt = window[None, : min(PROMPT_TOKENS, limit - num_new)].to(device)
        generated = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_new,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
            output_logits=True,
        )
        measured.greedy_tokens.append(generated.sequences[0, prompt.shape[1] :].tolist())
        measured.greedy_logits.append(torch.cat(generated.logits).cpu())
    if perplexity_ids is not None:
        window = min(PERPLEXITY_WINDOW, limit)
        result = perplexity(model, perplexity_ids, None, window=window, stride=window)
        measured.perplexity, measured.num_perplexity_tokens = result.perplexity, result.num_tokens
    return measured


def _windows(ids: Tensor, num_tokens: int) -> list[Tensor]:
    """At most `NUM_WINDOWS` pieces of a text, spread evenly from its first token to its last."""
    num_tokens = min(num_tokens, len(ids))
    num_windows = min(NUM_WINDOWS, len(ids) // num_tokens)
    step = (len(ids) - num_tokens) / max(num_windows - 1, 1)
    return [ids[round(i * step) :][:num_tokens] for i in range(num_windows)]
