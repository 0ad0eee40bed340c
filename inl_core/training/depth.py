"""What the stream does in each of its steps: the terms of its equation, and how much each of them moves.

- The equation is that of inl_core/model/stream.py. The forces are the terms whose sum is the velocity after a step; the
  movements are the terms by which that step changes the state.
- A share is the length of one term over the sum of all terms' lengths, for one token: its shares add up to 1.
- Legend: B batch, S sequence, N tokens, D d_model, L layers.
"""

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel, Trajectory
from inl_core.model.dynamics import rms
from inl_core.model.stream import Step

Place = dict[str, Any]
"""layer (None for the embedding) and sub_layer."""

EMBEDDING: Place = {"layer": None, "sub_layer": "embedding"}
FORCES = ("momentum", "candidate", "pull", "excitation")
MOVEMENTS = ("velocity", "transport", "anchor")
_TERMS = {"force": ("what makes the velocity", FORCES), "movement": ("what moves the state", MOVEMENTS)}


def places(num_layers: int) -> list[Place]:
    """Where each of the 2L steps happens, in their order."""
    names = ("attention", "feed-forward")
    return [{"layer": layer, "sub_layer": name} for layer in range(num_layers) for name in names]


def place_name(place: Place) -> str:
    """`embedding`, `layer 3 attention`, `layer 3 feed-forward`."""
    return place["sub_layer"] if place["layer"] is None else f"layer {place['layer']} {place['sub_layer']}"


def coefficients(step: Step) -> dict[str, Tensor]:
    """The learned vectors that a step has, each (D,); gamma and phi have a value for each excited channel."""
    names = ("alpha", "transport", "anchor", "beta", "mu")
    found = {name: getattr(step, name) for name in names} | {
        name: getattr(step.excitation, name, None) for name in ("gamma", "phi")
    }
    return {name: vector.detach() for name, vector in found.items() if vector is not None}


def forces(step: Step, path: Trajectory, t: int, amplitude: Tensor) -> dict[str, Tensor]:
    """The terms whose sum is the velocity after step t, counted from 0, each of the states' shape (..., D)."""
    x, v = path.states[t], path.velocities[t]
    assert path.candidate is not None
    found = {"candidate": path.candidate[t]}
    if step.alpha is not None:
        found["momentum"] = path.alpha[t] * v
    if step.mu is not None:
        found["pull"] = path.beta[t] * (step.mu - x)
    if step.excitation is not None:
        found["excitation"] = step.excitation.at(step.time, amplitude).expand_as(x)
    return found


def movements(step: Step, path: Trajectory, t: int) -> dict[str, Tensor]:
    """The terms by which step t, counted from 0, changes the state, each of its shape (..., D)."""
    found = {"velocity": path.velocities[t + 1]}
    if step.anchor is not None:
        found["anchor"] = step.anchor * path.velocities[0]  # the velocity before the first step is the embedding
    if step.transport is not None:  # what is left, so that nobody need know where documents begin
        found["transport"] = path.states[t + 1] - path.states[t] - sum(found.values())
    return found


def shares(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The share of each term (..., D) of one token, (...)."""
    lengths = {name: term.norm(dim=-1) for name, term in terms.items()}
    total = torch.stack(list(lengths.values())).sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return {name: length / total for name, length in lengths.items()}


def token_rms(values: Tensor) -> Tensor:
    """The root mean square of each token: (..., D) -> (...)."""
    return rms(values).squeeze(-1)


def step_shares(step: Step, path: Trajectory, t: int, amplitude: Tensor) -> dict[str, Tensor]:
    """force_NAME and movement_NAME, the shares of the terms of step t, where there is more than one term."""
    found = {}
    for kind, terms in (("force", forces(step, path, t, amplitude)), ("movement", movements(step, path, t))):
        if len(terms) > 1:
            found |= {f"{kind}_{name}": share for name, share in shares(terms).items()}
    return {name: found[name] for names in share_groups(found).values() for name in names}


def share_groups(present: Container[str]) -> dict[str, dict[str, str]]:
    """Title -> share -> its term, in the one order in which all reports show them.

    Args:
        present: names of shares, as of `step_shares`; a group of which none is present is left out.
    """
    found = {
        title: {f"{kind}_{term}": term for term in terms if f"{kind}_{term}" in present}
        for kind, (title, terms) in _TERMS.items()
    }
    return {title: names for title, names in found.items() if names}


def quantities(model: IntegratorLanguageModel, path: Trajectory) -> Iterator[tuple[Place, str, Tensor]]:
    """Everything there is to say of a stream: a place, what it is, and its values.

    The learned vectors; of every token, by the trajectory of states (2L+1, B, S, D): state and velocity, the rms of x
    and v after the step, residual, the rms of how far it moved x, and the shares. alpha is what acted on the tokens
    where it depends on them.
    """
    assert model.entry is not None
    if model.entry.transport is not None:
        yield EMBEDDING, "transport", model.entry.transport.detach()
    for t, (place, step) in enumerate(zip(places(model.config.num_layers), model.steps(), strict=True)):
        found = coefficients(step)
        if step.kappa is not None:
            found["alpha"] = path.alpha[t]
        found |= {"state": token_rms(path.states[t + 1]), "velocity": token_rms(path.velocities[t + 1])}
        found |= {"residual": token_rms(path.states[t + 1] - path.states[t])}
        for name, values in (found | step_shares(step, path, t, model.excitation_amplitude)).items():
            yield place, name, values
