"""Sources -> a prepared data set: tokenizer, shards, the bad rows that were set aside, and the manifest.

    hash the sources -> chunks of text -> split -> tokenizer -> chunks of tokens -> shards -> manifest

- Every arrow ends in files that appear whole, by a rename. So a killed run goes on from the last of them, and its
  result is byte for byte that of a run which was never stopped.
- The manifest is written last: without one there is no data set.
- Memory holds a chunk, a few batches and 8 bytes for each document, whatever the size of the input.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from pydantic import RootModel

from inl_core.corpus.encoding import token_dtype
from inl_core.corpus.manifest import (
    MANIFEST,
    QUARANTINE,
    TOKENIZER,
    WORK,
    Manifest,
    Source,
    data_fingerprint,
    settings_key,
    verify,
)
from inl_core.corpus.preparation import workspace
from inl_core.corpus.preparation.chunks import ChunkInfo, Chunks, HashedDocuments
from inl_core.corpus.preparation.sealed import DamagedWork, check_seal, read_sealed, write_sealed
from inl_core.corpus.preparation.shards import write_quarantine, write_shards
from inl_core.corpus.preparation.text_chunks import check_rows, read_into_chunks
from inl_core.corpus.preparation.token_chunks import encode_chunks
from inl_core.corpus.preparation.validation_split import Split, in_sample
from inl_core.corpus.reading.rows import named_forms
from inl_core.corpus.reading.sources import STDIN, SourceFile, check_unchanged, hash_file, resolve_sources
from inl_core.corpus.shard_check import check_shards
from inl_core.corpus.tokenizer import Tokenizer, train_tokenizer
from inl_core.errors import ArtefactError
from inl_core.files import expand_home, write_text_aside
from inl_core.recipe.data import DataSettings

_SPLIT = "split.json"


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is: `done` of `total` bytes (None: unknown) in a stage, or a message to show.

    stage: hash, read, tokenizer, tokenise, shards or done.
    """

    stage: str
    done: int = 0
    total: int | None = None
    message: str | None = None


Report = Callable[[PrepareProgress], None]
Result = TypeVar("Result")


def prepare(
    settings: DataSettings,
    directory: str | os.PathLike[str],
    *,
    progress: Report | None = None,
    overwrite: bool = False,
    wait: bool = False,
) -> Manifest:
    """Prepare the sources into `directory`, or return its manifest when it holds exactly that already.

    A preparation that was stopped goes on where it was, or starts over when its files were damaged since.

    Args:
        progress: is told how far it is.
        overwrite: replace another data set in the directory, or one whose sources have changed.
        wait: wait for another process that prepares the same directory.

    Raises:
        RecipeError: a source is missing or cannot be used, or the directory holds something other than a data set.
        ArtefactError: an input file is damaged, too many rows are bad, there is no text at all, the directory holds
            another data set (without `overwrite`) or parts of one, or another process is preparing it (without `wait`).
    """
    directory = expand_home(directory)
    if settings.is_directory_alone:
        return verify(directory, settings=settings)
    workspace.check_directory(directory)
    report = progress or (lambda event: None)
    is_finished = (directory / MANIFEST).exists() and not overwrite
    if is_finished and STDIN not in settings.sources and not (directory / WORK).exists():
        return verify(directory, settings=settings)  # before anything is written: the disk may be read-only

    def waiting() -> None:
        report(PrepareProgress("hash", message=f"{directory}: another process is preparing it; waiting for it to end"))

    with workspace.locked(directory, waiting if wait else None) as work:
        # Another process may have finished the data set while this one waited for the lock.
        is_finished = (directory / MANIFEST).exists() and not overwrite
        stdin_copy = workspace.keep_stdin(work) if STDIN in settings.sources else None
        if is_finished:
            manifest = _keep_existing(settings, directory, stdin_copy)
        elif workspace.part_directories(directory):
            raise ArtefactError(
                f"{directory}: holds parts of a preparation; join them with --finish, or delete {directory / WORK}"
            )
        else:
            manifest = start_over_if_damaged(
                work, report, lambda: _run(Preparation(settings, directory, work, report, stdin_copy=stdin_copy))
            )
        workspace.clear(work)
    return manifest


def start_over_if_damaged(work: Path, report: Report, run: Callable[[], Result]) -> Result:
    """What `run` returns; where it finds a damaged file in `work`, the working files are removed and it runs again."""
    try:
        return run()
    except DamagedWork as error:
        if error.path.parent != work:
            raise
        report(PrepareProgress("hash", message=f"{error.path}: damaged since a stopped run: starting over"))
        workspace.clear(work, keep_stdin=True)
        return run()


def _run(preparation: "Preparation") -> Manifest:
    files = preparation.hash_sources(preparation.resolve())
    preparation.read(files)
    return preparation.make(files)


def _keep_existing(settings: DataSettings, directory: Path, stdin_copy: Path | None) -> Manifest:
    """The manifest of a finished data set that is whole and the one that is wanted; ArtefactError otherwise."""
    manifest = verify(directory, settings=settings)
    if stdin_copy is not None and stdin_copy.stat().st_size:
        sha256 = hash_file(SourceFile("stdin", str(stdin_copy), STDIN, "text")).sha256
        if all(source.sha256 != sha256 for source in manifest.sources if source.argument == STDIN):
            raise ArtefactError(f"{directory}: prepared from other text on stdin; use --overwrite or another --output")
    return manifest


class Preparation:
    """The stages, each to be run once. `notes`, which say what was guessed or is unusual, also go into the manifest.

    Args:
        work: the directory of the working files.
        parts: how many parts the data set is made in; 0 when it is made as a whole.
    """

    def __init__(
        self,
        settings: DataSettings,
        directory: Path,
        work: Path,
        report: Report,
        *,
        stdin_copy: Path | None = None,
        parts: int = 0,
    ) -> None:
        self.settings, self.directory, self.work, self.report = settings, directory, work, report
        self.stdin_copy, self.parts = stdin_copy, parts
        self.chunks = Chunks(work)
        self.settings_key = settings_key(settings)
        self.notes: list[str] = []
        self.stage = "hash"

    def resolve(self) -> list[SourceFile]:
        """The files that the sources stand for."""
        return resolve_sources(
            self.settings.sources, note=self.note, stdin_copy=self.stdin_copy, exclude=self.directory
        )

    def make(self, files: list[SourceFile]) -> Manifest:
        """The data set of what the chunks hold, which was read from the files."""
        totals = check_rows(self.chunks.infos(), self.settings.max_bad_ratio)
        split = self._split()
        self.stage = "tokenizer"
        tokenizer = self._tokenizer(split)
        self.encode(tokenizer, split)
        self.stage = "shards"
        return self._write(files, totals, tokenizer, split)

    def say(self, message: str) -> None:
        """Tell the user."""
        self.report(PrepareProgress(self.stage, message=message))

    def note(self, message: str) -> None:
        """Tell the user and the manifest."""
        # A restarted run must note the same as one that was never stopped.
        self.notes.append(message)
        self.say(message)

    def hash_sources(self, files: list[SourceFile]) -> list[SourceFile]:
        """The files with their hashes. When they are not those of a stopped run, what that run did is removed."""
        before = read_sealed(self.work / workspace.PLAN, workspace.Plan)
        known = {file.path: file for file in before.files} if before else {}
        total, done = sum(file.size for file in files), 0
        hashed = []
        for file in files:
            old = known.get(file.path)
            if old and file.modified and (old.size, old.modified) == (file.size, file.modified):
                hashed.append(replace(file, sha256=old.sha256))
            else:

                def on_bytes(count: int, before: int = done) -> None:
                    self.report(PrepareProgress("hash", before + count, total))

                hashed.append(hash_file(file, on_bytes))
            done += file.size
            self.report(PrepareProgress("hash", done, total))
        self.begin(hashed)
        return hashed

    def begin(self, files: list[SourceFile]) -> None:
        """Write down what is worked on; when a stopped run worked on something else, remove what it did."""
        plan = workspace.Plan(settings=self.settings_key, files=files, versions=workspace.versions(), parts=self.parts)
        before = read_sealed(self.work / workspace.PLAN, workspace.Plan)
        if before is None or before.content() != plan.content():
            if before:
                self.say("the settings, the sources or a version changed since a stopped run: starting over")
            workspace.clear(self.work, keep_stdin=True)
            write_sealed(self.work / workspace.PLAN, plan.model_dump_json(indent=1) + "\n")

    def read(self, files: list[SourceFile]) -> None:
        """Read the files into chunks of text."""
        self.stage = "read"
        ends = np.cumsum([file.size for file in files])
        total = int(ends[-1]) if len(ends) else 0

        def on_chunk(number: int, num_bytes: int) -> None:
            before = int(ends[number - 1]) if number else 0
            size = files[number].size if number < len(files) else 0
            # The text of a packed file is longer than the file.
            self.report(PrepareProgress("read", before + min(num_bytes, size), total))

        forms = named_forms(self.settings.columns)
        weights = dict(zip(self.settings.sources, self.settings.weights, strict=False))  # none, or one for each
        read_into_chunks(files, self.chunks, on_chunk=on_chunk, note=self.say, forms=forms, weights=weights)
        check_unchanged(files)

    def _split(self) -> Split:
        """The split. It is kept for a restart, when it could not be chosen again from what the chunks then hold."""
        path = self.work / _SPLIT
        before = read_sealed(path, RootModel[Split])
        if before is not None:
            split = before.root
        else:
            per_chunk = [self.chunks.hashes(number) for number in range(self.chunks.count())]
            hashes, num_bytes = (np.concatenate(columns) for columns in zip(*per_chunk, strict=True))
            if not len(hashes):
                raise ArtefactError("data.weights: no document is left; raise the weights, or name more text")
            can_cut = len(hashes) == 1 and self._can_cut()
            split = Split.choose(hashes, num_bytes, self.settings.validation_fraction, can_cut=can_cut)
            write_sealed(path, json.dumps(asdict(split)))
        if split.note:
            self.note(split.note)
        return split

    def _can_cut(self) -> bool:
        """Whether the only document is plain text."""
        chunks = map(self.chunks.read_text, range(self.chunks.count()))
        document = next(document for chunk in chunks for document in chunk.documents)
        return document.roles == "" and len(document.texts[0]) > 1

    def _tokenizer(self, split: Split) -> Tokenizer:
        """The given tokenizer, or one trained on an even sample of the training documents; kept for a restart."""
        path, wanted = self.work / TOKENIZER, self.settings.tokenizer
        is_kept = os.path.lexists(path)
        if is_kept:
            check_seal(path)
            tokenizer = Tokenizer.load(path)
        elif wanted.file is not None:
            tokenizer = Tokenizer.load(wanted.file)
        else:
            self.report(PrepareProgress("tokenizer"))
            size = min(wanted.sample_bytes, self._num_bytes())
            self.say(f"training a tokenizer of {wanted.vocab_size:,} tokens on {size:,} bytes of text")
            tokenizer = train_tokenizer(self._sample(split, size), vocab_size=wanted.vocab_size)
        if wanted.file is None and tokenizer.vocab_size < wanted.vocab_size:
            self.note(f"the text gives only {tokenizer.vocab_size} of {wanted.vocab_size} tokens")
        if not is_kept:
            write_sealed(path, tokenizer.to_json())
        return tokenizer

    def _sample(self, split: Split, size: int) -> Iterator[str]:
        """Texts of training documents, taken evenly from all of them, of at most `sample_bytes` together.

        `size`: how many bytes they will be, about; progress is told by it, once for each chunk of the text.
        """
        budget = self.settings.tokenizer.sample_bytes
        share = budget / self._num_bytes()
        for number in range(self.chunks.count()):
            chunk = self._text(number, split)
            chosen = ~split.is_validation(chunk.hashes) & in_sample(chunk.hashes, share)
            for index in np.flatnonzero(chosen).tolist():
                budget -= int(chunk.num_bytes[index])
                if budget < 0:
                    return
                yield from chunk.documents[index].texts
            done = min(self.settings.tokenizer.sample_bytes - budget, size)
            self.report(PrepareProgress("tokenizer", done, size))

    def _num_bytes(self) -> int:
        return sum(int(self.chunks.hashes(number)[1].sum()) for number in range(self.chunks.count()))

    def _text(self, number: int, split: Split | None) -> HashedDocuments:
        """The documents of a chunk; where the split cuts the only document, its two parts."""
        chunk = self.chunks.read_text(number)
        if split is None or not split.cut or not chunk.documents:
            return chunk
        parts = split.cut_in_two(chunk.documents[0])
        sizes = np.array([len(part.texts[0].encode()) for part in parts], dtype=np.int32)
        return HashedDocuments(parts, np.array([chunk.hashes[0], split.held_out], dtype=np.uint64), sizes)

    def encode(self, tokenizer: Tokenizer, split: Split | None = None) -> None:
        """Turn the chunks of text that are left into chunks of tokens; without a split, no document is cut."""
        self.stage = "tokenise"
        sizes = [int(self.chunks.hashes(number)[1].sum()) for number in range(self.chunks.count())]
        todo = [number for number in range(len(sizes)) if not self.chunks.is_encoded(number)]
        total, done = sum(sizes), sum(sizes) - sum(sizes[number] for number in todo)
        for number, chunk, num_bytes in encode_chunks(tokenizer, ((n, self._text(n, split)) for n in todo)):
            done += num_bytes
            if chunk is not None:
                self.chunks.write_tokens(number, chunk)
            self.report(PrepareProgress("tokenise", done, total))

    def _write(self, files: list[SourceFile], totals: ChunkInfo, tokenizer: Tokenizer, split: Split) -> Manifest:
        workspace.remove_data_set(self.directory)
        splits, has_prompts = write_shards(
            self.chunks,
            self.directory,
            split,
            num_shards=self.settings.num_shards,
            token_type=token_dtype(tokenizer),
            on_chunk=lambda done, total: self.report(PrepareProgress("shards", done, total)),
        )
        num_bad = write_quarantine(self.directory / QUARANTINE, self.chunks.infos())
        tokenizer.save(self.directory / TOKENIZER)
        shards = [shard for info in splits.values() for shard in info.shards]
        manifest = Manifest(
            fingerprint=data_fingerprint(tokenizer.fingerprint, shards),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            document_policy="bos, tokens, eos; text is never read as special tokens",
            has_prompts=has_prompts,
            splits=splits,
            rows=totals.num_rows,
            duplicates=totals.num_duplicates,
            empty=totals.num_empty,
            quarantined=num_bad,
            sources=tuple(Source.of(file, totals.found.get(str(index))) for index, file in enumerate(files)),
            settings=self.settings_key,
            notes=tuple(self.notes),
        )
        write_text_aside(self.directory / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        check_shards(self.directory, manifest, shards)
        self.report(PrepareProgress("done", 1, 1))
        return manifest
