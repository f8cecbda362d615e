"""The tuning script without a GPU."""

from __future__ import annotations

import json

from gpu_suite_tools import BENCHMARKS, module, needs_triton, python_path
from processes import run_python


@needs_triton
def test_tuning_compiles_candidates_without_a_gpu(tmp_path):
    arguments = ("--compile-only", "sm_90", "--tiny", "--only", "read forward", "--output", "tuned.json")
    result = run_python(
        str(BENCHMARKS / "tune_kernels.py"),
        *arguments,
        cwd=tmp_path,
        python_path=python_path(),
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "not timed; 2 of 2 candidates fit" in result.stdout
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert written["complete"] and not written["timed"] and written["architecture"] == "sm_90"
    (bucket,) = written["buckets"]
    assert bucket["best"] is None
    for candidate in bucket["candidates"]:
        assert candidate["discarded"] is None and "median_s" not in candidate
        (used,) = candidate["resources"]
        assert used["registers"] > 0 and used["stack"] == 0


def test_tuning_discards_what_spills_and_restores_the_table():
    tune = module("tune_kernels")
    fits = {"registers": 90, "stack": 0, "shared": 0, "local_accesses": 0}
    assert tune.reason_against([fits], "sm_90") is None
    assert "spills: stack 24" in tune.reason_against([fits, {**fits, "stack": 24}], "sm_90")
    assert "shared memory: 300000" in tune.reason_against([{**fits, "shared": 300000}], "sm_90")
    for table in tune.TABLES:
        try:
            value = table.candidates(table.buckets[-1])[0]
        except (ImportError, AttributeError):
            continue
        configs, _ = table.entry(table.buckets[-1], "sm_90")
        before = dict(configs)
        with tune.entry_set(table, table.buckets[-1], "sm_90", value):
            assert configs != before
        assert configs == before
        assert table.row(table.buckets[-1], value)
