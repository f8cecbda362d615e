"""CPU time of the arms relative to PreNorm, as `benchmarks/pretraining_costs.py` has measured it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_depthattn.errors import UserError
from hf_depthattn.utils.result_files import read_object

#: The committed result.
COSTS = Path(__file__).resolve().parents[1] / "results" / "pretraining_costs.json"

#: Number of layers and fields of an arm -> CPU time relative to PreNorm.
Costs = dict[tuple[int, str], float]


def cost_key(num_layers: int, fields: Mapping[str, Any]) -> tuple[int, str]:
    """Return the key of an arm in `Costs`.

    Args:
        num_layers: number of decoder layers.
        fields: fields of the arm.
    """
    return num_layers, json.dumps(dict(fields), sort_keys=True)


def read_costs(path: Path = COSTS) -> Costs:
    """Read the measured ratios of CPU time.

    Args:
        path: the file; need not exist.

    Raises:
        UserError: if it is another kind of file.
    """
    if not path.exists():
        return {}
    content = read_object(path, "measure again: python benchmarks/pretraining_costs.py")
    if content.get("benchmark") != "pretraining_costs":
        raise UserError(f"{path}: benchmark is {content.get('benchmark')!r}, not 'pretraining_costs'.")
    return {
        cost_key(int(num_layers), row["fields"]): row["cpu_ratio_median"]
        for num_layers, part in content["depths"].items()
        for row in part["rows"]
    }
