"""Language models by the name of a size: the documents' one-line constructors."""

from typing import Any

from inl_core.documents.language_model import (
    IntegratorLanguageModel,
    OptimizedIntegratorLanguageModel,
    Preset,
    UltraOptimizedIntegratorLanguageModel,
)

_CLASSES = {"v2": OptimizedIntegratorLanguageModel, "v3": UltraOptimizedIntegratorLanguageModel}


def create_model(
    size: str,
    vocab_size: int,
    *,
    preset: Preset = "v2",
    use_gradient_checkpointing: bool | None = None,
    **options: Any,
) -> IntegratorLanguageModel:
    """A model of a documented size with all its generation's optimisations on, as document 001 has it.

    Args:
        size: small, medium, large, xlarge, 3B, 7B, 13B, 3072x32, or document 001's names 2B, 2.2B, 5B, 10B.
        preset: the generation; document 001 describes v2.
        use_gradient_checkpointing: None turns it on for v2 and v3, whose documents count it among the optimisations.
        options: any other argument of IntegratorLanguageModel; device="meta" is the way to look at a 5B model.

    Raises:
        ValueError: an unknown size or preset, with the nearest name and all names.
    """
    recompute = preset in _CLASSES if use_gradient_checkpointing is None else use_gradient_checkpointing
    made_of = _CLASSES.get(preset, IntegratorLanguageModel)
    return made_of(vocab_size, size=size, preset=preset, use_gradient_checkpointing=recompute, **options)


def create_optimized_model(
    size: str, vocab_size: int, enable_all_optimizations: bool = True, **options: Any
) -> IntegratorLanguageModel:
    """A second-generation model with document 002's three optimisations on, or off, but for those that `options` set.

    They are use_lowrank_embeddings, use_gradient_checkpointing and use_adaptive_stopping.

    Args:
        size: as in `create_model`.
        options: any other argument of `create_model`.
    """
    names = ("use_lowrank_embeddings", "use_gradient_checkpointing", "use_adaptive_stopping")
    switches: dict[str, Any] = dict.fromkeys(names, enable_all_optimizations)
    return create_model(size, vocab_size, **(switches | options))
