"""What launches share: tables that kernels write, and addresses they may load from."""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import CompiledLaunches
from kernel_inputs import DEVICE, compiled_only

from hf_depthattn.kernels import launches


@pytest.mark.interpreted
@pytest.mark.parametrize("count", [1, 3, 128, 360])
def test_written_table_has_its_numbers(count):
    """A table that kernels write, as while a CUDA graph is captured."""
    numbers = ([0, 1, 16, -5, 2**40 + 3, 2**57 - 1] * 60)[:count]
    assert launches.written_table(torch.device(DEVICE), numbers)[:count].tolist() == numbers


@compiled_only
def test_tables_need_one_binary_per_size(other_gpu, monkeypatch):
    """Nothing is compiled for the numbers in a table: what the warm-up loaded serves the capture of a CUDA graph."""
    launch = CompiledLaunches(launches._write_numbers_kernel, "sm_90")
    monkeypatch.setattr(launches, "_write_numbers_kernel", launch)
    for numbers in ([1] * 12, [16, 2**40, 2**40 + 1] * 5, [0, -16, 7], [3] * 128 + [1], [2**31] * 300):
        launches.written_table(torch.device("cpu"), numbers)
    # Tables of up to 16, 4 and 128 numbers.
    assert (launch.num_launches, len(launch.binaries)) == (8, 3)


def test_views_off_16_bytes_are_copied():
    """Kernels that find addresses in a table load 16 bytes at a time."""
    view = torch.randn(5 * 24 + 1)[1:].view(5, 24)
    assert view.is_contiguous() and view.data_ptr() % 16 != 0
    assert torch.equal(launches.aligned(view), view) and launches.aligned(view).data_ptr() % 16 == 0
    source = torch.randn(1, 63, 24)
    assert launches.aligned(source) is source
