"""How far the weights of a model are from other weights of the same shapes: its own start, or another checkpoint's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inl_core.analysis.planning.parameters import part_of
from inl_core.errors import ArtefactError, InlError
from inl_core.inference.loading import LoadedModel
from inl_core.model import IntegratorLanguageModel
from inl_core.model.stream import stream_parameters
from inl_core.recipe.load import load_recipe


@dataclass(frozen=True)
class PartChange:
    """The weights of one part, as one long vector w, against w_0."""

    part: str
    size: float
    """|w|."""
    distance: float
    """|w - w_0|."""
    relative: float | None
    """|w - w_0| / |w_0|; None where w_0 is zero."""


def weight_changes(model: IntegratorLanguageModel, before: Mapping[str, Tensor]) -> list[PartChange]:
    """The change of each part of the model, and of "all", since the weights `before`, by name, of the same shapes."""
    of_stream, sums = stream_parameters(model), {}
    for name, parameter in model.named_parameters():
        now, old = parameter.detach().double(), before[name].double()
        squares = torch.stack([value.square().sum() for value in (now, now - old, old)]).tolist()
        for part in (part_of(name, parameter in of_stream), "all"):
            sums[part] = [total + square for total, square in zip(sums.get(part, (0, 0, 0)), squares, strict=True)]
    found = {part: [math.sqrt(total) for total in totals] for part, totals in sums.items()}
    order = [*(part for part in found if part != "all"), "all"]
    return [
        PartChange(part, size, distance, distance / old if old else None)
        for part, (size, distance, old) in ((part, found[part]) for part in order)
    ]


def starting_weights(loaded: LoadedModel) -> dict[str, Tensor]:
    """The weights that the model's training began with, drawn again from its recipe's seed.

    Raises:
        ArtefactError: training began with other weights, or the recipe that says the seed cannot be read.
    """
    others = [event["event"] for event in loaded.config["provenance"] if event.get("event") != "train"]
    if others or not loaded.config["provenance"]:
        began = ", ".join(map(str, others)) or "unknown"
        raise ArtefactError(
            f"{loaded.path}: began with weights that no seed draws ({began}); --against compares with such"
        )
    try:
        seed = load_recipe(loaded.path / "recipe.yaml", allow_pipe=False).training.seed
    except InlError as error:
        raise ArtefactError(f"{loaded.path}: its seed is not known: {error}") from None
    model = IntegratorLanguageModel(loaded.model.config)
    model.initialise(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_same_shapes(loaded: LoadedModel, other: LoadedModel) -> None:
    """Refuse to compare two models value by value that are not of one kind.

    Raises:
        ArtefactError: names the first parameter that differs in shape, or says that the tokens mean something else.
    """
    own, others = ({name: tuple(p.shape) for name, p in one.model.named_parameters()} for one in (loaded, other))
    for name in dict.fromkeys([*own, *others]):
        if own.get(name) != others.get(name):
            raise ArtefactError(
                f"{other.path}: cannot be compared with {loaded.path}: {name} is {others.get(name, 'absent')} there, "
                f"{own.get(name, 'absent')} here; name a checkpoint of the same model"
            )
    if loaded.config["tokenizer"] != other.config["tokenizer"]:
        raise ArtefactError(f"{other.path}: was trained with another tokenizer than {loaded.path}")
