"""builtin:python: the running interpreter's standard-library sources and pydoc topics: real text every user has."""

import hashlib
import io
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from inl_core.corpus.rows import Document

# Test data repeats the sources; topics.py repeats the topics, which are documents of their own here.
_SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
_SKIPPED_FILES = {"pydoc_data/topics.py"}


def python_documents() -> Iterator[Document]:
    """Every standard-library source file and every pydoc topic, one document each, in sorted order."""
    root = _library()
    for relative in _source_files(root):
        text = _decode(root / relative)
        if text is not None:
            yield Document(f"python:{relative}", (text,))
    for topic, text in sorted(_topics().items()):
        yield Document(f"pydoc:{topic}", (text,))


def python_signature() -> tuple[str, int, str]:
    """(what and where, total bytes, hash of names and sizes): changes when another interpreter would be read."""
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
            # _sysconfigdata* holds the build's own paths and flags, not text anyone wrote.
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
    except ImportError:  # some distributions leave pydoc_data out
        return {}
    return topics
