"""Trajectories of a few named tokens in a plane: the two directions in which their states differ the most."""

import numpy as np

from inl_core.analysis.report.charts import path_plane
from inl_core.analysis.report.parts import Part
from inl_core.analysis.report.probe import Probe


def paths_part(name: str, found: Probe, texts: dict[int, str]) -> Part:
    """A row for each token and step, with its place in the plane of the layer, or of the whole stream."""
    systems = ["the whole depth"] if found.is_stream else found.places
    labels = [f"{n}: {texts[int(found.token_ids[n])]!r}" for n in found.path_tokens]
    rows = []
    for system, states in zip(systems, found.paths, strict=True):
        plane, explained = principal_plane(states)
        for index, label in enumerate(labels):
            for step in range(len(states)):
                where = ("embedding", *found.places)[step] if found.is_stream else f"iteration {step}"
                x, y = plane[step, index].tolist()
                rows.append((system, label, step, where, x, y, explained))
    see = (
        "Each line is one token, from its dot along its arrows: lines that turn swing, and lines that meet forget "
        "where they began. The axes are the two directions in which the states differ the most (principal components)."
    )
    columns = ("system", "token", "step", "place", "first", "second", "explained")
    return Part(f"{name}-paths", "Where the states go", see, columns, rows, (path_plane(systems),))


def principal_plane(states: np.ndarray) -> tuple[np.ndarray, float]:
    """States (T+1, K, D) -> their first two principal components (T+1, K, 2), and the share of variance in these."""
    flat = states.reshape(-1, states.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    total = float((sizes**2).sum())
    plane = (centred @ directions[:2].T).reshape(*states.shape[:2], 2)
    return plane, float((sizes[:2] ** 2).sum()) / total if total else 0.0
