"""The source `builtin:python`: the standard library's code and Python's help topics, real text that every user has."""

import hashlib
import io
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from inl_core.corpus.reading.rows import Document

# Tests repeat much of the code they test. topics.py holds the help topics, which are documents of their own here.
_SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_SKIPPED_FILES = {"pydoc_data/topics.py"}


def python_documents() -> Iterator[Document]:
    """A document for each source file of the standard library and for each help topic, in sorted order."""
    root = _library()
    for relative in _source_files(root):
        text = _decode(root / relative)
        if text is not None:
            yield Document(f"python:{relative}", (text,))
    for topic, text in sorted(_topics().items()):
        yield Document(f"pydoc:{topic}", (text,))


def python_signature() -> tuple[str, int, str]:
    """(Python's version and place, bytes in all, hash of the names and sizes), which another Python has otherwise."""
    root = _library()
    sizes = [(relative, (root / relative).stat().st_size) for relative in _source_files(root)]
    listing = "\n".join(f"{name} {size}" for name, size in sizes) + f"\n{sum(map(len, _topics().values()))}"
    name = f"python {sys.version.split()[0]} at {root}"
    return name, sum(size for _, size in sizes), hashlib.sha256(listing.encode()).hexdigest()


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _source_files(root: Path) -> list[str]:
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED_DIRECTORIES]
        for name in files:
            # _sysconfigdata* holds paths and flags of the build, not text that anyone wrote.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                found.append(Path(directory, name).relative_to(root).as_posix())
    return sorted(name for name in found if name not in _SKIPPED_FILES)


def _decode(path: Path) -> str | None:
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except (SyntaxError, ValueError, LookupError):
        return None


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some Linux distributions leave pydoc_data out
        return {}
    return topics
