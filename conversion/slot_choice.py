"""Write a checkpoint with MoDA whose layers read other depth slots than those of the source."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from ..checkpoints.carried_files import carry_files, check_carried
from ..configuration_depthattn import DepthAttnConfig
from ..errors import UserError
from ..errors.messages import one_line
from ..moda_slots import DEPTH_KV_MODULES
from ..model_card import write_missing_card
from .depth_shards import DEPTH_KEY, check_depth_tensors, plan_depth_shards, usual_name
from .kept_weights import write_kept_weights
from .output_folder import ByteCounts, check_apart, complete_folder
from .source import DepthSource


def config_with_slots(config: DepthAttnConfig, depth_slots: Sequence[Sequence[int]]) -> DepthAttnConfig:
    """Return a copy of a config in which each layer reads some of the slots that it has read before.

    Args:
        config: a config with MoDA.
        depth_slots: for each layer, the numbers of the slots that it reads, in ascending order.

    Raises:
        UserError: if a layer would read a slot that it has not read before.
    """
    for layer, (slots, before) in enumerate(zip(depth_slots, config.depth_slot_plan.reads, strict=True)):
        if new := sorted(set(slots) - set(before)):
            raise UserError(
                f"depth_slots: layer {layer} has not read slot {new[0]}; allowed are {', '.join(map(str, before))}."
            )
    chosen = deepcopy(config)
    chosen.num_depth_slots, chosen.depth_slots = None, [list(slots) for slots in depth_slots]
    try:
        chosen.validate()
    except (StrictDataclassError, ValueError, TypeError) as error:
        # Strict configs raise errors of huggingface_hub.
        raise UserError(one_line(error)) from error
    return chosen


def write_slot_choice(
    depth: DepthSource,
    target: Path,
    depth_slots: Sequence[Sequence[int]],
    *,
    overwrite: bool = False,
    copy: bool = False,
    copy_tokenizer_code: bool = False,
    progress: bool | None = None,
) -> ByteCounts:
    """Write a checkpoint whose layers read only some of their slots; weights are linked where possible.

    Projections and gates that are no longer used are left out. `target` is created only when it is complete.

    Args:
        depth: the source.
        target: the folder to create, an absolute path.
        depth_slots: for each layer, the numbers of the slots that it reads, in ascending order.
        overwrite: replace an existing checkpoint.
        copy: copy the weights instead of hard-linking them.
        copy_tokenizer_code: copy the code of a tokenizer with custom code, instead of raising.
        progress: as in `progress_bar`.

    Returns:
        The sizes of the weights.

    Raises:
        UserError: if the source is incomplete, a layer cannot read a slot, or the output cannot be written.
    """
    check_apart(target, depth.folder)
    check_carried(depth.folder, depth.weights.weight_map.values(), copy_tokenizer_code=copy_tokenizer_code)
    config = config_with_slots(depth.config, depth_slots)
    found = check_depth_tensors(depth.folder, depth.config, depth.key_prefix, depth.entries)
    needed = {
        name for shard in plan_depth_shards(config, depth.key_prefix) for module in shard for name in module.tensors
    }
    unused = {name for name in found if _is_of_moda(name) and usual_name(name) not in needed}
    counts = ByteCounts()
    with complete_folder(target, overwrite) as partial:
        carry_files(depth.folder, partial)
        write_kept_weights(partial, depth.weights, unused, counts, copy=copy, progress=progress)
        write_missing_card(partial, config, depth_class=depth.architecture.depth_class, name=target.name)
        # Last, since an incomplete folder without config cannot be loaded.
        config.save_pretrained(partial)
    return counts


def _is_of_moda(name: str) -> bool:
    match = DEPTH_KEY.search(name)
    return match is not None and match[1].rpartition(".")[2] in DEPTH_KV_MODULES
