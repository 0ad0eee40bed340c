"""Whether the shards of a data set are as its manifest says: each is read once, its digest and every row checked.

- Shards that were found whole are remembered in a small file beside them, by size, times and inode. From then on a
  start takes one `stat` for each shard. Where that file cannot be written, every run reads the shards once, in its
  first process, whose word the other processes take (`found_whole`, `believe`).
- Trusting the file opens no new way to forge data: whoever can write it can write the shards and the manifest too.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from inl_core.errors import ArtefactError
from inl_core.files import ASIDE, entry_path, open_regular, read_json, write_whole

if TYPE_CHECKING:
    from inl_core.corpus.manifest import Manifest, Shard

VERIFIED = ".verified.json"

_SETTLED_NS = 50_000_000
"""Nanoseconds. A file that was changed this shortly before it was read could change again with the same time on it."""

_MUCH = 1 << 30
"""Bytes of shards. Reading more than this takes so long that a message is due."""

_TOKEN_TYPES = (pa.large_list(pa.uint16()), pa.large_list(pa.uint32()))

_found: dict[tuple[str, str], dict[str, list[int]]] = {}
"""Shards that this process found whole: (directory, hash of the manifest) -> name of the shard -> its identity."""


def check_shards(
    directory: Path,
    manifest: "Manifest",
    shards: "Iterable[Shard]",
    *,
    anew: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Check these shards of the manifest.

    Args:
        anew: read them even if they are remembered as whole.
        note: is told when reading takes long.

    Raises:
        ArtefactError: a shard is missing, is not a regular file, lies outside the directory or is not as the
            preparation wrote it; or its rows are not documents of this vocabulary.
    """
    about = (manifest.vocab_size, manifest.bos_id, manifest.eos_id, manifest.has_prompts, manifest.splits)
    key = hashlib.sha256(repr(about).encode()).hexdigest()
    found = _found.setdefault((str(directory), key), {})
    known = {} if anew else _remembered(directory, key) | found
    todo = []
    for shard in shards:
        path = entry_path(directory, shard.file)
        identity = _identity(path, shard.size)
        if known.get(shard.file) != identity:
            todo.append((path, shard, identity))
    much = sum(shard.size for _, shard, _ in todo)
    if much >= _MUCH:
        note(f"{directory}: reading {much:,} bytes of shards to check them, as they are new or changed")
    is_news = False
    for path, shard, identity in todo:
        is_settled = time.time_ns() - max(identity[1:3]) > _SETTLED_NS
        found.pop(shard.file, None)  # it must not count as whole if it turns out to be damaged by now
        _look(path, shard, manifest)
        if is_settled:
            found[shard.file], is_news = identity, True
    if is_news and (problem := _remember(directory, key, known | found)) and much >= _MUCH:
        note(f"{directory / VERIFIED}: cannot be written ({problem}), so every start reads the shards again")


def found_whole(directory: Path) -> dict[str, dict[str, list[int]]]:
    """The shards that this process found whole there, for `believe` in other processes."""
    return {key: found for (place, key), found in _found.items() if place == str(directory)}


def believe(directory: Path, found: Mapping[str, dict[str, list[int]]]) -> None:
    """Take the word of another process for shards that it found whole, as long as they are the very same files."""
    for key, shards in found.items():
        _found.setdefault((str(directory), key), {}).update(shards)


def prepare_again(directory: Path) -> str:
    """What to do about a damaged data set, in words."""
    return f"prepare it again: inl prepare-data ... --output {directory} --overwrite"


def _identity(path: Path, size: int) -> list[int]:
    """[size, time of the content, time of the last change, inode] of a file; ArtefactError unless it has this size."""
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
    except ArtefactError as error:
        raise ArtefactError(f"{error}; {prepare_again(path.parent)}") from None
    if found.st_size != size:
        raise ArtefactError(
            f"{path}: {found.st_size:,} bytes, the manifest says {size:,}; {prepare_again(path.parent)}"
        )
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _look(path: Path, shard: "Shard", manifest: "Manifest") -> None:
    """Read a whole shard and compare it with the manifest; ArtefactError when it differs."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore - a real file has readinto
    problem = "its sha256 is not the manifest's" if digest != shard.sha256 else None
    try:
        problem = problem or _problem(path, shard, manifest)
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"not a readable Arrow file: {' '.join(str(error).split())}"
    if problem is not None:
        raise ArtefactError(f"{path}: damaged ({problem}); {prepare_again(path.parent)}")


def _problem(path: Path, shard: "Shard", manifest: "Manifest") -> str | None:
    """What is wrong with the rows of a shard, in words, or None."""
    reader = pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
    types = dict(zip(reader.schema.names, reader.schema.types, strict=True))
    plain = {"prompt_length": pa.int32(), "num_bytes": pa.int32()}
    if types.pop("tokens", None) not in _TOKEN_TYPES or types != plain:
        return "its columns are not those of token shards"
    totals = np.zeros(3, dtype=np.int64)
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns) or batch["tokens"].values.null_count:
            return "it has empty cells"
        tokens, offsets = batch["tokens"].values.to_numpy(), batch["tokens"].offsets.to_numpy()
        prompts, sizes = batch["prompt_length"].to_numpy(), batch["num_bytes"].to_numpy()
        if not batch.num_rows:
            continue
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(tokens) or lengths.min() < 2:
            return "its rows do not divide its tokens into documents"
        if int(tokens.max()) >= manifest.vocab_size:
            return f"token id {int(tokens.max()):,}, the vocabulary has {manifest.vocab_size:,}"
        if (tokens[offsets[:-1]] != manifest.bos_id).any() or (tokens[offsets[1:] - 1] != manifest.eos_id).any():
            return "a document does not begin and end as it must"
        ends = {manifest.bos_id, manifest.eos_id}
        if sum(np.count_nonzero(tokens == id) for id in ends) != 2 * batch.num_rows:
            return "a document has the token for an end of documents inside it"
        if (prompts < 0).any() or (prompts >= lengths).any() or (sizes < 0).any():
            return "a document's prompt or size is impossible"
        if prompts.any() and not manifest.has_prompts:
            return "a document has a prompt, the manifest says that none has"
        totals += (batch.num_rows, len(tokens), int(sizes.sum(dtype=np.int64)))
    return (
        None if totals.tolist() == [shard.documents, shard.tokens, shard.bytes] else "its totals are not the manifest's"
    )


def _remembered(directory: Path, key: str) -> dict[str, Any]:
    try:
        content = read_json(directory / VERIFIED)
    except ArtefactError:
        return {}
    shards = content.get("shards")
    return shards if content.get("manifest") == key and isinstance(shards, dict) else {}


def _remember(directory: Path, key: str, found: dict[str, Any]) -> str | None:
    """Write the file; returns why it cannot be written (a full or read-only disk), or None."""
    try:
        for leftover in directory.glob(f".{VERIFIED}.*{ASIDE}"):  # of a process that was killed while it wrote the file
            leftover.unlink(missing_ok=True)
        write_whole(directory / VERIFIED, json.dumps({"manifest": key, "shards": found}, indent=1) + "\n")
    except OSError as error:
        return error.strerror or str(error)
    return None
