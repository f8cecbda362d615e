"""The folder in which code blocks of documents run: checkpoints and texts under the names that examples use."""

from __future__ import annotations

from pathlib import Path

import foreign_checkpoints
from foreign_models import ForeignModel
from model_checks import randomise_depth
from repository import ROOT
from tiny_checkpoints import save_stock, save_tokenizer

from hf_depthattn import DepthAttnForCausalLM, retrofit
from hf_depthattn.eval.verify.default_text import DEFAULT_TEXT


def fill_folder(folder: Path) -> None:
    """Put what examples name into an empty folder.

    `SOURCE`, `STOCK` and `OTHER` are a stock checkpoint of eight layers, `MODEL` and `TUNED` one with AttnRes and MoDA
    that is no longer its host, `FOREIGN` one of flash-linear-attention; `book.txt` is a text, `TEXT` and `folder` are
    folders with it, and `HOST` and `CONFIG` have a config.

    Args:
        folder: the folder.
    """
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("HOST", "CONFIG"):
        (folder / name).symlink_to(ROOT / "examples" / "configs" / "deep_narrow")
    (folder / "book.txt").write_text(DEFAULT_TEXT[:1500], encoding="utf-8")
    for name in ("TEXT", "folder"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text(DEFAULT_TEXT[:1500], encoding="utf-8")
    save_stock(folder / "SOURCE", num_hidden_layers=8)
    retrofit(folder / "SOURCE", folder / "start", num_blocks=4, depth_kv="attention+mlp", progress=False)
    model = DepthAttnForCausalLM.from_pretrained(folder / "start")
    randomise_depth(model)
    model.save_pretrained(folder / "MODEL")
    save_tokenizer(folder / "MODEL")
    save_tokenizer(foreign_checkpoints.fla(folder / "FOREIGN", ForeignModel(sublayers_per_block=4)))
    for name, target in {"STOCK": "SOURCE", "OTHER": "SOURCE", "TUNED": "MODEL"}.items():
        (folder / name).symlink_to(target)
