"""Functions for the launches of all kernels: devices, grids, tables of addresses."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .row_tiles import INTERPRETED, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

# The interpreter treats bfloat16 as integers; float64 is supported for tests.
_COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED_DTYPES = (torch.float16, torch.float32, torch.float64)
DTYPES = _INTERPRETED_DTYPES if INTERPRETED else _COMPILED_DTYPES

# Number of programs in the interpreter; two, so that tests include the sum over programs.
_INTERPRETED_PROGRAMS = 2
# Kernel arguments are limited to 4 KiB.
_NUMBERS_PER_LAUNCH = 128
# Devices and table sizes for which the kernel that writes tables has been loaded.
_loaded_tables: set[tuple[torch.device, int]] = set()


def tensor_limit(name: str, tensor: Tensor) -> str | None:
    """Return why kernels do not support the dtype or device of a tensor called `name`, or None if they do."""
    if tensor.dtype not in DTYPES:
        return f"{name} must be one of {DTYPES}, got {tensor.dtype}"
    if INTERPRETED:
        return None if tensor.device.type == "cpu" else f"Triton's interpreter needs CPU tensors, got {tensor.device}"
    if tensor.device.type != "cuda":
        return f"{name} must be on a CUDA or HIP device, got {tensor.device}"
    return None


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums over elements of a tensor."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def architecture_of(device: torch.device) -> str:
    """Return the architecture of a device as in the tables of tile sizes: `"sm_90"`, `"gfx942"`, ..."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def num_programs(device: torch.device, programs_per_sm: int) -> int:
    """Return the number of programs of a grid that does not depend on the number of tokens."""
    if INTERPRETED:
        return _INTERPRETED_PROGRAMS
    return programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor):
    """Return a context with the tensor's device as the current device, on which Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous copy or view at a multiple of 16 bytes, as kernels assume for addresses in tables."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def device_table(device: torch.device, numbers: list[int]) -> Tensor:
    """Return a table of addresses and strides, int64 on the device, for kernels with any number of tensors."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64)
    # Kernels cannot be loaded during graph capture, so the first table of a size, in the warm-up, loads this kernel.
    loaded = (device, _numbers_per_launch(numbers))
    if loaded not in _loaded_tables or torch.cuda.is_current_stream_capturing():
        _loaded_tables.add(loaded)
        return written_table(device, numbers)
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def written_table(device: torch.device, numbers: list[int]) -> Tensor:
    """Return the table, written by kernels from arguments: a CUDA graph keeps those, but not the source of a copy."""
    size = _numbers_per_launch(numbers)
    coded = [_coded(number) for number in numbers]
    coded += [_coded(0)] * (-len(coded) % size)
    table = torch.empty(len(coded), dtype=torch.int64, device=device)
    for first in range(0, len(coded), size):
        _write_numbers_kernel[(1,)](table[first:], tuple(coded[first : first + size]))
    return table


def _numbers_per_launch(numbers: list[int]) -> int:
    return min(_NUMBERS_PER_LAUNCH, 1 << (len(numbers) - 1).bit_length())


def _coded(number: int) -> int:
    """Encode as an odd 64-bit number: Triton compiles tuples again for 1, multiples of 16 and 32-bit numbers."""
    return 2**62 + 2 * number + 1


@jit()
def _write_numbers_kernel(table_ptr, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(table_ptr + i, (tl.full((), numbers[i], tl.int64) - 4611686018427387904) >> 1)


@jit()
def matrix_pointer(table_ptr, row, column: tl.constexpr, COLUMNS: tl.constexpr, like_ptr):
    """Return an address in the table, a multiple of 16 (see `aligned`), as a pointer of the type of `like_ptr`."""
    address = tl.multiple_of(tl.load(table_ptr + row * COLUMNS + column), 16)
    return address.to(like_ptr.dtype)
