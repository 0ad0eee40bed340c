"""Every initialisation of the language model, in one place; safe after the meta device.

- Each parameter is drawn from its own generator, seeded by (seed, parameter name): adding a part to the model moves no
  other part's start, two presets start alike where they are alike, and the device does not matter.
- Matrices N(0, 0.6/sqrt(D)); the controller's output N(0, 0.01).
- An embedding that is also the head, and is normalised after the look-up, starts at N(0, 6.8/D) where D is over 128.
  Its spread does not matter to the states then, and the logit of the token just read is the spread times D: if that
  grew with the width, a fresh model would be ever surer that each token comes again (arXiv 2203.03466 on heads).
- Matrices that write into the residual stream start at N(0, 0.02/sqrt(2L)); with `readout: state`, where a layer adds
  its whole normalised state and small outputs would drown in it, at 1.2/sqrt(inputs) (docs/evidence.md).
- The factors of a low-rank embedding: E N(0, 0.15/sqrt(R)), P N(0, 4/sqrt(D)). Their product has a full embedding's
  spread; the table is the smaller one because a step of Adam is as large whatever the size of what it changes, and a
  row of R numbers has to move as far as one of D.
- mu, gamma, phi, modulation, gains and the coefficients of the stream draw nothing.
- Source: docs/model.md, "Initialisation".
"""

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from inl_core.model.budget import Budget
from inl_core.model.integrator import Integrator
from inl_core.model.stream import Entry, Step

if TYPE_CHECKING:
    from inl_core.model.language_model import IntegratorLanguageModel
    from inl_core.recipe import ModelConfig

_REFERENCE_WIDTH = 128
"""The width at which the embedding's spread was found by experiment."""


@torch.no_grad()
def initialise(
    model: "IntegratorLanguageModel",
    seed: int,
    write: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_,
) -> None:
    """Set every parameter and buffer of `model` to its start; `write(parameter, values)` puts in what was drawn."""
    model.reset_buffers()
    for module in model.modules():
        if isinstance(module, Integrator | Budget | Entry | Step):
            module.initialise()
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            module.reset_parameters()
    model.excitation_amplitude.fill_(model.config.initial_amplitude)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_gain"):
            parameter.fill_(1.0)
        elif name.endswith(".weight") and parameter.dim() == 2:
            write(parameter, drawn(parameter.shape, _spread(model, name, parameter.shape[1]), seed, name))
        elif name.endswith(".bias") and "modulation" not in name and "norm" not in name:
            parameter.zero_()


def draw(parameter: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fill with N(0, std) from the generator that belongs to (seed, name)."""
    parameter.copy_(drawn(parameter.shape, std, seed, name))


def drawn(shape: torch.Size, std: float, seed: int, name: str) -> torch.Tensor:
    """N(0, std) from the generator that belongs to (seed, name), drawn on the CPU."""
    digest = hashlib.blake2b(f"initialisation/{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def _spread(model: "IntegratorLanguageModel", name: str, num_inputs: int) -> float:
    """Standard deviation of one matrix of `num_inputs` columns."""
    config = model.config
    if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        if config.integrator is not None and config.integrator.readout == "state":
            return 1.2 / math.sqrt(num_inputs)
        return 0.02 / math.sqrt(2 * config.num_layers)
    if "controller." in name and name.endswith("output.weight"):  # also each expert's
        return 0.01
    if name == "embedding.table.weight":
        return _table_spread(config)
    if config.rank and name == "embedding.project_up.weight":
        return 4.0 / math.sqrt(config.d_model)
    return 0.6 / math.sqrt(config.d_model)


def _table_spread(config: "ModelConfig") -> float:
    """Standard deviation of the table, V rows of D or R, so that an embedding's channels have that of the embedding."""
    embedding = config.embedding_std or 0.6 / math.sqrt(config.d_model)
    is_free = config.tie_head and config.embedding_norm
    if is_free and not config.embedding_std:
        embedding *= min(1.0, math.sqrt(_REFERENCE_WIDTH / config.d_model))
    return embedding / (4.0 * math.sqrt(config.rank / config.d_model)) if config.rank else embedding
