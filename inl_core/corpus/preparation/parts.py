"""A preparation over many machines: each prepares a part of the files, and one joins the parts.

    part i/N:  its files -> chunks of text -> chunks of tokens, where a tokenizer is given
    finish:    all chunks, without copies of what stands in an earlier part -> as in stages.py

- The files, in their order, are dealt to the parts by size. A file is never divided, so no machine reads the files of
  another, and the documents of all parts one after the other are those of a preparation as a whole.
- A tokenizer that is to be trained needs a sample of all documents. So it is trained once, when the parts are joined,
  and all chunks are encoded then.
- Parts are only read when they are joined: whatever happens meanwhile, they can be joined again.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inl_core.corpus.manifest import MANIFEST, WORK, Manifest, changed, difference, verify
from inl_core.corpus.preparation import workspace
from inl_core.corpus.preparation.chunks import Chunks
from inl_core.corpus.preparation.joined_chunks import JoinedChunks
from inl_core.corpus.preparation.sealed import DamagedWork, read_sealed
from inl_core.corpus.preparation.stages import Preparation, Report, start_over_if_damaged
from inl_core.corpus.preparation.workspace import Part
from inl_core.corpus.reading.sources import STDIN, SourceFile
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.recipe.data import DataSettings

_MOST_NAMED = 12


@dataclass(frozen=True)
class PartSummary:
    """What a part holds. Copies of documents in other parts, and bad rows, are dealt with when the parts are joined."""

    part: str
    num_sources: int
    rows: int
    documents: int
    bytes: int
    is_tokenised: bool


def prepare_part(
    settings: DataSettings,
    directory: str | os.PathLike[str],
    part: Part,
    *,
    progress: Report | None = None,
    overwrite: bool = False,
) -> PartSummary | None:
    """Prepare a part, or go on where a stopped run was; None when the whole data set is there already.

    Parts may be prepared at once, on machines that see the sources and `directory` under the same paths.

    Raises:
        RecipeError: as `prepare`; and stdin, which each part would have to read, is a source.
        ArtefactError: as `prepare`, but for bad rows, which count when the parts are joined.
    """
    directory, report = Path(directory), progress or (lambda event: None)
    if _finished(settings, directory, overwrite) is not None:
        return None
    with workspace.locked_part(directory, part) as work:

        def run() -> PartSummary:
            preparation = Preparation(settings, directory, work, report, parts=part.count)
            files = shares(preparation.resolve(), part.count)[part.number]
            if not files:
                preparation.say(f"part {part} has no file: there are fewer of them than parts, and none is divided")
            preparation.read(preparation.hash_sources(files))
            # The only document of a data set is cut in two when the parts are joined, so its text is kept until then.
            if settings.tokenizer.file is not None and _num_documents(preparation.chunks) != 1:
                preparation.encode(Tokenizer.load(settings.tokenizer.file))
            return _summary(part, files, preparation.chunks)

        return start_over_if_damaged(work, report, run)


def finish(
    settings: DataSettings,
    directory: str | os.PathLike[str],
    *,
    progress: Report | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Join the parts into the data set, or return its manifest when it is there already.

    It is byte for byte the one that `prepare` makes of the same settings and sources, with the same versions. Where
    sources have weights it holds the same documents as often, and copies may stand in another order.

    Raises:
        RecipeError: as `prepare_part`.
        ArtefactError: as `prepare`; and a part is missing, unfinished, damaged, being prepared, or made from other
            sources or settings or by other versions.
    """
    directory, report = Path(directory), progress or (lambda event: None)
    workspace.check_directory(directory)
    manifest = _finished(settings, directory, overwrite)
    if manifest is not None and not (directory / WORK).exists():
        return manifest
    with workspace.locked(directory) as work:
        if manifest is None:
            manifest = start_over_if_damaged(work, report, lambda: _join(settings, directory, work, report))
        workspace.clear(work)
        workspace.remove_parts(directory)
    return manifest


def shares(files: Sequence[SourceFile], count: int) -> dict[int, list[SourceFile]]:
    """The files of each part, numbered from 1: neighbours, with about as many bytes as those of the other parts."""
    total, end = max(1, sum(file.size for file in files)), 0
    found: dict[int, list[SourceFile]] = defaultdict(list)
    for file in files:
        middle_twice = 2 * end + file.size
        end += file.size
        found[min(middle_twice * count // (2 * total), count - 1) + 1].append(file)
    return found


def _finished(settings: DataSettings, directory: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the data set if it is there; with `overwrite` only if it is the wanted one."""
    workspace.check_directory(directory)
    if STDIN in settings.sources:
        raise RecipeError("`-` (stdin) cannot be prepared in parts: it can be read only once; write it to a file")
    if not (directory / MANIFEST).exists():
        return None
    try:
        return verify(directory, settings=settings)
    except ArtefactError:
        if overwrite:
            return None
        raise


def _join(settings: DataSettings, directory: Path, work: Path, report: Report) -> Manifest:
    parts = _all_parts(directory)
    preparation = Preparation(settings, directory, work, report, parts=len(parts))
    shared = shares(preparation.resolve(), len(parts))
    files, chunks = [], []
    for part, path in parts.items():
        try:
            found = Chunks(path)
            hashed = _checked(preparation, path, found, shared[part.number])
            chunks.append((len(files), found))
            files += hashed
        except (DamagedWork, _Unusable) as error:
            problem = f"{error.path.name} is damaged" if isinstance(error, DamagedWork) else str(error)
            raise ArtefactError(f"{directory}: part {part}: {problem}; prepare it again with --part {part}") from None
    preparation.begin(files)
    preparation.chunks = JoinedChunks(work, chunks)
    return preparation.make(files)


def _all_parts(directory: Path) -> dict[Part, Path]:
    """The directories of all parts, in order; ArtefactError when some are missing or they are parts of two kinds."""
    parts = workspace.part_directories(directory)
    counts = sorted({part.count for part in parts})
    if not counts:
        raise ArtefactError(f"{directory}: there are no parts; prepare each with --part I/N before --finish")
    if len(counts) > 1:
        few, many = (sum(part.count == count for part in parts) for count in counts[:2])
        raise ArtefactError(
            f"{directory / WORK}: holds parts of two preparations, {few} of {counts[0]} and {many} of {counts[1]}; "
            f"delete the directories part-*-of-{counts[0]:05d} or part-*-of-{counts[1]:05d}"
        )
    missing = [str(part) for number in range(counts[0]) if (part := Part(number + 1, counts[0])) not in parts]
    if missing:
        named = ", ".join(missing[:_MOST_NAMED])
        if len(missing) > _MOST_NAMED:
            named += f" and {len(missing) - _MOST_NAMED:,} more"
        raise ArtefactError(f"{directory}: missing parts: {named}; prepare each with --part")
    return parts


class _Unusable(Exception):
    """Says what is wrong with a part."""


def _checked(preparation: Preparation, path: Path, chunks: Chunks, files: Sequence[SourceFile]) -> list[SourceFile]:
    """The files of a part with the hashes that it took; _Unusable when it is not what is wanted now."""
    plan = read_sealed(path / workspace.PLAN, workspace.Plan)
    if plan is None:
        raise _Unusable("was stopped before its end")
    problem = difference(plan.versions, workspace.versions()) or difference(plan.settings, preparation.settings_key)
    if problem:
        raise _Unusable(f"was made otherwise: {problem}")
    known = {(file.path, file.format, file.compression): file for file in plan.files}
    hashed = []
    for file in files:
        before = known.pop((file.path, file.format, file.compression), None)
        if problem := changed(file, before):
            raise _Unusable(f"was made from other sources: {problem}")
        hashed.append(replace(file, sha256=before.sha256 if before else ""))
    if known:
        raise _Unusable(f"was made from other sources: {next(iter(known.values())).name} is not one of its files")
    numbers = range(chunks.count())
    is_read = bool(numbers) and chunks.info(numbers[-1]).last
    must_be_encoded = preparation.settings.tokenizer.file is not None and _num_documents(chunks) != 1
    if not is_read or (must_be_encoded and not all(map(chunks.is_encoded, numbers))):
        raise _Unusable("was stopped before its end")
    return hashed


def _num_documents(chunks: Chunks) -> int:
    return sum(len(chunks.hashes(number)[0]) for number in range(chunks.count()))


def _summary(part: Part, files: Sequence[SourceFile], chunks: Chunks) -> PartSummary:
    numbers = range(chunks.count())
    return PartSummary(
        part=str(part),
        num_sources=len(files),
        rows=sum(info.num_rows for info in chunks.infos()),
        documents=_num_documents(chunks),
        bytes=sum(int(chunks.hashes(number)[1].sum()) for number in numbers),
        is_tokenised=all(map(chunks.is_encoded, numbers)),
    )
