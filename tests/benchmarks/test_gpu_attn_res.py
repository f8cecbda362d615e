"""Rows of the GPU suite that call our kernels directly, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from gpu_suite_tools import module

#: Kind of case and row -> status and parity, or the reason of a row that is absent.
EXPECTED = {
    (kind, row): ("ok", True) for kind in ("Block", "Full") for row in ("ours, as in the models", "ours, single reads")
}


def direct_rows() -> dict:
    """Kind of case and row -> a case and the row; tiny cases of one kind are the same."""
    names = {name for _, name in EXPECTED}
    return {
        (case.name.split()[0], row.name): (case, row)
        for case in reversed(module("gpu_attn_res").cases(tiny=True))
        for row in case.rows
        if row.name in names
    }


def test_every_row_that_calls_our_kernels_is_here():
    assert direct_rows().keys() == EXPECTED.keys()


@pytest.mark.interpreted
@pytest.mark.parametrize("row", EXPECTED, ids=": ".join)
def test_rows_that_call_our_kernels_have_the_reference_s_results(row, monkeypatch):
    run = module("gpu_run")
    # bfloat16 is wrong in the interpreter.
    for name in ("PARITY_DTYPES", "PARITY_STACK_DTYPES"):
        monkeypatch.setattr(run, name, (torch.float32,))
    case, entry = direct_rows()[row]
    found = run.guarded(lambda: run.row_parity(entry, case, torch.device("cpu")), 60)
    assert (found["status"], found.get("ok", found.get("reason"))) == EXPECTED[row]
