"""TensorBoard and Weights & Biases: what is missing is said before a model is built, no mirror ends a run, and after a
kill each step is there once."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from inl_core.errors import RecipeError
from inl_core.recipe.load import dump_recipe
from inl_core.training.metrics import MetricsWriter, cut_metrics, read_metrics
from inl_core.training.mirrors import check_mirrors, open_mirrors
from inl_core.training.session import open_session

PROJECT = Path(__file__).parents[2]


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


class Session:
    """A stand-in for a session of W&B whose server has the steps before `step`."""

    def __init__(self, step=0):
        self.starting_step, self.seen = step, []

    def log(self, figures, step):
        if step == 4:
            raise ConnectionError("gone")
        self.seen.append((step, figures))

    def finish(self):
        self.seen.append("end")


def test_a_mirror_that_fails_is_left_and_the_rows_go_on(wandb, recipe, tmp_path):
    session, warnings = Session(), []
    wandb.init = lambda **settings: session
    writer = MetricsWriter(tmp_path, recipe, warnings.append)
    writer.open_mirrors()
    for step in (3, 4, 5):
        writer.write({"step": step, "loss": 1.0, "scored_on": "x", "none": float("nan"), "list": [1.0, 2.0]})
    writer.close_mirrors()
    assert session.seen == [(3, {"loss": 1.0, "list/0": 1.0, "list/1": 2.0})]
    assert warnings == ["training.logging.wandb: stopped, metrics.jsonl goes on: gone"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [3, 4, 5]


def test_a_resumed_session_gives_the_server_what_it_has_not(wandb, make_recipe, tmp_path):
    logging = {"wandb": True, "wandb_project": "p", "wandb_entity": "e", "wandb_group": "g", "wandb_tags": ["a", "b"]}
    recipe, asked, sessions = make_recipe(training={"logging": logging}), [], [Session(), Session(step=2)]

    def init(**settings):
        asked.append(settings)
        return sessions[len(asked) - 1]

    wandb.init = init
    writer = MetricsWriter(tmp_path / "run", recipe, pytest.fail)
    writer.path.parent.mkdir()
    writer.open_mirrors()
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0})
    again = MetricsWriter(tmp_path / "run", recipe, pytest.fail)  # the first one was killed
    again.open_mirrors()
    again.write({"step": 5, "loss": 1.0})
    again.close_mirrors()
    assert sessions[1].seen == [(2, {"loss": 1.0}), (3, {"loss": 1.0}), (5, {"loss": 1.0}), "end"]
    assert asked[0]["id"] == asked[1]["id"]
    for settings in asked:
        assert [settings[name] for name in ("project", "entity", "group", "tags")] == ["p", "e", "g", ("a", "b")]
        assert settings["resume"] == "allow"


KILLED = """
import os, sys
from pathlib import Path
from inl_core.recipe.load import load_recipe
from inl_core.training.metrics import MetricsWriter

writer = MetricsWriter(Path("run"), load_recipe(Path("recipe.yaml")), sys.exit)
writer.open_mirrors()
for step in range(1, 6):
    writer.write({"step": step, "loss": float(step)})
os.kill(os.getpid(), 9)
"""


def write_killed_and_resumed(directory, recipe):
    """Steps 1 to 5, a kill, and a session that goes on after step 3, up to step 6."""
    run = directory / "run"
    run.mkdir()
    (directory / "recipe.yaml").write_text(dump_recipe(recipe))
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    killed = subprocess.run([sys.executable, "-c", KILLED], cwd=directory, env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    for file in run.glob("tensorboard/*"):  # TensorBoard goes by the second in its name, and a real resume is later
        *name, second, rest = file.name.split(".", 4)
        file.rename(file.with_name(".".join([*name, str(int(second) - 10), rest])))
    cut_metrics(run, 3)
    resumed = MetricsWriter(run, recipe, pytest.fail)
    resumed.open_mirrors()
    for step in range(4, 7):
        resumed.write({"step": step, "loss": 10.0 * step, "tokens": 8 * step})
    resumed.write({"step": 6, "validation_loss": 2.5, "tokens": 48})
    resumed.close_mirrors()


EXPECTED = {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0, 6: 60.0}


def test_tensorboard_has_each_step_once_after_a_kill(make_recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = make_recipe(training={"logging": {"tensorboard": True}})
    write_killed_and_resumed(tmp_path, recipe)
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == list(EXPECTED.items())
    assert [(event.step, event.value) for event in shown.Scalars("validation_loss")] == [(6, 2.5)]
    assert [(event.step, event.value) for event in shown.Scalars("tokens")] == [(4, 32), (5, 40), (6, 48)]
    times = [row["time"] for row in read_metrics(tmp_path / "run")]
    assert [event.wall_time for event in shown.Scalars("loss")] == pytest.approx(times[:6])


def test_the_newest_offline_session_of_weights_and_biases_has_each_step_once(make_recipe, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = make_recipe(training={"logging": {"wandb": True}})
    write_killed_and_resumed(tmp_path, recipe)
    wandb.teardown()  # ends its process, which writes the file
    *_, newest = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert (tmp_path / "run" / "wandb-id").read_text().strip() in newest.name
    [file] = newest.glob("*.wandb")
    found = history(file)
    assert {step: row["loss"] for step, row in found} == EXPECTED
    assert len(found) == len(EXPECTED)
    assert found[-1][1]["validation_loss"] == 2.5


def history(file):
    """(step, figures) of each row in a file of an offline session."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore - it is made at import

    found = []
    for data in records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found.append((record.history.step.num, row))
    return found


def records(data):
    """The records of a file in LevelDB's format of logs, which W&B puts 7 bytes of its own before."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left_in_block = 32_768 - place % 32_768
        if left_in_block < 7:
            place += left_in_block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)  # after a checksum
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record that is whole, or the last piece of one
            yield whole
            whole = b""


def test_a_session_says_it_before_it_takes_a_directory(wandb, recipe, tmp_path):
    with pytest.raises(RecipeError, match="no API key"), open_session(recipe, tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
