"""Memory and start values for a module that was built on the meta device.

- Modules are built there because torch fills a module when it makes it, from the global random generator: work thrown
  away, and a draw that a caller's own seed would notice.
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
    with torch.device("cpu"):  # the draws are made there, so that a start does not depend on the device
        initialise()
