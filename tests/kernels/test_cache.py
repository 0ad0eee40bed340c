"""Compiled code is taken from the cache only as it was kept, by this user, where nobody else can write."""

import ctypes
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from inl_core.kernels.cpu import cache

NAME, CODE = "native-key-compiler.so", b"\x7fELF" + bytes(range(256)) * 20


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    cache.keep(NAME, CODE)
    return tmp_path / "home" / "inl" / NAME


def found(*endings: str) -> bytes | None:
    return cache.find("native-key-", list(endings))


def test_what_was_kept_is_found_and_nobody_else_may_touch_it(kept):
    with warnings.catch_warnings(action="error"):
        assert found("compiler.so") == CODE
        assert found("missing.so", "compiler.so") == CODE
        assert found() == CODE  # of any compiler
        assert found("missing.so") is None
        assert cache.find("native-other-", []) is None
    assert kept.stat().st_mode & 0o077 == 0
    assert kept.parent.stat().st_mode & 0o077 == 0
    assert [path.name for path in kept.parent.iterdir()] == [NAME]


def stat_result(path: Path, **changes: int):
    """fstat for a file of this name or mode that is not as it is."""
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        status = real(descriptor)
        if not os.path.samestat(status, path.stat()):
            return status
        values = list(status)
        for field, value in changes.items():
            values[("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid").index(field)] = value
        return os.stat_result(values)

    return fstat


@pytest.mark.parametrize("which", ["file", "directory"])
@pytest.mark.parametrize("owner", [0, 12345, 65534])
def test_another_users_is_refused(kept, monkeypatch, which, owner):
    owner = owner if owner != os.getuid() else 4321
    path = kept if which == "file" else kept.parent
    monkeypatch.setattr(cache.os, "fstat", stat_result(path, st_uid=owner))
    with pytest.warns(RuntimeWarning, match="belongs to another user; set XDG_CACHE_HOME"):
        assert found("compiler.so") is None
    if which == "directory":
        before = kept.read_bytes()
        cache.keep(NAME, b"other code")
        assert kept.read_bytes() == before


def test_root_refuses_a_users(kept, monkeypatch):
    monkeypatch.setattr(cache.os, "getuid", lambda: 4321)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert found("compiler.so") is None


@pytest.mark.parametrize("which", ["file", "directory"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720, 0o1777])
def test_what_others_may_write_is_refused_and_closed_to_them_when_kept_again(kept, which, mode):
    path = kept if which == "file" else kept.parent
    path.chmod(mode)
    for endings in (["compiler.so"], []):
        with pytest.warns(RuntimeWarning, match=f"{path}: other users may write to it; chmod go-w"):
            assert found(*endings) is None
    cache.keep(NAME, CODE)
    assert path.stat().st_mode & 0o022 == 0
    assert found("compiler.so") == CODE


def test_a_directory_above_that_all_may_write_to_does_not_matter(kept):
    """As /tmp: the directory that is opened is this user's all the same."""
    kept.parent.parent.chmod(0o1777)
    assert found("compiler.so") == CODE


@pytest.mark.parametrize("which", ["file", "directory"])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_not_followed(kept, tmp_path, which, dangling):
    path, target = kept if which == "file" else kept.parent, tmp_path / "elsewhere"
    if dangling:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.rename(target)
    path.symlink_to(target)
    with pytest.warns(RuntimeWarning, match=f"{path}: a link; put"):
        assert found("compiler.so") is None
    before = target.exists()
    cache.keep(NAME, CODE)
    assert target.exists() == before
    if which == "file":
        assert not path.is_symlink()  # replaced, not written through
        assert found("compiler.so") == CODE


@pytest.mark.parametrize("kind", ["directory", "FIFO", "device"])
def test_what_is_no_file_is_refused_at_once(kept, kind):
    kept.unlink()
    if kind == "directory":
        kept.mkdir(mode=0o700)
    elif kind == "FIFO":
        os.mkfifo(kept, 0o600)
    else:
        try:
            os.mknod(kept, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("devices are root's")
    with pytest.warns(RuntimeWarning, match="not a file; remove it"):
        assert found("compiler.so") is None


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 4096, -1, -32, -33])
def test_a_file_cut_short_or_empty_is_damaged(kept, size):
    content = kept.read_bytes()
    kept.write_bytes(content[:size])
    with pytest.warns(RuntimeWarning, match=f"{kept}: damaged; remove it"):
        assert found("compiler.so") is None


@pytest.mark.parametrize("place", [0, 7, 3000, -33, -32, -1])
def test_a_changed_byte_is_found(kept, place):
    content = bytearray(kept.read_bytes())
    content[place] ^= 1
    kept.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert found("compiler.so") is None


def test_a_longer_file_another_ones_name_and_a_library_without_a_checksum_are_found(kept, monkeypatch):
    content = kept.read_bytes()
    for wrong in (content + b"\0", CODE, content * 2):
        kept.write_bytes(wrong)
        with pytest.warns(RuntimeWarning, match="damaged"):
            assert found("compiler.so") is None
    kept.write_bytes(content)
    kept.rename(kept.with_name("native-key-other.so"))
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert found("other.so") is None
    kept.with_name("native-key-other.so").rename(kept)
    monkeypatch.setattr(cache, "_MOST_BYTES", 1000)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert found("compiler.so") is None


def test_the_next_good_file_is_taken_where_one_is_refused(kept):
    cache.keep("native-key-a.so", CODE)
    kept.with_name("native-key-a.so").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert found() == CODE


@pytest.mark.parametrize("trouble", ["no home", "a file in its place", "read-only", "full disk"])
def test_a_cache_that_cannot_be_used_keeps_nothing_and_leaves_nothing(tmp_path, monkeypatch, trouble):
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    if trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif trouble == "a file in its place":
        home.write_text("")
    elif trouble == "read-only":
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only file system")))
    else:
        monkeypatch.setattr(cache.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left on device")))
    with warnings.catch_warnings(action="error"):
        cache.keep(NAME, CODE)
        assert found("compiler.so") is None
    assert not home.is_dir() or not list((home / "inl").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs a library to load")
@pytest.mark.parametrize("has_memory_files", [True, False])
def test_what_is_loaded_is_the_bytes_and_no_file(monkeypatch, has_memory_files):
    """Each load is its own library: the loader must not take one for another by its path."""
    if not has_memory_files:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    path = next(
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if "libm.so" in line
    )
    code = Path(path).read_bytes()
    one, two = cache.load(code), cache.load(code)
    assert one._handle != two._handle
    one.floor.restype, one.floor.argtypes = ctypes.c_double, [ctypes.c_double]
    assert one.floor(2.5) == 2.0
    with pytest.raises(OSError):  # noqa: PT011 - the loader's own
        cache.load(b"no library")


@pytest.mark.parametrize("value", ["cache", "./cache", "../cache", ".", "~/cache", ""])
def test_a_relative_place_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    cache.keep(NAME, CODE)
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob(NAME)] == [Path("home/.cache/inl") / NAME]
