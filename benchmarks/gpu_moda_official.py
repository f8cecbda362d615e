"""The official MoDA kernel (hustvl/MoDA) for the GPU suite, run in a separate process.

    python gpu_moda_official.py --repo FOLDER --device cuda --case JSON

FOLDER is a checkout of the repository, or its `libs/moda_triton`, a copy of the package `fla` with `fla.ops.moda`. The
last printed line is JSON with parity and times. The layout of the kernel is

    q [B, T G, Hk, d], row t G + g      k, v [B, T, Hk, d]      cached_k, cached_v [B, T L, Hk, d], row t L + l
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_run
import torch
from gpu_cases import Absent, Case, Row, optional
from gpu_moda import MoDAProblem, cases, reference
from gpu_timing import Clock, Effort
from torch import Tensor

NAME = "official kernel (hustvl/MoDA)"


class OfficialProblem:
    """A `MoDAProblem` in the official layout."""

    def __init__(self, tensors: dict[str, Tensor], group_size: int, num_slots: int, cotangents: list[Tensor]):
        self.tensors, self.group_size, self.num_slots, self.cotangents = tensors, group_size, num_slots, cotangents

    @staticmethod
    def make(setting: dict, dtype: torch.dtype, device: torch.device) -> OfficialProblem:
        p, group_size = MoDAProblem.make(setting, dtype, device), setting["group_size"]
        with torch.no_grad():
            tensors = {
                "q": rows_of_queries(p.query.transpose(1, 2), group_size),
                "k": p.key.transpose(1, 2),
                "v": p.value.transpose(1, 2),
                "cached_k": rows_of_slots(p.depth_keys),
                "cached_v": rows_of_slots(p.depth_values),
            }
            tensors = {name: x.contiguous().requires_grad_() for name, x in tensors.items()}
            cotangents = [rows_of_queries(x, group_size).contiguous() for x in p.cotangents]
        return OfficialProblem(tensors, group_size, setting["num_slots"], cotangents)

    def leaves(self) -> dict[str, list[Tensor]]:
        return {name: [tensor] for name, tensor in self.tensors.items()}

    def double(self) -> OfficialProblem:
        tensors = {name: x.detach().double().requires_grad_() for name, x in self.tensors.items()}
        return OfficialProblem(tensors, self.group_size, self.num_slots, [x.double() for x in self.cotangents])


def rows_of_queries(x: Tensor, group_size: int) -> Tensor:
    """Rearrange queries [B, T, Hk G, d] -> [B, T G, Hk, d]."""
    return x.unflatten(2, (-1, group_size)).transpose(2, 3).flatten(1, 2)


def heads_of_queries(x: Tensor, group_size: int) -> Tensor:
    """Invert `rows_of_queries`."""
    return x.unflatten(1, (-1, group_size)).transpose(2, 3).flatten(2, 3)


def rows_of_slots(slots: list[Tensor]) -> Tensor:
    """Rearrange L tensors of slots [B, Hk, T, d] -> [B, T L, Hk, d]."""
    return torch.stack([slot.transpose(1, 2) for slot in slots], 2).flatten(1, 2)


def official(problem: OfficialProblem) -> list[Tensor]:
    """Solve with the official kernel."""
    parallel_moda = optional("fla.ops.moda", "parallel_moda")
    scale = problem.tensors["q"].shape[-1] ** -0.5
    return [parallel_moda(**problem.tensors, scale=scale, moda_group_num=problem.group_size)]


def official_reference(problem: OfficialProblem) -> list[Tensor]:
    """Solve with the reference of this package."""
    x = problem.tensors
    keys, values = (
        [slot.transpose(1, 2) for slot in x[name].unflatten(1, (-1, problem.num_slots)).unbind(2)]
        for name in ("cached_k", "cached_v")
    )
    query = heads_of_queries(x["q"], problem.group_size).transpose(1, 2)
    ours = MoDAProblem(query, x["k"].transpose(1, 2), x["v"].transpose(1, 2), keys, values, [])
    return [rows_of_queries(out, problem.group_size) for out in reference(ours)]


def official_row(repo: Path, device: torch.device) -> Row:
    """Return the row of the official kernel, which runs this file in a separate process."""

    def elsewhere(case: Case) -> dict:
        setting = {"setting": case.setting, "parity_setting": case.parity_setting}
        command = [
            sys.executable,
            __file__,
            "--repo",
            str(repo),
            "--device",
            str(device),
            "--case",
            json.dumps(setting),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(result.stderr.strip()[-300:])
        found = json.loads(result.stdout.splitlines()[-1])
        if "absent" in found:
            raise Absent(found["absent"])
        return found

    return Row(NAME, "peer", None, elsewhere=elsewhere)


def main() -> None:
    """Check parity, time the kernel and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--case", type=json.loads, required=True)
    arguments = parser.parse_args()
    folders = (arguments.repo / "libs" / "moda_triton", arguments.repo)
    home = next((folder for folder in folders if (folder / "fla" / "ops" / "moda").is_dir()), None)
    if home is None:
        print(json.dumps({"absent": f"{arguments.repo}: contains no fla/ops/moda, nor does its libs/moda_triton"}))
        return
    sys.path.insert(0, str(home))
    # The case of the suite with another problem.
    case = cases(tiny=True)[0]._replace(
        **arguments.case, make=OfficialProblem.make, reference=official_reference, rows=()
    )
    row = Row(NAME, "peer", official)
    clock = Clock(arguments.device)
    try:
        parity = {"status": "ok", **gpu_run.row_parity(row, case, clock.device)}
        found: dict[str, Any] = {"parity": parity, "passes": {}}
        if parity["ok"]:
            make: Callable = case.make
            problem = make(case.setting, gpu_run.PARITY_DTYPES[0], clock.device)
            found |= gpu_run.measure_row(row, case, problem, clock, Effort())
    except Absent as error:
        found = {"absent": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
