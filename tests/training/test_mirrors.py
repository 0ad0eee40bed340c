"""TensorBoard and Weights & Biases: what is missing is said before a model is built, and no mirror ends a run."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from inl_core.errors import RecipeError
from inl_core.training.metrics import MetricsWriter, read_metrics
from inl_core.training.mirrors import check_mirrors, open_mirrors
from inl_core.training.session import open_session


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in for the package, with neither key nor settings on this machine."""
    module = ModuleType("wandb")
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online", base_url="https://api.wandb.ai"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return module


@pytest.fixture
def recipe(make_recipe):
    return make_recipe(training={"logging": {"wandb": True}})


def test_without_a_key_one_line_names_the_ways_out(wandb, recipe):
    with pytest.raises(RecipeError, match=r"training.logging.wandb: no API key.*WANDB_API_KEY.*WANDB_MODE=offline"):
        check_mirrors(recipe)


@pytest.mark.parametrize(("name", "value"), [("WANDB_API_KEY", "k" * 40), ("WANDB_MODE", "offline")])
def test_a_key_or_offline_in_the_environment_is_enough(wandb, recipe, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    check_mirrors(recipe)


def test_a_key_in_netrc_counts_for_its_host_alone(wandb, recipe, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_mirrors(recipe)
    (tmp_path / "netrc").write_text("machine elsewhere.org login user password secret\n")
    with pytest.raises(RecipeError):
        check_mirrors(recipe)
    (tmp_path / "netrc").write_bytes(b"\xff machine")
    with pytest.raises(RecipeError):
        check_mirrors(recipe)


def test_offline_in_its_own_settings_is_enough(wandb, recipe):
    wandb.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    check_mirrors(recipe)


def test_a_package_without_settings_is_judged_by_the_environment(wandb, recipe, monkeypatch):
    del wandb.setup
    with pytest.raises(RecipeError, match="no API key"):
        check_mirrors(recipe)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    check_mirrors(recipe)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_named_with_its_extra(make_recipe, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match=rf'training.logging.{name}: not installed; pip install "inl\[logging\]"'):
        check_mirrors(make_recipe(training={"logging": {name: True}}))


def test_a_session_that_cannot_be_opened_is_one_line(wandb, recipe, tmp_path):
    def init(**settings):
        raise Exception("api_key not configured (no-tty).\n  call wandb.login()")

    wandb.init = init
    with pytest.raises(RecipeError, match=r"^training.logging.wandb: api_key not configured \(no-tty\). call wandb"):
        open_mirrors(tmp_path, recipe)


def test_a_mirror_that_fails_is_left_and_the_rows_go_on(wandb, recipe, tmp_path):
    def log(figures, step):
        if step == 2:
            raise ConnectionError("gone")
        seen.append((step, figures))

    seen, warnings = [], []
    wandb.init = lambda **settings: SimpleNamespace(log=log)
    writer = MetricsWriter(tmp_path, recipe, warnings.append)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0, "scored_on": "x", "none": float("nan"), "list": [1.0, 2.0]})
    assert seen == [(1, {"loss": 1.0, "list/0": 1.0, "list/1": 2.0})]
    assert warnings == ["training.logging.wandb: stopped, metrics.jsonl goes on: gone"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_session_says_it_before_it_takes_a_directory(wandb, recipe, tmp_path):
    with pytest.raises(RecipeError, match="no API key"), open_session(recipe, tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
