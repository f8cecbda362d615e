import logging
import os
from pathlib import Path

# Before transformers is imported: no test asks the network for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Fixtures.
from eval_commands import command, retrofitted_stories  # noqa: F401
from repository import ROOT

torch.set_num_threads(1)
pytest_plugins = ["triton_interpreter"]


@pytest.fixture(autouse=True)
def every_warning_is_new():
    """Let a test see warnings that are given once, also if an earlier test has caused them."""
    logging.Logger.warning_once.cache_clear()


@pytest.fixture(scope="session")
def depthattn_data() -> Path:
    """Folder with the optional test data: `DEPTHATTN_DATA`, else `../shared/data` beside the repository."""
    named = os.environ.get("DEPTHATTN_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} does not exist; name its folder in DEPTHATTN_DATA")
    return folder
