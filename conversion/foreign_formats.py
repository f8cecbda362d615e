"""Names of the formats that can be imported and exported; does not import torch."""

from __future__ import annotations

#: The format is recognised by the config and the names of tensors.
AUTO = "auto"
#: Formats that can be imported, by the names of their importers.
FORMATS = ("fla", "olmo-core-attn-res", "olmo-core-moda", "multi-head-attn-res", "kimi", "blagpt-moda")
#: Formats that can be exported.
EXPORT_FORMATS = ("fla",)
