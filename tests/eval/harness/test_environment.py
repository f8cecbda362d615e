"""Nothing is written into the installation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")

from repository import ROOT


@pytest.mark.slow
def test_nothing_is_written_into_site_packages(monkeypatch, tmp_path):
    # lm-eval reads the folder of its request cache once, when it is imported.
    code = """
from hf_depthattn.eval.harness.environment import prepare_environment
prepare_environment()
from lm_eval.caching import cache
assert "site-packages" not in cache.PATH, cache.PATH
"""
    environment = {name: value for name, value in os.environ.items() if name != "LM_HARNESS_CACHE_PATH"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
