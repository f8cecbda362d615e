"""The committed table of the bytes that residual mechanisms move is what the sites and kernels do now."""

from __future__ import annotations

import json
import re

import pytest
from gpu_suite_tools import BENCHMARKS, module
from repository import ROOT

from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.stream_sites import StreamSite

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.interpreted
COMMITTED = json.loads((BENCHMARKS / "results" / "bytes_moved.json").read_text())
GROUPED = "Block AttnRes, grouped reads"


def block_forward(num_sublayers: int, size: int) -> tuple[int, int]:
    """Return the matrices that the kernels of Block AttnRes move forward: all, and those of the last block."""
    num_blocks = num_sublayers // size
    # The output site belongs to the last group if that has at most 16 reads with it.
    joins = size < 16
    blocks = []
    for block in range(num_blocks):
        if block == 0:
            # Reads of the embedding and the open block, without an update for the first of them.
            blocks.append(3 + 5 * (size - 2))
            continue
        phase1 = block + 1 + size + (joins and block == num_blocks - 1)
        # The sum at the boundary, and reads with a prior: without an update, and with one.
        blocks.append(phase1 + 3 + 3 + 5 * (size - 2))
    # The output site adds to its prior, or sums the last block and reads all sources.
    output = 5 if joins else 3 + num_blocks + 2
    return sum(blocks) + output, blocks[-1]


def moved(counts: dict) -> int:
    return counts["loads"] + counts["stores"]


@pytest.mark.parametrize(("num_sublayers", "size"), [(12, 4), (8, 4)])
def test_a_small_stack_moves_what_its_launches_add_up_to(num_sublayers, size):
    (kernels, torch_path) = module("bytes_moved").result(num_sublayers, size, [GROUPED])["rows"]
    total, last = block_forward(num_sublayers, size)
    assert (kernels["path"], torch_path["path"]) == ("triton", "torch")
    assert moved(kernels["forward"]) == total and moved(kernels["forward"]["last_group"]) == last
    for row in (kernels, torch_path):
        for direction in ("forward", "backward"):
            assert moved(row[direction]) == sum(map(moved, row[direction]["parts"].values()))
            assert moved(row[direction]) <= row[direction]["issued"]
    assert moved(torch_path["forward"]) > total


def test_residual_sums_move_three_matrices():
    (row,) = module("bytes_moved").result(8, 4, ["residual"])["rows"]
    assert [moved(row[direction]) for direction in ("forward", "backward")] == [3 * 8, 3 * 8]


def test_streams_are_loaded_for_their_weights_for_the_read_and_for_the_write():
    (row,) = module("bytes_moved").result(4, 2, ["mHC, 4 streams"])["rows"]
    n = 4
    weights = 2 * n
    read = n + (n + 1)
    write = (n + 1) + n
    assert moved(row["forward"]["last_group"]) == weights + read + write
    assert moved(row["backward"]) > moved(row["forward"])


def test_the_committed_result_is_within_the_goals_and_in_the_document():
    setting = COMMITTED["setting"]
    assert setting == {"num_sublayers": 128, "block_size": 16}
    rows = {(row["name"], row["path"]): row for row in COMMITTED["rows"]}
    block, full = (rows[f"{kind} AttnRes, grouped reads", "triton"] for kind in ("Block", "Full"))
    total, last = block_forward(128, 16)
    assert moved(block["forward"]) == total and moved(block["forward"]["last_group"]) == last == 100
    assert moved(full["forward"]) <= 24 * 128
    streams = module("bytes_moved").STREAM_CONNECTIONS
    assert streams.keys() == {name for name, site in CONNECTIONS.items() if issubclass(site, StreamSite)}
    assert {(f"{title}, 4 streams", "torch") for title in streams.values()} <= rows.keys()
    document = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall("<!-- bytes:begin -->(.*?)<!-- bytes:end -->", document, re.DOTALL)
    for name, path in rows:
        assert f"| {name} | " in table
        mean = moved(rows[name, path]["forward"]) / 128
        assert f"{mean:.2f} / " in table


@pytest.mark.slow
def test_the_committed_result_is_up_to_date():
    found = module("bytes_moved").result(**COMMITTED["setting"])
    assert found == COMMITTED, "run benchmarks/bytes_moved.py --output benchmarks/results/bytes_moved.json"
