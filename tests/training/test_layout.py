"""Who keeps what of a model, and what is refused because it cannot be."""

import pytest

from inl_core.errors import RecipeError
from inl_core.recipe import TrainingSettings
from inl_core.training.layout import Layout, choose_layout
from inl_core.training.optimizers import States

GB = 10**9
STATES = States(40 * GB, 40 * GB, 80 * GB)


def layout(processes, device_gb, optimizer="adamw", **distributed):
    given = {"steps": 1, "optimizer": {"name": optimizer}, "distributed": distributed}
    return choose_layout(TrainingSettings.model_validate(given), processes, STATES, device_gb * GB)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((1, 160), Layout("one")),
        ((8, 160), Layout("ddp")),
        ((8, 159), Layout("fsdp", 8)),
        ((8, 160, "muon"), Layout("ddp")),
    ],
)
def test_auto_keeps_the_model_whole_where_all_of_its_state_fits_a_device(found, expected):
    assert layout(*found) == expected


def test_hsdp_divides_a_copy_among_a_group_and_is_fsdp_where_there_is_one_group():
    assert layout(8, 80, strategy="hsdp", shard_size=4) == Layout("hsdp", 4)
    assert layout(4, 80, strategy="hsdp", shard_size=4) == Layout("fsdp", 4)
    assert layout(1, 160, strategy="hsdp", shard_size=4) == Layout("one")


@pytest.mark.parametrize(
    ("arguments", "distributed", "message"),
    [
        (
            (8, 80),
            {"strategy": "ddp"},
            r"40\.0 \+ .*40\.0 \+ .*80\.0 GB = 160\.0 GB .* has 80\.0 GB; .*fsdp .* 20\.0 GB",
        ),
        ((1, 80), {}, "fsdp over 2 or more processes"),
        ((2, 30), {"strategy": "fsdp"}, r"/ 2 processes = 80\.0 GB .*; fsdp over 6 or more"),
        ((8, 80), {"strategy": "hsdp", "shard_size": 3}, "shard_size 3 does not divide the 8 processes"),
        ((8, 80, "muon"), {"strategy": "fsdp"}, "muon needs whole ones"),
    ],
)
def test_what_cannot_be_is_refused_with_the_arithmetic_and_what_can(arguments, distributed, message):
    with pytest.raises(RecipeError, match=message):
        layout(*arguments, **distributed)


@pytest.mark.parametrize(
    "distributed", [{"strategy": "hsdp"}, {"strategy": "fsdp", "shard_size": 2}, {"shard_size": 1}]
)
def test_a_shard_size_belongs_to_hsdp(distributed):
    with pytest.raises(ValueError, match="shard_size"):
        layout(8, 80, **distributed)
