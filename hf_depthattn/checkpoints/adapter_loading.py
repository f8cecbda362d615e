"""Loading a PEFT adapter, where every tensor of it finds its place.

PEFT leaves out what the model has no place for, without a word: an adapter of a model with MoDA, on one without it,
would give the scores of neither.
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

if TYPE_CHECKING:
    from peft import PeftModel

# Prompt tuning keeps them outside of the state dict.
_OUTSIDE_OF_STATE_DICT = "prompt_embeddings"


def load_adapter(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Put an adapter on a model.

    Args:
        model: a model of transformers, on its device; it is changed.
        adapter: folder of the adapter.

    Returns:
        The `PeftModel`, in evaluation mode; it has the attributes of the model too.

    Raises:
        UserError: peft is not installed, the adapter is damaged, or one of its tensors has no place in the
            model, or has another shape there.
    """
    folder = adapter_folder(adapter)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError("peft is not installed; pip install 'hf-depthattn[peft]'.") from error
    where = f"--peft {adapter}"
    try:
        with warnings.catch_warnings():
            # That keys are missing is looked at below.
            warnings.simplefilter("ignore")
            # PEFT takes any device that it finds for its own.
            device = str(model.device)
            adapted = PeftModel.from_pretrained(model, folder, torch_device=device)
            # The first loading does not tell what was left out; adapters are small.
            result = adapted.load_adapter(folder, "default", torch_device=device)
    except Exception as error:
        # Shapes, types of adapters, versions of PEFT: each has errors of its own.
        raise UserError(f"{where}: does not fit the model: {one_line(error)}") from error
    homeless = sorted(key for key in result.unexpected_keys if key != _OUTSIDE_OF_STATE_DICT)
    if homeless:
        raise UserError(
            f"{where}: {len(homeless)} of its tensors have no place in {type(model).__name__} (first {homeless[0]}); "
            "give the base model that it was trained on."
        )
    # An adapter of the stock host may have layers of the same names as MoDA's projections among its targets: their
    # matrices start at zero and change nothing.
    if missing := sorted(key for key in result.missing_keys if not is_depth_name(key)):
        raise UserError(
            f"{where}: lacks {len(missing)} tensors of its layers (first {missing[0]}); give the base model that it "
            "was trained on."
        )
    return cast(PreTrainedModel, adapted.eval())


def merge_adapter(model: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """The model with its adapter merged into its own weights, without PEFT's layers.

    Args:
        model: from `load_adapter`.
        adapter: folder of the adapter, for messages.

    Raises:
        UserError: it is of a kind that cannot be merged, such as prompt tuning.
    """
    try:
        merged: PreTrainedModel = cast("PeftModel", model).merge_and_unload().eval()
        return merged
    except Exception as error:
        # Kinds of adapters say it by errors of their own, or lack the method.
        raise UserError(f"--peft {adapter}: cannot be merged into the model: {one_line(error)}") from error
