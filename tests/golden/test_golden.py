"""Training still gives the losses that it gave when the curves were recorded: README.md says what to do if not."""

import pytest

from tests.golden.curves import NUM_STEPS, PRESETS, TOLERANCE, Curve, curve_files, merge, read_curve, train

FILES = curve_files()


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


def is_as_recorded(name: str, trained: Curve, dtype: str, last_step: int) -> None:
    _, recorded = read_curve(FILES[name])
    assert trained.data == recorded.data, "the text or its tokenizer changed, so the losses cannot be compared"
    assert len(trained.loss) == last_step
    assert str(last_step) in trained.validation_loss
    assert trained.distance(recorded) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", FILES)
def test_the_first_steps_are_as_recorded(name, data_directory):
    recipe, _ = read_curve(FILES[name])
    is_as_recorded(name, train(recipe, data_directory, "float32", last_step=50), "float32", 50)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "is_plain"), [("float32", False), ("float32", True), ("float64", False)], ids=["32", "32-plain", "64"]
)
@pytest.mark.parametrize("name", FILES)
def test_every_step_is_as_recorded(name, dtype, is_plain, data_directory):
    recipe, _ = read_curve(FILES[name])
    is_as_recorded(name, train(recipe, data_directory, dtype, is_plain=is_plain), dtype, NUM_STEPS)


def test_a_slightly_different_model_is_noticed(data_directory):
    recipe, recorded = read_curve(FILES["v4"])
    changed = merge(recipe, {"model": {"norm_eps": 1e-4}})
    assert train(changed, data_directory, "float32", last_step=50).distance(recorded) > 2 * TOLERANCE["float32"]


def test_every_preset_has_a_curve_that_falls():
    assert set(PRESETS) <= set(FILES)
    for path in FILES.values():
        _, recorded = read_curve(path)
        assert len(recorded.loss) == NUM_STEPS
        assert recorded.loss[-1] < 0.6 * recorded.loss[0]
