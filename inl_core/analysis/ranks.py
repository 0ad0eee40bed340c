"""How many directions the matrices of a model use.

The effective rank is exp(H(p)), p_i = s_i / sum s, of the singular values s: n for n equal ones, whatever the matrix's
shape, and 1 where a single direction carries everything.

Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inl_core.analysis.planning.parameters import part_of
from inl_core.model import IntegratorLanguageModel

_PARTS = ("embedding", "head", "controller")


@dataclass(frozen=True)
class MatrixRank:
    """One matrix."""

    part: str
    """embedding, head or controller; "embedding and head" where one matrix is both."""
    name: str
    """The parameter's name."""
    rows: int
    columns: int
    effective_rank: float | None
    """None where the matrix is not finite."""

    @property
    def share(self) -> float | None:
        """Of the largest rank that its shape allows."""
        return None if self.effective_rank is None else self.effective_rank / min(self.rows, self.columns)


def effective_rank(matrix: Tensor) -> float | None:
    """exp of the entropy of the singular values' shares; 0 for a matrix of zeros, None for one that is not finite.

    The singular values are square roots of the eigenvalues of the smaller Gram matrix, in float64, which does not tell
    those below about 1e-7 of the largest from rounding; they are taken for 0.
    """
    w = matrix.detach().double()
    if not w.isfinite().all():
        return None
    gram = w @ w.T if w.shape[0] < w.shape[1] else w.T @ w
    eigenvalues = torch.linalg.eigvalsh(gram)
    s = eigenvalues[eigenvalues > 1e-14 * eigenvalues[-1]].sqrt()
    if not len(s):
        return 0.0
    return torch.special.entr(s / s.sum()).sum().exp().item()


def matrix_ranks(model: IntegratorLanguageModel) -> list[MatrixRank]:
    """The effective rank of each matrix of embedding, head and controller, in the model's order."""
    found = []
    tied = {"embedding": "embedding and head"} if model.head is None else {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and name.endswith(".weight") and (part := part_of(name)) in _PARTS:
            rows, columns = parameter.shape
            found.append(MatrixRank(tied.get(part, part), name, rows, columns, effective_rank(parameter)))
    return found
