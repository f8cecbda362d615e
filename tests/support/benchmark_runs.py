"""Run benchmarks in separate processes, optionally with a broken op."""

import os
import subprocess
from pathlib import Path

from processes import run_python
from repository import ROOT

BENCHMARKS = ROOT / "benchmarks"

# Code that makes one op slightly wrong, run before the benchmark.
BREAKS = {
    "attn_res_phase2": """
from hf_depthattn import attn_res_connection as module
read = module.attn_res_phase2
def wrong(*arguments):
    h, sources = read(*arguments)
    return h * 1.0001, sources
module.attn_res_phase2 = wrong
""",
    "moda_attention in the model": """
from hf_depthattn import moda_attention as module
attention = module.moda_attention
module.moda_attention = lambda *a, **k: (attention(*a, **k)[0] * 1.0001, None)
""",
    # The output stays correct, but gradients through the log-sum-exp of the slots are lost.
    "gradient of moda_attention": """
from hf_depthattn import moda_attention_ops as module
attention = module.moda_attention
def detached(inputs, **options):
    return attention(inputs._replace(depth_keys=[slot.detach() for slot in inputs.depth_keys]), **options)
module.moda_attention = detached
""",
}


def run_benchmark(name: str, *arguments: str, cwd: Path, broken: str = "") -> subprocess.CompletedProcess:
    code = f"import sys; sys.argv = [{name!r}, *{arguments!r}]{broken}\nimport {name}; {name}.main()"
    return run_python("-c", code, cwd=cwd, python_path=os.pathsep.join((str(ROOT), str(BENCHMARKS))))
