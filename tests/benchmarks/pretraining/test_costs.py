"""CPU time of the arms: measured in turn, kept by depth, and used for ratios."""

from __future__ import annotations

import json

import pytest
from pretraining_study import TINY, made_up_results
from processes import run_python
from repository import ROOT

from benchmarks.pretraining.arms import ARMS
from benchmarks.pretraining.costs import COSTS, cost_key, read_costs
from benchmarks.pretraining.group import Group, groups
from hf_depthattn.errors import UserError

SCRIPT = ROOT / "benchmarks" / "pretraining_costs.py"


def measured(output, num_layers: int) -> dict:
    sizes = [f"{name}={value}" for name, value in TINY.to_dict().items() if isinstance(value, int)]
    options = [*(part for size in sizes for part in ("--set", size)), "--rounds", "2", "--output", str(output)]
    result = run_python(str(SCRIPT), "--num-layers", str(num_layers), *options, cwd=ROOT, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(output.read_text())


@pytest.mark.slow
def test_arms_are_timed_in_turn_and_other_depths_are_kept(tmp_path):
    first = measured(tmp_path / "costs.json", 4)
    both = measured(tmp_path / "costs.json", 5)
    assert both["depths"]["4"] == first["depths"]["4"] and set(both["depths"]) == {"4", "5"}
    costs = read_costs(tmp_path / "costs.json")
    assert set(costs) == {cost_key(n, arm.fields) for n in (4, 5) for arm in ARMS.values()}
    assert costs[cost_key(4, ARMS["prenorm"].fields)] == 1
    assert costs[cost_key(5, ARMS["block_attn_res_moda"].fields)] > 1


def test_measured_ratios_go_before_those_of_runs():
    results = made_up_results()
    costs = {cost_key(16, ARMS["prenorm"].fields): 1.0, cost_key(16, ARMS["block_attn_res"].fields): 1.2}
    (group,) = groups(results, costs)
    # Arms with the same fields cost the same.
    assert group.cost_ratio("block_attn_res", "prenorm") == group.cost_ratio("block_attn_res_scaled", "prenorm") == 1.2
    assert group.cost_ratio("moda", "prenorm") == 2.0
    assert Group("stdlib", 1000, 8, results, costs).costs == costs


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "costs.json"
    assert read_costs(path) == {}
    path.write_text('{"benchmark": "cpu_overhead"}')
    with pytest.raises(UserError, match="benchmark is 'cpu_overhead', not 'pretraining_costs'"):
        read_costs(path)


def test_every_arm_has_a_committed_cost():
    costs = read_costs()
    assert COSTS.is_file()
    for num_layers in (8, 16, 32):
        assert all(costs[cost_key(num_layers, arm.fields)] > 0 for arm in ARMS.values())
