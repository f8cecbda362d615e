"""Tiny stock checkpoints on disk with a character tokenizer, and helpers for them."""

import json
import os
import string
from pathlib import Path

import torch
from tiny_hosts import ALL_HOSTS, VOCAB_SIZE, tiny_stock_model
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from hf_depthattn.checkpoints.checkpoint_files import INDEX_FILE, SINGLE_FILE

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")

#: label -> host, size of a shard
CHECKPOINTS = {
    "llama": ("llama", "5GB"),
    "llama, sharded": ("llama", "20KB"),
    "qwen3_moe, sharded": ("qwen3_moe", "20KB"),
    "gemma2": ("gemma2", "5GB"),
    "olmo2, sharded": ("olmo2", "20KB"),
    "kimi_linear": ("kimi_linear", "5GB"),
    "qwen3_next": ("qwen3_next", "5GB"),
}
if "exaone" in ALL_HOSTS:
    CHECKPOINTS["exaone"] = ("exaone", "5GB")


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one token per character; unknown characters become `<pad>`."""
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


def save_sparse(folder: Path, config: PreTrainedConfig, *, num_shards: int = 1, skip: str = "") -> Path:
    """Save a causal LM of any size as sparse bfloat16 files with real headers and empty data.

    Args:
        folder: the checkpoint.
        config: config of the host.
        num_shards: number of files.
        skip: name of a tensor to omit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    model.config.save_pretrained(folder)
    weight_map = {}
    names = sorted(name for name in tensors if name != skip)
    for number in range(num_shards):
        header, end = {}, 0
        for name in names[number::num_shards]:
            start, end = end, end + 2 * tensors[name].numel()
            header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        path = folder / (f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" if num_shards > 1 else SINGLE_FILE)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
        weight_map |= dict.fromkeys(header, path.name)
    if num_shards > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_shard(path: Path, header: dict, num_bytes: int) -> None:
    """Save a safetensors file with a given header and number of zero bytes."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))


def load(folder: Path, auto_class=AutoModelForCausalLM):
    """Load a model in eval mode, and assert that no tensors are missing or unexpected."""
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits without a cache and without gradients."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def weights_of(folder: Path) -> list[Path]:
    """Return the weight files of a folder, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def edit_config(folder: Path, **fields) -> None:
    """Write fields into a config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
