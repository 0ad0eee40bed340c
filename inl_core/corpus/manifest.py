"""The manifest of a prepared data set: what it holds, what it was made from, and whether both are still as it says."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inl_core.corpus.reading.builtin import python_signature
from inl_core.corpus.reading.paths import absolute_source, local_path, portable
from inl_core.corpus.reading.sources import BUILTIN_PYTHON, STDIN, SourceFile, hash_file, resolve_sources
from inl_core.corpus.shard_check import check_shards, prepare_again
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, InlError
from inl_core.files import entry_path, read_record
from inl_core.recipe.data import DataSettings

MANIFEST, TOKENIZER, QUARANTINE, WORK = "manifest.json", "tokenizer.json", "quarantine.jsonl", ".prepare"
SPLITS = ("train", "validation")

_AS_IT_IS = (
    "name it as data.directory without data.sources to use it as it is, or prepare the text anew in another directory"
)
_MANIFEST_LIMIT = 1 << 30
"""Bytes. A manifest names every source file, of which there may be millions."""

Count = Annotated[int, Field(strict=True, ge=0, le=1 << 60)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 24)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    """One Arrow file: `size` and `sha256` are those of the file, `bytes` counts the text of its documents."""

    file: str
    documents: Count
    tokens: Count
    bytes: Count
    size: Count
    sha256: str


class SplitInfo(_Frozen):
    """Totals of a split; `bytes` counts UTF-8 text without special tokens."""

    documents: Count
    tokens: Count
    bytes: Count
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for name in ("documents", "tokens", "bytes"):
            if sum(getattr(shard, name) for shard in self.shards) != getattr(self, name):
                raise ValueError(f"{name} is not the sum of the shards'")
        return self


class Source(_Frozen):
    """One file that was read: its absolute path, its format, and its size, time (ns) and hash when it was read."""

    name: str
    path: str
    argument: str
    format: str
    size: Count
    modified: int
    sha256: str

    @classmethod
    def of(cls, file: SourceFile, found: str | None) -> "Source":
        """The entry of a file, in which the format and columns `found` were recognised."""
        return cls(
            name=file.name,
            path="" if file.argument == STDIN else file.path,
            argument=file.argument,
            format=found or file.format,
            size=file.size,
            modified=file.modified,
            sha256=file.sha256,
        )


class Manifest(_Frozen):
    """Everything about a data set except its tokens.

    `fingerprint` names the content: it is made from the tokenizer and all shards, and from nothing else.
    """

    format: Literal[1] = 1
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=1 << 24)]
    bos_id: TokenId
    eos_id: TokenId
    document_policy: Literal["bos, tokens, eos; text is never read as special tokens"]
    has_prompts: bool
    splits: dict[str, SplitInfo]
    rows: Count
    duplicates: Count
    empty: Count
    quarantined: Count
    sources: tuple[Source, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits must be {' and '.join(SPLITS)}")
        if max(self.bos_id, self.eos_id) >= self.vocab_size:
            raise ValueError("bos_id and eos_id must be below vocab_size")
        sources = self.settings.get("sources")
        if not isinstance(sources, list | tuple) or not all(isinstance(source, str) for source in sources):
            raise ValueError("settings.sources must be a list of names")
        shards = [shard for split in self.splits.values() for shard in split.shards]
        if self.fingerprint != data_fingerprint(self.tokenizer_fingerprint, shards):
            raise ValueError("the fingerprint is not that of the tokenizer and the shards")
        return self


def settings_key(settings: DataSettings, *, prepared: Manifest | None = None) -> dict[str, Any]:
    """The settings that decide the content, in a form that can be compared: absolute paths, the tokenizer's hash.

    A tokenizer file that is gone is taken to be that of the `prepared` data set, which keeps a copy of it.
    """
    tokenizer = settings.tokenizer
    if tokenizer.file is None:
        chosen: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "sample_bytes": tokenizer.sample_bytes}
    elif prepared is not None and not tokenizer.file.exists():
        chosen = {"tokenizer": prepared.settings.get("tokenizer")}
    else:
        chosen = {"tokenizer": Tokenizer.load(tokenizer.file).fingerprint}
    columns = settings.columns.model_dump(exclude_none=True)
    return {
        "sources": [_absolute(source) for source in settings.sources],
        **chosen,
        **({"columns": columns} if columns else {}),
        **({"weights": list(settings.weights)} if settings.weights else {}),
        "validation_fraction": settings.validation_fraction,
        "num_shards": settings.num_shards,
    }


def settings_from(settings: DataSettings, base: Path) -> DataSettings:
    """The settings with their relative paths made absolute as seen from the directory `base`."""
    sources = (portable(str(base / local_path(s))) if _is_path(s) else s for s in settings.sources)
    tokenizer = settings.tokenizer
    if tokenizer.file is not None:
        tokenizer = tokenizer.model_copy(update={"file": base / tokenizer.file})
    return settings.model_copy(update={"sources": tuple(sources), "tokenizer": tokenizer})


def default_directory(settings: DataSettings) -> Path:
    """data/NAME, where NAME is made from the sources and the tokenizer.

    A short hash is added where the name leaves out a setting that differs from its default.
    """
    stems = [_stem(source) for source in settings.sources]
    name = stems[0] + (f"-and-{len(stems) - 1}-more" if len(stems) > 1 else "")
    tokenizer = settings.tokenizer
    name += f"-{tokenizer.file.stem if tokenizer.file else tokenizer.vocab_size}"
    plain = DataSettings(tokenizer=type(tokenizer)(vocab_size=tokenizer.vocab_size))
    fields = {"sources", "tokenizer", "validation_fraction", "num_shards"}
    # Where these are not given, the name is that of earlier versions.
    fields |= {name for name in ("columns", "weights") if getattr(settings, name) != getattr(plain, name)}
    if settings.model_dump(include=fields) != plain.model_dump(include=fields):
        update: dict[str, Any] = {"sources": tuple(map(_absolute, settings.sources))}
        if tokenizer.file:
            update["tokenizer"] = tokenizer.model_copy(update={"file": Path(portable(str(tokenizer.file)))})
        canonical = settings.model_copy(update=update)
        name += f"-{hashlib.sha256(canonical.model_dump_json(include=fields).encode()).hexdigest()[:6]}"
    return Path("data") / name


def load_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read manifest.json; ArtefactError when the data set is missing, unfinished or damaged."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not os.path.lexists(path):
        if (directory / WORK).exists():
            raise ArtefactError(f"{directory}: preparation was not finished; run the same prepare-data again")
        make = f"make one with inl prepare-data ... --output {directory}"
        raise ArtefactError(f"{directory}: no data set here (no {MANIFEST}); {make}")
    try:
        manifest = read_record(path, Manifest, limit=_MANIFEST_LIMIT)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; {prepare_again(directory)}") from None
    _check_names(directory, manifest)
    return manifest


def shard_name(split: str, number: int, count: int) -> str:
    """What shard `number` of the `count` of a split is called."""
    return f"{split}-{number:05d}-of-{count:05d}.arrow"


def verify(
    directory: str | os.PathLike[str],
    *,
    deep: bool = False,
    settings: DataSettings | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Check a data set and return its manifest.

    Every shard must be as the preparation wrote it, the tokenizer must be the one that encoded the text, and sources
    that still exist must be unchanged (in size and time, or in their hash where only the time differs).

    Args:
        deep: read every shard, also those that were found whole before (shard_check.py).
        settings: these must be the ones that the data set was prepared with. Settings without sources accept every data
            set, also one whose sources have changed since.
        note: is told when so much has to be read that it takes long.

    Raises:
        ArtefactError: names the file, what is wrong with it, and the fix.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    tokenizer = Tokenizer.load(directory / TOKENIZER)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        problem = "not the tokenizer that encoded this data set"
        raise ArtefactError(f"{directory / TOKENIZER}: {problem}; {prepare_again(directory)}")
    check_ids(directory, manifest, tokenizer)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    check_shards(directory, manifest, shards, anew=deep, note=note)
    if settings is not None and settings.is_directory_alone:
        return manifest
    if settings is not None and (problem := difference(manifest.settings, settings_key(settings, prepared=manifest))):
        raise ArtefactError(f"{directory}: prepared with other settings: {problem}; {_AS_IT_IS}")
    if problem := _stale_source(directory, manifest):
        raise ArtefactError(f"{directory}: stale: {problem} since it was prepared; {_AS_IT_IS}")
    return manifest


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first value that is not as it was, in words; None when all are."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return f"{key} was {_brief(before.get(key))}, is now {_brief(now.get(key))}"
    return None


def _stale_source(directory: Path, manifest: Manifest) -> str | None:
    """The first source that changed since the preparation, in words; None when none did.

    A source that does not exist here any more is no problem: the data set is complete without it.
    """
    recorded = {source.path: source for source in manifest.sources}
    for argument in manifest.settings["sources"]:
        if argument == STDIN:
            continue
        if argument.startswith("builtin:"):
            if problem := _stale_builtin(recorded):
                return problem
            continue
        try:
            files = resolve_sources([argument], exclude=directory)
        except InlError:
            continue
        for file in files:
            if problem := changed(file, recorded.get(file.path)):
                return problem
        here = {file.path for file in files}
        gone = [s.path for s in manifest.sources if _absolute(s.argument) == argument and s.path not in here]
        if gone:
            return f"{gone[0]} was removed"
    return None


def data_fingerprint(tokenizer_fingerprint: str, shards: list[Shard]) -> str:
    """sha256 over the fingerprint of the tokenizer and the names and hashes of the shards."""
    lines = [tokenizer_fingerprint, *(f"{shard.file} {shard.sha256}" for shard in shards)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_names(directory: Path, manifest: Manifest) -> None:
    """ArtefactError when a split names a shard of the other: the fingerprint does not tell which split has which."""
    for split, info in manifest.splits.items():
        for number, shard in enumerate(info.shards):
            entry_path(directory, shard.file)
            if shard.file != (name := shard_name(split, number, len(info.shards))):
                raise ArtefactError(
                    f"{directory / MANIFEST}: damaged: splits.{split} names {shard.file!r} where {name} belongs; "
                    f"{prepare_again(directory)}"
                )


def check_ids(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """ArtefactError when vocabulary, bos or eos in the manifest are not those of the tokenizer."""
    for name in ("vocab_size", "bos_id", "eos_id"):
        said, is_so = getattr(manifest, name), getattr(tokenizer, name)
        if said != is_so:
            problem = f"{name} is {said:,}, the tokenizer's is {is_so:,}"
            raise ArtefactError(f"{directory / MANIFEST}: damaged: {problem}; {prepare_again(directory)}")


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stale_builtin(recorded: dict[str, Source]) -> str | None:
    where, _, digest = python_signature()
    source = recorded.get(where)  # None where another Python than this one prepared the data: nothing can be said
    return f"{BUILTIN_PYTHON} ({where}) changed" if source and source.sha256 != digest else None


def changed(file: SourceFile, before: Source | SourceFile | None) -> str | None:
    """How a file differs from what was read, in words; None when it does not."""
    if before is None:
        return f"{file.name} is new"
    has_same_time = file.modified == before.modified
    if file.size == before.size and (has_same_time or hash_file(file).sha256 == before.sha256):
        return None
    return f"{file.name} changed"


def _is_path(source: str) -> bool:
    return source != STDIN and not source.startswith("builtin:")


def _absolute(source: str) -> str:
    return absolute_source(source) if _is_path(source) else source


def _stem(source: str) -> str:
    if source == STDIN:
        return "stdin"
    if source.startswith("builtin:"):
        return source.replace(":", "-")
    name = local_path(source).resolve().name.split(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-") or "text"


def _brief(value: object) -> str:
    return str(value)[:12] + "..." if isinstance(value, str) and len(value) > 40 else str(value)
