"""Weights of the publicly released reference generation, and the one before it, as checkpoints of ours.

    imported = import_reference(Path("model.safetensors"), Path("reference"), num_heads=24, iterations=(2,))

In reading order: importing.py from a file to a checkpoint; layout.py what a file holds; conversion.py its dimensions as
our configuration and its tensors under our names.
"""

from inl_core.interop.reference.importing import Imported, import_reference

__all__ = ["Imported", "import_reference"]
