"""Percentiles of many values come from a sample of them, which must not favour some of the dimensions."""

import numpy as np
import pytest
import torch

from inl_core.training.spread import statistics_of, summarise


@pytest.mark.parametrize("dim", [128, 96, 210])
def test_a_sample_meets_every_dimension_alike(dim: int):
    """Each dimension has a value of its own, so that a sample of some of them alone has other percentiles."""
    values = torch.arange(float(dim)).flip(0).expand(8, 1024, dim)
    found = summarise(values)
    for percent in (5, 50, 95):
        assert found[f"p{percent}"] == pytest.approx(np.percentile(np.arange(dim), percent), abs=1.0)
    assert found["mean"] == pytest.approx((dim - 1) / 2, rel=1e-4)


def test_statistics_are_those_of_float64():
    values = torch.randn((3, 7, 11), generator=torch.Generator().manual_seed(0))
    array = values.double().numpy()
    wanted = {"mean": array.mean(), "std": array.std(), "min": array.min(), "max": array.max()}
    wanted |= {f"p{p}": np.percentile(array, p) for p in (5, 50, 95)}
    assert {name: figure.item() for name, figure in statistics_of(values).items()} == pytest.approx(wanted, rel=1e-5)
