"""A run belongs to one process at a time, and a holder that is gone is told from one that lives."""

import fcntl
import json
import os
import socket
import subprocess
import sys

import pytest

from inl_core import locking
from inl_core.errors import ArtefactError
from inl_core.locking import open_lock
from inl_core.training import claim as claims
from inl_core.training.claim import OWNER, RANKS, claim, claim_new, join
from inl_core.training.run_status import is_taken


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(claims, "_RETRIES", 0.0)
    monkeypatch.setattr(claims, "_SILENCE", 0.0)


def is_free(path):
    return not is_taken(path)


def leave(directory, host, **more):
    """What a process that was killed leaves."""
    directory.mkdir()
    holder = {"host": host, "pid": 12, "since": "yesterday", "job": "77"} | more
    (directory / OWNER).write_text(json.dumps(holder))


def test_a_second_owner_is_refused_and_told_who_has_it(tmp_path):
    refused = pytest.raises(ArtefactError, match=rf"in use by process {os.getpid()} on ")
    with claim(tmp_path / "run", pytest.fail), refused, claim(tmp_path / "run", print):
        pass
    with claim(tmp_path / "run", pytest.fail):
        pass


def test_new_runs_take_one_directory_each_and_leave_none_behind(tmp_path):
    with claim_new(tmp_path / "twin", is_free, pytest.fail) as one, claim_new(tmp_path / "twin", is_free, print) as two:
        assert (one.name, two.name) == ("twin", "twin-2")
        (one / "metrics.jsonl").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["twin"]
    with claim_new(tmp_path / "twin", is_free, pytest.fail) as three:
        assert three.name == "twin-2"


def test_the_lock_of_a_killed_process_is_free_and_its_end_is_told(tmp_path):
    code = (
        "import os, sys, pathlib; from inl_core.training.claim import claim\n"
        "with claim(pathlib.Path(sys.argv[1]), print): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")]).returncode == -9
    said = []
    with claim(tmp_path / "run", said.append):
        pass
    assert len(said) == 1
    assert "taken over" in said[0]


def test_a_rank_that_outlives_its_run_keeps_others_out(tmp_path):
    (tmp_path / "run").mkdir()
    with join(tmp_path / "run"), pytest.raises(ArtefactError, match="in use"), claim(tmp_path / "run", print):
        pass
    with claim(tmp_path / "run", print):
        assert not (tmp_path / "run" / RANKS).exists()


def test_lock_files_are_open_for_both_kinds_of_lock(tmp_path):
    with open_lock(tmp_path / "lock") as file:  # NFS refuses a lock that the file is not open for
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        assert os.get_inheritable(file.fileno()) is False


def test_a_silent_holder_on_another_machine_is_taken_over(tmp_path):
    leave(tmp_path / "run", "elsewhere")
    said = []
    with claim(tmp_path / "run", said.append):
        pass
    assert "process 12 on elsewhere (job 77)" in said[-1]


@pytest.mark.parametrize(
    ("host", "more"),
    [
        ("elsewhere", {"boot": "8ad50b1c"}),
        (socket.gethostname(), {"boot": "8ad50b1c"}),  # a pod that was started again on another node
        (socket.gethostname(), {"boot": ""}),
        (socket.gethostname(), {}),  # an earlier version left it
    ],
)
def test_a_holder_on_another_machine_that_gives_signs_of_life_is_respected(tmp_path, monkeypatch, host, more):
    leave(tmp_path / "run", host, **more)
    monkeypatch.setattr(claims, "_SILENCE", 1000.0)
    beats = iter(range(1, 10))
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: os.utime(tmp_path / "run" / OWNER, ns=(0, next(beats))))
    with pytest.raises(ArtefactError, match=f"process 12 on {host}"), claim(tmp_path / "run", print):
        pass


def test_a_holder_that_ended_on_this_machine_is_not_waited_for_whatever_its_name_was(tmp_path, monkeypatch):
    leave(tmp_path / "run", "a container", boot=claims._boot())
    monkeypatch.setattr(claims, "_SILENCE", 1000.0)
    assert claims.find_holder(tmp_path / "run") is None
    with claim(tmp_path / "run", print):
        pass


def test_where_the_kernel_has_no_boot_id_every_holder_is_listened_for(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_BOOT", tmp_path / "none")
    leave(tmp_path / "run", socket.gethostname(), boot="")
    monkeypatch.setattr(claims, "_SILENCE", 1000.0)
    assert "process 12" in (claims.find_holder(tmp_path / "run") or "")


def test_where_the_file_system_has_no_locks_the_holders_sign_of_life_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "try_lock", lambda file, **how: None)
    monkeypatch.setattr(locking, "try_lock", lambda file, **how: None)
    with claim(tmp_path / "run", pytest.fail):
        monkeypatch.setattr(claims, "_SILENCE", 1000.0)
        beats = iter(range(1, 10))
        monkeypatch.setattr(
            claims.time, "sleep", lambda seconds: os.utime(tmp_path / "run" / OWNER, ns=(0, next(beats)))
        )
        with pytest.raises(ArtefactError, match="in use"), claim(tmp_path / "run", print):
            pass


def put_in_the_way(path, kind):
    """Something that is no lock file under the name of one; returns a file that must stay as it is."""
    victim = path.with_name("victim")
    path.parent.mkdir(parents=True, exist_ok=True)
    victim.write_text("precious")
    {
        "link": lambda: path.symlink_to(victim),
        "link to nothing": lambda: path.symlink_to("nothing"),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
    }[kind]()
    return victim


@pytest.mark.parametrize("name", [OWNER, RANKS])
@pytest.mark.parametrize("kind", ["link", "link to nothing", "fifo", "directory"])
def test_a_lock_that_is_no_regular_file_is_refused_by_name_and_left_alone(tmp_path, name, kind):
    path = tmp_path / "run" / name
    victim = put_in_the_way(path, kind)
    with pytest.raises(ArtefactError, match=f"{name}: not a regular file"), claim(tmp_path / "run", print):
        pass
    if name == RANKS:
        with pytest.raises(ArtefactError, match=name), join(tmp_path / "run"):
            pass
    assert victim.read_text() == "precious"
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != OWNER) == sorted({name, "victim"} - {OWNER})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"host": 1}', "\udc80"])
def test_a_damaged_lock_file_stops_nobody(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OWNER).write_bytes(text.encode(errors="surrogateescape"))
    with claim(tmp_path / "run", print):
        pass
