"""The numbers of docs/tensor_parallel.md are those of the benchmark, and can be measured again."""

import json

import pytest
import torch
import transformers
from benchmark_runs import BENCHMARKS, run_benchmark
from gpu_suite_tools import module
from packaging.version import Version
from repository import ROOT

RESULT = json.loads((BENCHMARKS / "results" / "tensor_parallel.json").read_text())
PAGE = (ROOT / "docs" / "tensor_parallel.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)


def test_page_has_the_table_of_the_result():
    assert module("tensor_parallel").table(RESULT["results"]) in PAGE


def test_page_has_the_errors_of_accumulated_gradients():
    for result in RESULT["results"]:
        of_stock, of_ours = (result["accumulated"][name] for name in ("transformers", "depthattn"))
        assert max(of_ours) < 1e-5
        assert f"by {of_stock[1]:.0%} with {result['processes']} processes" in PAGE


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version(RESULT["versions"]["transformers"]),
    reason="older versions do not shard the embedding",
)
def test_result_can_be_measured_again(tmp_path):
    output = tmp_path / "result.json"
    finished = run_benchmark("tensor_parallel", "--processes", "2", "--output", str(output), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (measured,) = json.loads(output.read_text())["results"]
    assert measured["rows"] == RESULT["results"][0]["rows"]
    assert max(measured["accumulated"]["depthattn"]) < 1e-5
