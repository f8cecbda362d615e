"""Without the network."""

from __future__ import annotations

import os
import sys


def go_offline() -> None:
    """Keep every library in this process from asking the Hub, also those that are imported already."""
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    # `datasets` reads the constant when it is imported; perplexity of files does without it.
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
