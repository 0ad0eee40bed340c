"""Operations of our own, and the one place that decides which of them run.

- apply.py      what was chosen for each part of a model, and why; puts it into the model
- measuring.py  which way is the fastest on this machine
- attention.py, integrator.py  two operations in C++, for CPUs;  loss.py  the loss over the vocabulary in chunks
- stream.py  the arithmetic of v5's step, in place;  compilation.py  what torch.compile makes of the parts of a model
- cpu/          the sources in C++, how they are compiled and kept, and how they are called

The model never imports this room. A model that nothing was applied to computes with torch's own operations.
"""

from inl_core.kernels.apply import Choice, apply, choose, describe, put

__all__ = ["Choice", "apply", "choose", "describe", "put"]
