"""Memory and start values for a module that was built on the meta device.

Modules are built there since torch would otherwise fill each with random numbers as it is made. These would be
overwritten at once, and would move the global random generator, which belongs to the caller.
"""

from collections.abc import Callable

import torch
from torch import nn


def materialise(module: nn.Module, initialise: Callable[[], None], device: torch.device | str | None = None) -> None:
    """Move `module` from the meta device to `device` (None: torch's default device) and run `initialise`.

    On the meta device it stays as it is, shapes without memory.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return
    module.to_empty(device=device)
    with torch.device("cpu"):  # random numbers are drawn there, so that the start does not depend on the device
        initialise()
