"""The documents' figures about sizes, as they print them, for docs/sizes.md to set beside ours."""

from dataclasses import dataclass

from inl_core.recipe.sizes import SIZES

VOCABULARY = 50_000
"""The vocabulary of the documents' examples."""


@dataclass(frozen=True)
class Documented:
    """Parameters of one size in the documents' tables; None where they give no figure."""

    size: str
    standard: float | None
    """Document 002, "Standard Architecture"."""
    optimised: float | None
    """Document 002, "Optimized Architecture", and document 001, "Real Params"."""


DOCUMENTED: tuple[Documented, ...] = (
    Documented("small", 43e6, 30e6),
    Documented("medium", 112e6, 80e6),
    Documented("large", 303e6, 220e6),
    Documented("xlarge", 808e6, 590e6),
    Documented("3B", 3e9, 2.2e9),
    Documented("7B", None, 5.2e9),
    Documented("13B", None, 9.8e9),
    Documented("3072x32", None, None),
)
assert [entry.size for entry in DOCUMENTED] == list(SIZES)


@dataclass(frozen=True)
class Claim:
    """A share of parameters that the documents say an optimisation saves, at dimensions they name."""

    part: str
    text: str
    change: float
    """optimised / full - 1, in whole percents."""


CLAIM_DIMENSIONS = {"d_model": 2048, "num_layers": 24, "num_heads": 16}
CLAIMS: tuple[Claim, ...] = (
    Claim("embedding", "low-rank embedding, 50k x 2048 (document 002)", -0.87),
    Claim("controller", "shared controller, 24 layers x 2048 (documents 000 and 001)", -0.96),
    Claim("mu", "hierarchical mu, 2048 dims in groups of 64 (documents 000 and 001)", -0.98),
    Claim("excitation", 'sparse excitation, "10x less compute" (documents 000 and 002)', -0.90),
)
