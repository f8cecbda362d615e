"""Load a PEFT adapter, and check that all of its tensors are loaded.

PEFT silently ignores tensors that do not belong to the model, such as those of an adapter for a model with MoDA on a
model without it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from ..errors import UserError
from ..errors.messages import one_line
from ..integrations.trainer import is_depth_name
from .adapter_files import adapter_folder
from .old_adapters import in_present_layout

if TYPE_CHECKING:
    from peft import PeftModel

# Prompt tuning has these outside the state dict.
_OUTSIDE_OF_STATE_DICT = "prompt_embeddings"


def load_adapter(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Load an adapter into a model.

    Args:
        model: a model of transformers, on its device; it is modified.
        adapter: folder of the adapter.

    Returns:
        The `PeftModel`, in evaluation mode; it has the attributes of the model too.

    Raises:
        UserError: if peft is not installed, the adapter is damaged, or one of its tensors does not fit the model.
    """
    folder = adapter_folder(adapter)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError("peft is not installed; pip install 'hf-depthattn[peft]'.") from error
    where = f"--peft {adapter}"
    try:
        with in_present_layout(folder) as folder, warnings.catch_warnings():
            # Missing keys are checked below.
            warnings.simplefilter("ignore")
            # Otherwise PEFT chooses a device itself.
            device = str(model.device)
            adapted = PeftModel.from_pretrained(model, folder, torch_device=device)
            # Loaded a second time, since `from_pretrained` does not report unexpected keys; adapters are small.
            result = adapted.load_adapter(folder, "default", torch_device=device)
    except Exception as error:
        # PEFT raises errors of many classes: for shapes, kinds of adapters and versions.
        raise UserError(f"{where}: does not fit the model: {one_line(error)}") from error
    homeless = sorted(key for key in result.unexpected_keys if key != _OUTSIDE_OF_STATE_DICT)
    if homeless:
        raise UserError(
            f"{where}: {type(model).__name__} does not have {len(homeless)} of its tensors (first {homeless[0]}); "
            "give the base model that it was trained on."
        )
    # The targets of an adapter of the stock host may also match MoDA's projections: their LoRA matrices are
    # initialised to zero and have no effect.
    if missing := sorted(key for key in result.missing_keys if not is_depth_name(key)):
        raise UserError(
            f"{where}: lacks {len(missing)} tensors of its layers (first {missing[0]}); give the base model that it "
            "was trained on."
        )
    return cast(PreTrainedModel, adapted.eval())


def merge_adapter(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Return the model with the adapter merged into its weights, without PEFT's layers.

    Args:
        model: the model returned by `load_adapter`.
        adapter: folder of the adapter, for messages.

    Raises:
        UserError: if this kind of adapter cannot be merged, such as prompt tuning.
    """
    try:
        merged: PreTrainedModel = cast("PeftModel", model).merge_and_unload().eval()
        return merged
    except Exception as error:
        # Kinds of adapters raise different errors, or do not have the method.
        raise UserError(f"--peft {adapter}: cannot be merged into the model: {one_line(error)}") from error
