"""Helpers of the tests of reports: a tiny checkpoint with random depth parameters, its stock one, typed reports."""

from pathlib import Path
from typing import Any

import torch
from model_checks import depth_model, randomise_depth
from tiny_checkpoints import save_stock, save_tokenizer
from transformers import AutoModelForCausalLM

from hf_depthattn.eval.report.result import (
    MeasuredCost,
    MeasuredModel,
    MeasureSettings,
    ModelInfo,
    Report,
    ReportedText,
)
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT

#: Options for small windows, so that a report takes a second or two.
SIZES = ("--num-sequences", "4", "--sequence-length", "16")


def save_both(folder: Path) -> tuple[Path, Path, Path]:
    """Save a model with AttnRes, MoDA and non-zero queries and gates, its stock checkpoint, and a text."""
    stock = save_stock(folder / "stock")
    torch.manual_seed(1)
    model = depth_model(
        AutoModelForCausalLM.from_pretrained(stock), connection="attn_res", sublayers_per_block=2, depth_kv="attention"
    )
    randomise_depth(model)
    model.save_pretrained(folder / "depth")
    save_tokenizer(folder / "depth")
    text = folder / "text.txt"
    text.write_text(DEFAULT_TEXT, encoding="utf-8")
    return folder / "depth", stock, text


def typed_report(content: dict[str, Any]) -> Report:
    """Convert the content of report.json to a `Report`."""
    compare = None if content["compare"] is None else typed_model(content["compare"])
    parts = {"text": ReportedText(**content["text"]), "model": typed_model(content["model"]), "compare": compare}
    return Report(**{**content, **parts})


def typed_model(content: dict[str, Any]) -> MeasuredModel:
    """Convert the content for one model to a `MeasuredModel`."""
    return MeasuredModel(
        **{
            **content,
            "info": ModelInfo.from_dict(content["info"]),
            "settings": MeasureSettings(**content["settings"]),
            "costs": {name: MeasuredCost(**cost) for name, cost in content["costs"].items()},
        }
    )
