"""Switch this process to offline mode."""

from __future__ import annotations

import os
import sys


def go_offline() -> None:
    """Keep the libraries of this process from contacting the Hub, including those that are already imported."""
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    # `datasets` copies the setting when it is imported, so it is changed only if that has happened; it is not imported
    # here, since perplexity of files does not need it.
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
