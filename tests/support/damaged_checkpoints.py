"""Ways to damage a tiny checkpoint, and the error messages expected for some of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config

Tensors = dict[str, torch.Tensor]
PROJECTION = "model.layers.1.self_attn.q_proj"


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit the tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def unmerged_lora(tensors: Tensors) -> None:
    weight = tensors.pop(f"{PROJECTION}.weight")
    tensors[f"{PROJECTION}.base_layer.weight"] = weight
    tensors[f"{PROJECTION}.lora_A.default.weight"] = torch.zeros(4, weight.shape[1])
    tensors[f"{PROJECTION}.lora_B.default.weight"] = torch.zeros(weight.shape[0], 4)


def gptq(tensors: Tensors) -> None:
    tensors.pop(f"{PROJECTION}.weight")
    for name in ("qweight", "qzeros", "g_idx"):
        tensors[f"{PROJECTION}.{name}"] = torch.zeros(3, dtype=torch.int32)
    tensors[f"{PROJECTION}.scales"] = torch.zeros(3)


def float8(tensors: Tensors) -> None:
    tensors[f"{PROJECTION}.weight"] = tensors[f"{PROJECTION}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{PROJECTION}.weight_scale"] = torch.ones(1)


#: label -> function that edits the tensors, config fields, expected message
DAMAGE = {
    "missing tensor": (
        lambda t: t.pop(f"{PROJECTION}.weight"),
        {},
        rf"lacks tensors of the model \({PROJECTION}.weight\)",
    ),
    "missing embedding": (
        lambda t: t.pop("model.embed_tokens.weight"),
        {},
        r"lacks tensors of the model \(model.embed_tokens.weight\)",
    ),
    "untied missing head": (
        lambda t: t.pop("lm_head.weight", None),
        {"tie_word_embeddings": False},
        r"lacks tensors of the model \(lm_head.weight\)",
    ),
    "unmerged LoRA": (
        unmerged_lora,
        {},
        rf"of an adapter that was not merged \({PROJECTION}.base_layer.weight and 2 more\)",
    ),
    "GPTQ": (gptq, {}, rf"weights packed by a quantizer \({PROJECTION}.g_idx and 3 more\)"),
    "FP8 with scales": (float8, {}, rf"{PROJECTION}.weight. has the dtype F8_E4M3"),
    "another shape": (
        lambda t: t.update({f"{PROJECTION}.weight": torch.zeros(3, 5)}),
        {},
        rf"of other shapes than in its config \({PROJECTION}.weight: \[3, 5\], not \[32, 32\]\)",
    ),
    "foreign depth parameters": (
        lambda t: t.update(
            {"model.layers.0.attn_res_proj.weight": torch.ones(1, 32), "model.res_norm.weight": torch.ones(32)}
        ),
        {},
        r"that LlamaForCausalLM does not have \(model.layers.0.attn_res_proj.weight and 1 more\)",
    ),
    "more layers than the config has": (
        lambda t: None,
        {"num_hidden_layers": 2},
        r"that LlamaForCausalLM does not have \(model.layers.2.\S+ and \d more\)",
    ),
    "a bias that the config leaves out": (
        lambda t: t.update({f"{PROJECTION}.bias": torch.ones(32)}),
        {},
        rf"that LlamaForCausalLM does not have \({PROJECTION}.bias\)",
    ),
}


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def spoil_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F99"', 1))


#: label -> function that damages the folder
DAMAGED_FILES = {
    "cut short": cut,
    "unknown dtype in the header": spoil_header,
    "not safetensors": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "config is no JSON": lambda f: (f / "config.json").write_text("{"),
    "unknown model type": lambda f: edit_config(f, model_type="nothing"),
    "wrong type in the config": lambda f: edit_config(f, hidden_size="wide"),
    "no heads": lambda f: edit_config(f, num_attention_heads=0),
    "negative size": lambda f: edit_config(f, vocab_size=-5),
    "no such activation": lambda f: edit_config(f, hidden_act="nothing"),
    "wrong RoPE": lambda f: edit_config(f, rope_parameters=[1]),
    "adapter beside the model": lambda f: (f / "adapter_config.json").write_text("{}"),
}
