"""One run, one owner: the lock that a training process holds on its run's directory.

- Rank 0 locks `run.lock` with flock, which the kernel drops when the process ends, however it ends. The file says who
  holds it, so that a refusal can say it too, and its modification time is renewed every few seconds.
- Every other rank holds `ranks.lock`. While one of them lives, nobody else gets the run.
- Some network file systems lock within one machine only. So a holder on another machine counts as gone only when the
  modification time of its file stands still.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from inl_core.errors import ArtefactError
from inl_core.files import read_json
from inl_core.locking import lock, open_lock, try_lock

OWNER, RANKS = "run.lock", "ranks.lock"
_RETRIES = 1.0
"""Seconds that a process which is just ending is given to release its lock."""
_HEARTBEAT = 10.0
_SILENCE = 30.0
"""Seconds without a sign of life after which a holder on another machine counts as gone."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "FLUX_JOB_ID", "JOB_ID")
"""Where Slurm, PBS, LSF, Flux and Grid Engine say in the environment which job this is."""


@contextmanager
def claim(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Own a run's directory, which is made if need be, until the end of the context.

    Args:
        say: hears of a holder that ended without releasing the run, or that must be waited for.

    Raises:
        ArtefactError: another process owns it, and the message says which; or a lock file is no regular file.
        OSError: the directory cannot be made or written.
    """
    with ExitStack() as held:
        if not _try_claim(directory, say, held):
            raise ArtefactError(f"{directory}: in use by {_holder_text(directory)}; wait for it, or stop it first")
        yield


@contextmanager
def claim_new(base: Path, is_free: Callable[[Path], bool], say: Callable[[str], None]) -> Iterator[Path]:
    """Own the first of `base`, base-2, base-3, ... that nobody owns and that `is_free`; raises as `claim` does."""
    path, number = base, 2
    while True:
        with ExitStack() as held:
            # Looked at twice, because a run may have ended between the first look and the lock.
            if is_free(path) and _try_claim(path, say, held) and is_free(path):
                yield path
                return
        path, number = base.with_name(f"{base.name}-{number}"), number + 1


@contextmanager
def join(directory: Path) -> Iterator[None]:
    """Hold the lock of every rank but the first; there is none where this machine does not see the directory."""
    with ExitStack() as held:
        if directory.is_dir():
            file = held.enter_context(open_lock(directory / RANKS))
            try_lock(file, is_shared=True, patience=_RETRIES)
        yield


def find_holder(directory: Path) -> str | None:
    """Which process owns a run, in words, as far as can be told at once; None when none does.

    Raises:
        ArtefactError: a lock file is no regular file.
    """
    is_free = {}
    for name in (OWNER, RANKS):
        with suppress(OSError), open_lock(directory / name, make=False) as file:
            is_free[name] = try_lock(file, is_shared=True)  # let go at once; whoever starts now tries for longer
    who = _read_holder(directory)
    if False in is_free.values():
        return _holder_text(directory)
    has_ended = is_free.get(OWNER) and _is_here(who)
    with suppress(FileNotFoundError):  # it may end just now
        if who and not has_ended and _age(directory / OWNER) < _SILENCE:
            return _holder_text(directory)
    return None


def _try_claim(directory: Path, say: Callable[[str], None], held: ExitStack) -> bool:
    """Lock both files for as long as `held` lasts; False when another process has one of them."""
    owner, is_locked = lock(directory / OWNER, patience=_RETRIES)
    if owner is None:
        return False
    held.enter_context(owner)
    before = _read_holder(directory)
    # Whoever has the lock is alone on this machine: the kernel does not give it twice.
    is_ended = (is_locked and _is_here(before)) or not before
    if _rank_lives(directory) or not (is_ended or _is_silent(directory, say)):
        return False
    if before:
        say(f"{directory}: {_holder_text(directory)} ended without letting it go; taken over")
    text = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}
    text["since"] = time.strftime("%Y-%m-%d %H:%M:%S%z")
    text |= {"job": job} if (job := next(filter(None, map(os.environ.get, _JOBS)), None)) else {}
    with suppress(OSError):  # a full disk: the lock holds all the same
        owner.truncate(0)
        owner.write(json.dumps(text).encode())
    if not is_locked:
        time.sleep(_RETRIES)  # without locks: of two that began at the same moment, the last to write owns the run
        if _read_holder(directory) != text:
            return False
    held.callback(_release, directory)
    held.enter_context(_heartbeat(owner))
    return True


def _rank_lives(directory: Path) -> bool:
    """Whether a rank of an earlier owner still runs; the file is removed when none does."""
    path = directory / RANKS
    with suppress(FileNotFoundError), open_lock(path, make=False) as file:
        if try_lock(file, patience=_RETRIES) is False:
            return True
        path.unlink(missing_ok=True)
    return False


def _is_silent(directory: Path, say: Callable[[str], None]) -> bool:
    """Whether the holder gives no sign of life; where the last sign is recent, wait for another one."""
    path = directory / OWNER
    last, wait = path.stat().st_mtime_ns, _SILENCE - _age(path)
    if wait > 0:
        say(f"{directory}: {_holder_text(directory)} may still own it; watching {wait:.0f} s for a sign of life")
    end = time.monotonic() + wait
    while time.monotonic() < end:
        time.sleep(0.5)
        if path.stat().st_mtime_ns != last:
            return False
    return True


def _age(path: Path) -> float:
    """Seconds since a file was modified, by the clock of its file system where a file can be made to read it."""
    try:
        probe = path.with_name(f".{path.name}.{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    return max(0.0, now - path.stat().st_mtime)


@contextmanager
def _heartbeat(file: FileIO) -> Iterator[None]:
    """Renew the file's modification time every few seconds, in a thread that does nothing else."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_HEARTBEAT):
            with suppress(OSError):
                os.utime(file.fileno())

    thread = threading.Thread(target=beat, daemon=True, name="run lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _release(directory: Path) -> None:
    """Remove the lock files while the run is still ours, and the directory too if it is empty."""
    with suppress(OSError, ArtefactError):
        _rank_lives(directory)
    with suppress(OSError):
        (directory / OWNER).unlink()
        directory.rmdir()


def _boot() -> str:
    """What Linux calls the running kernel, anew at each start of a machine; empty where that cannot be read.

    A host name tells no machines apart: a job of Kubernetes keeps its own when it is started again on another node.
    """
    with suppress(OSError):
        return _BOOT.read_text("ascii").strip()
    return ""


def _is_here(holder: dict[str, Any]) -> bool:
    """Whether a holder runs, or ran, on this machine since it was started; False where that is not known."""
    return bool(boot := _boot()) and holder.get("boot") == boot


def _read_holder(directory: Path) -> dict[str, Any]:
    """What the lock file says; empty when it says nothing that can be read."""
    try:
        return read_json(directory / OWNER, limit=10_000)
    except ArtefactError:
        return {}


def _holder_text(directory: Path) -> str:
    who = _read_holder(directory)
    if not who:
        return "another process"
    job = f" (job {who['job']})" if "job" in who else ""
    return f"process {who.get('pid')} on {who.get('host')}{job}, which began at {who.get('since')}"
