"""Import a tiny checkpoint of another project, and compare its logits with those of its oracle."""

import json
from pathlib import Path

import pytest
import torch
from foreign_models import IDS, ForeignModel, in_float64
from model_checks import relative_max_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_depthattn import DepthAttnForCausalLM
from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE
from hf_depthattn.conversion.import_checkpoint import ImportReport, import_checkpoint
from hf_depthattn.errors import UserError


def load_complete(folder: Path, **kwargs) -> DepthAttnForCausalLM:
    """Load a checkpoint, and assert that no tensor is missing or unexpected."""
    model, info = DepthAttnForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits_in_float64(folder: Path, ids: Tensor = IDS) -> Tensor:
    """Return the logits of a checkpoint on a Llama-like host, with norms and rotation in float64 too."""
    with torch.no_grad():
        return in_float64(load_complete(folder, dtype=torch.float64))(ids, use_cache=False).logits


def check_golden(logits: Tensor, golden: list[float]) -> None:
    """Check that an oracle still computes the first logits of the last token that it once computed."""
    assert len(golden) == 3
    assert torch.allclose(logits[0, -1, :3], torch.tensor(golden, dtype=torch.float64), rtol=1e-9, atol=1e-10)


def check_import(source: Path, model: ForeignModel) -> ImportReport:
    """Import a checkpoint and check the logits in float64, and in float32 as users load it.

    Args:
        source: the checkpoint.
        model: its oracle.
    """
    out = source.parent / "imported"
    report = import_checkpoint(source, out)
    expected = model.logits()
    assert relative_max_error(logits_in_float64(out), expected) <= 1e-12
    loaded = load_complete(out)
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert relative_max_error(loaded(IDS, use_cache=False).logits.double(), expected) <= 1e-5
    return report


def check_refused(source: Path, out: Path, *words: str) -> None:
    """Check that an import is refused in one line with these words, and leaves nothing behind."""
    with pytest.raises(UserError) as error:
        import_checkpoint(source, out)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert not out.exists()


def edit(folder: Path, tensors: dict[str, Tensor | None] | None = None, **fields) -> Path:
    """Change tensors (`None` removes one) and fields of a checkpoint, nested ones as `model__block__name`."""
    if tensors:
        found = load_file(folder / SINGLE_FILE) | tensors
        save_file({name: value.clone() for name, value in found.items() if value is not None}, folder / SINGLE_FILE)
    config = json.loads((folder / "config.json").read_text())
    for path, value in fields.items():
        *parents, name = path.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder
