"""The formats that can be imported, and how to tell which one a checkpoint has."""

from __future__ import annotations

from typing import cast

from ...checkpoints.foreign_tensors import OF_DEPTH
from ...configuration_depthattn import DepthAttnConfig
from ...errors import UserError
from ..foreign_formats import AUTO, FORMATS
from . import blagpt_moda, fla, kimi, multi_head_attn_res, olmo_core, olmo_core_attn_res, olmo_core_moda
from .foreign_checkpoint import ForeignCheckpoint, Importer

#: Importers by the names of their formats, in the order in which they are tried.
IMPORTERS = {
    module.NAME: cast(Importer, module)
    for module in (fla, olmo_core_attn_res, olmo_core_moda, multi_head_attn_res, kimi, blagpt_moda)
}


def importer_for(foreign: ForeignCheckpoint, format: str) -> Importer:
    """Return the importer for a checkpoint.

    Args:
        foreign: the checkpoint.
        format: name of its format, or `"auto"`.

    Raises:
        UserError: if there is no such format, or the checkpoint has another one.
    """
    if format not in (AUTO, *FORMATS):
        raise UserError(f"format: {format!r} is not one of {', '.join((AUTO, *FORMATS))}.")
    found = next((each for each in IMPORTERS.values() if each.recognises(foreign)), None)
    if found is None:
        raise _unknown(foreign)
    if format not in (AUTO, found.NAME):
        raise UserError(f"{foreign.folder}: is not of the format {format!r} but of {found.NAME!r}.")
    return found


def _unknown(foreign: ForeignCheckpoint) -> UserError:
    folder = foreign.folder
    if foreign.config.get("model_type") == DepthAttnConfig.model_type:
        return UserError(f"{folder}: is already a checkpoint of this package.")
    block = olmo_core.block_name(foreign)
    if block is not None:
        return olmo_core.unsupported_block(foreign, block)
    if kimi.has_queries(foreign):
        return kimi.unsupported_model(foreign)
    formats = f"The formats that can be imported are {', '.join(FORMATS)} (docs/importing.md)."
    depth = next((name for name in foreign.entries if OF_DEPTH.search(name)), None)
    if depth is None:
        return UserError(
            f"{folder}: has no depth parameters; a stock checkpoint is converted by `depthattn retrofit`. {formats}"
        )
    return UserError(
        f"{folder}: tensor {depth!r} belongs to a residual scheme whose format is not known here. {formats}"
    )
