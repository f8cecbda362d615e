"""Tiny stock checkpoints on disk, with a tokenizer by character, and what tests do with them."""

import json
import string
from pathlib import Path

import torch
from tiny_hosts import VOCAB_SIZE, tiny_stock_model
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

#: label -> host, size of a shard
CHECKPOINTS = {
    "llama": ("llama", "5GB"),
    "llama, sharded": ("llama", "20KB"),
    "qwen3_moe, sharded": ("qwen3_moe", "20KB"),
    "gemma2": ("gemma2", "5GB"),
    "olmo2, sharded": ("olmo2", "20KB"),
    "kimi_linear": ("kimi_linear", "5GB"),
}


def save_tokenizer(folder: Path) -> None:
    """One token per character; what the vocabulary has no room for is `<pad>`."""
    characters = [*string.ascii_letters, *string.digits, *" \n.,:;()[]{}'\"=+-*/<>_"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters][:VOCAB_SIZE])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", **names).save_pretrained(folder)


def save_stock(
    folder: Path, model_type: str = "llama", *, max_shard_size: str = "5GB", tokenizer: bool = True, **overrides
) -> Path:
    """Save a tiny stock causal LM with random weights.

    Args:
        folder: the checkpoint.
        model_type: the host.
        max_shard_size: as in `save_pretrained`; `"20KB"` gives several shards.
        tokenizer: add the tokenizer.
        **overrides: config fields.
    """
    torch.manual_seed(0)
    tiny_stock_model(model_type, **overrides).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def load(folder: Path, auto_class=AutoModelForCausalLM):
    """The model of a folder that holds exactly its tensors, in eval mode."""
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Without a cache and without gradients."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a folder, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def edit_config(folder: Path, **fields) -> None:
    """Write fields into a config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
