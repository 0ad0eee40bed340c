"""The data of a run is found from any directory, and where the whole project was moved."""

import json
import shutil
from pathlib import Path

import pytest

from inl_core.errors import ArtefactError
from inl_core.inference.loading import load_model
from inl_core.inference.texts import open_split
from tests.inference.tiny import reseal, write_checkpoint


@pytest.fixture
def project(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with data/tiny and a run that was started in it, both by relative paths."""
    root = tmp_path / "project"
    shutil.copytree(workplace / "data" / "tiny", root / "data" / "tiny")
    monkeypatch.chdir(root)
    write_checkpoint(Path("runs/v4"), "v4", data=Path("data/tiny"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def data_of(project: Path) -> Path:
    """Where the run's validation split is found."""
    text = open_split(load_model(checkpoint_of(project)))
    assert text.warnings == ()
    return text.source.directory.resolve()  # type: ignore[union-attr]


def checkpoint_of(project: Path) -> Path:
    return project / "runs/v4/checkpoints/step-00000007"


def set_config(checkpoint: Path, **values: object) -> None:
    """Change config.json as if it had been saved so; None drops a key."""
    config = json.loads((checkpoint / "config.json").read_text()) | values
    (checkpoint / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    reseal(checkpoint)


def test_from_another_directory(project: Path) -> None:
    assert data_of(project) == project / "data/tiny"


def test_in_a_project_that_was_moved(project: Path) -> None:
    moved = project.rename(project.with_name("moved"))
    assert data_of(moved) == moved / "data/tiny"


def test_of_an_older_checkpoint_with_a_relative_path(project: Path) -> None:
    set_config(checkpoint_of(project), data_directory="data/tiny", data_directory_from_run=None)
    assert data_of(project) == project / "data/tiny"


def test_another_data_set_of_that_name_is_not_taken_for_it(project: Path) -> None:
    set_config(checkpoint_of(project), data_directory="data/tiny", data_directory_from_run=None)
    other = Path(shutil.copytree(project / "data/tiny", Path("data/tiny").absolute()))
    content = json.loads((other / "manifest.json").read_text())
    content["splits"]["validation"] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}
    (other / "manifest.json").write_text(json.dumps(content))
    assert data_of(project) == project / "data/tiny"
    shutil.rmtree(project / "data")
    with pytest.raises(ArtefactError, match=r"manifest\.json: damaged"):
        data_of(project)


def test_every_place_that_was_tried_is_named(project: Path) -> None:
    shutil.rmtree(project / "data")
    with pytest.raises(ArtefactError, match=f"^{project}/data/tiny: the data the model was trained on is not here"):
        data_of(project)
    moved = project.rename(project.with_name("moved"))
    with pytest.raises(ArtefactError, match=f"^{project}/data/tiny, {moved}/data/tiny: the data the model"):
        data_of(moved)
    set_config(checkpoint_of(moved), data_directory="data/tiny", data_directory_from_run=None)
    with pytest.raises(ArtefactError, match=rf"^data/tiny, {moved}/runs/data/tiny, {moved}/data/tiny, .*not here"):
        data_of(moved)
