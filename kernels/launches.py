"""What the launches of all kernels share: devices, grids, tables of addresses."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .row_tiles import INTERPRETED, jit

try:
    import triton.language as tl
except ImportError:
    tl = None

# The interpreter computes with the bits of bfloat16; float64 is there for tests.
_COMPILED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED_DTYPES = (torch.float16, torch.float32, torch.float64)
DTYPES = _INTERPRETED_DTYPES if INTERPRETED else _COMPILED_DTYPES

# Two programs in the interpreter: enough for their shares of a gradient to be added up.
_INTERPRETED_PROGRAMS = 2
# Arguments of a kernel may take 4 KiB.
_NUMBERS_PER_LAUNCH = 128
# Devices and sizes of tables for which the kernel that writes them is loaded.
_loaded_tables: set[tuple[torch.device, int]] = set()


def tensor_limit(name: str, tensor: Tensor) -> str | None:
    """Why no kernel can take this tensor, called `name`, for its dtype or device; None if they can."""
    if tensor.dtype not in DTYPES:
        return f"{name} must be one of {DTYPES}, got {tensor.dtype}"
    if INTERPRETED:
        return None if tensor.device.type == "cpu" else f"Triton's interpreter takes CPU tensors, got {tensor.device}"
    if tensor.device.type != "cuda":
        return f"{name} must be on a CUDA or HIP device, got {tensor.device}"
    return None


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums over elements of a tensor have."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def architecture_of(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, ..., as the tables of configurations have them."""
    if INTERPRETED:
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def num_programs(device: torch.device, programs_per_sm: int) -> int:
    """Programs of a grid that does not depend on the number of tokens."""
    if INTERPRETED:
        return _INTERPRETED_PROGRAMS
    return programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor):
    """Triton launches on the current device, whichever device the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def aligned(tensor: Tensor) -> Tensor:
    """A contiguous matrix at a multiple of 16 bytes, as kernels take those to be whose addresses are in a table."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def device_table(device: torch.device, numbers: list[int]) -> Tensor:
    """Addresses and strides for kernels that take any number of tensors: int64 on the device."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64)
    # Kernels cannot be loaded while a graph is captured: the first table of a size, in the warm-up, loads this one.
    loaded = (device, _numbers_per_launch(numbers))
    if loaded not in _loaded_tables or torch.cuda.is_current_stream_capturing():
        _loaded_tables.add(loaded)
        return written_table(device, numbers)
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def written_table(device: torch.device, numbers: list[int]) -> Tensor:
    """The same table, brought as arguments of kernels, which a CUDA graph keeps; a copy's source it would not."""
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
    """An odd number beyond 32 bits: in tuples Triton compiles again for a 1, a multiple of 16 and other bits."""
    return 2**62 + 2 * number + 1


@jit()
def _write_numbers_kernel(table_ptr, numbers):
    for i in tl.static_range(len(numbers)):
        tl.store(table_ptr + i, (tl.full((), numbers[i], tl.int64) - 4611686018427387904) >> 1)


@jit()
def matrix_pointer(table_ptr, row, column: tl.constexpr, COLUMNS: tl.constexpr, like_ptr):
    """Address in the table, a multiple of 16 (`aligned`), as a pointer of the type of `like_ptr`."""
    address = tl.multiple_of(tl.load(table_ptr + row * COLUMNS + column), 16)
    return address.to(like_ptr.dtype)
