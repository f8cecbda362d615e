"""Check of the device that a command uses."""

from __future__ import annotations

from ..errors import UserError
from ..errors.messages import one_line


def check_device(device: str) -> None:
    """Check that torch can compute on a device.

    Args:
        device: its name in torch, e.g. `"cpu"` or `"cuda:1"`.

    Raises:
        UserError: if the device is unknown or not available, or is `"meta"`.
    """
    import torch

    try:
        if torch.device(device).type == "meta":
            raise UserError(f"device: {device!r} cannot run a model; use cpu or an accelerator, e.g. cuda.")
        torch.zeros(1, device=device).item()
    except UserError:
        raise
    except Exception as error:
        # torch raises a different error for each kind of device: AssertionError if it was built without CUDA,
        # AcceleratorError, ModuleNotFoundError for backends in separate packages.
        raise UserError(f"device: {device!r} cannot be used: {one_line(error)}") from error
