"""Which devices a command can use."""

from __future__ import annotations

from ..errors import UserError
from ..errors.messages import one_line


def check_device(device: str) -> None:
    """Refuse a device that torch cannot compute on here.

    Args:
        device: as torch names it, e.g. `"cpu"` or `"cuda:1"`.

    Raises:
        UserError: an unknown name, a device that is not there, or one without data (`"meta"`).
    """
    import torch

    try:
        if torch.device(device).type == "meta":
            raise UserError(f"device: {device!r} holds no data; give cpu or an accelerator.")
        torch.zeros(1, device=device).item()
    except UserError:
        raise
    except Exception as error:
        # torch has an error of its own for every kind of device: AssertionError when it was built without CUDA,
        # AcceleratorError, ModuleNotFoundError for back ends in packages of their own.
        raise UserError(f"device: {device!r} cannot be used: {one_line(error)}") from error
