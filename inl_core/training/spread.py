"""How the values of one quantity are spread: moments, percentiles, and what its variance is between.

- All figures of a record are computed on the device, and the host waits for them once (`to_numbers`).
- Legend: T iterations, N tokens, D d_model.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inl_core.training.records import VARIANCES

PERCENTILES = (5, 50, 95)
SATURATION = 0.01
_LARGEST_SAMPLE = 65_536  # sorting more of them would be what a record costs most


def statistics_of(values: Tensor) -> dict[str, Tensor]:
    """mean, std, min, max, p5, p50, p95 of all values (..., D), each (); percentiles of an even sample of 65,536."""
    flat = values.detach().float().flatten()
    stride = -(-flat.numel() // _LARGEST_SAMPLE) or 1
    while math.gcd(stride, values.shape[-1]) > 1:  # or the sample would miss some of the D dimensions
        stride += 1
    quantiles = torch.quantile(flat[::stride], torch.tensor([p / 100 for p in PERCENTILES], device=flat.device))
    figures = {"mean": flat.mean(), "std": flat.std(correction=0), "min": flat.min(), "max": flat.max()}
    return figures | {f"p{p}": value for p, value in zip(PERCENTILES, quantiles, strict=True)}


def saturation(name: str, values: Tensor, beta_max: float | None) -> Tensor:
    """The share of values within 1% of a bound, (): 0 and 1 for alpha and gate, 0 and beta_max, if any, for beta."""
    top = beta_max if name == "beta" else 1.0
    if top is None:
        return (values < SATURATION).float().mean()
    return ((values < SATURATION * top) | (values > (1 - SATURATION) * top)).float().mean()


def variance_parts(values: Tensor) -> dict[str, Tensor]:
    """What the variance of a coefficient (T, ..., D) is between, each (): the parts add up to the whole variance.

        variance_dimensions    Var_d E[x | d]            channels differ, whatever the token
        variance_tokens        E_d Var_n E[x | n, d]     the same channel differs from token to token
        variance_iterations    E_{n,d} Var_t x           the same channel of a token differs between iterations

    By the law of total variance, taken twice. A controller that gives every token the same has no variance between
    tokens.
    """
    x = values.detach().float().flatten(1, -2)  # (T, N, D)
    by_token = x.mean(0)
    by_dimension = by_token.mean(0)
    parts = (
        by_dimension.var(correction=0),
        (by_token - by_dimension).square().mean(),  # torch's var over a leading dimension takes 20 times as long
        (x - by_token).square().mean(),
    )
    return dict(zip(VARIANCES, parts, strict=True))


def distance(values: Tensor, start: Tensor | float) -> Tensor:
    """The root mean square of values - start, ()."""
    return (values.detach() - start).float().square().mean().sqrt()


def to_numbers(rows: Sequence[Mapping[str, Tensor]]) -> list[dict[str, float]]:
    """The same figures as numbers. The host waits for the device once for all of them."""
    flat = [figure for row in rows for figure in row.values()]
    numbers = iter(torch.stack(flat).tolist() if flat else [])
    return [{name: next(numbers) for name in row} for row in rows]


def summarise(values: Tensor) -> dict[str, float]:
    """`statistics_of` as numbers."""
    return to_numbers([statistics_of(values)])[0]
