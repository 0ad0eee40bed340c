"""Documents -> a prepared data set: tokenizer, Arrow shards by hash, quarantine, manifest.

    hash sources -> text chunks -> tokenizer -> token chunks -> shards -> manifest

- Every arrow above ends in files that appear whole by a rename, so a killed run goes on from the last one, and its
  result is byte for byte that of a run never stopped.
- The manifest comes last: without one there is no data set.
- Memory holds a chunk, two batches and 8 bytes a document, whatever the input's size.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import RootModel

from inl_core.corpus.assembly import write_quarantine, write_shards
from inl_core.corpus.encoding import encode_chunks, token_dtype
from inl_core.corpus.ingest import RowCounts, check_rows, ingest
from inl_core.corpus.manifest import (
    MANIFEST,
    QUARANTINE,
    TOKENIZER,
    WORK,
    Manifest,
    Source,
    data_fingerprint,
    default_directory,
    load_manifest,
    settings_key,
    verify,
)
from inl_core.corpus.sealed import DamagedWork, check_seal, read_sealed, write_sealed
from inl_core.corpus.shard_check import check_shards
from inl_core.corpus.sources import STDIN, SourceFile, check_unchanged, hash_file, resolve_sources
from inl_core.corpus.split import Split, in_sample
from inl_core.corpus.spool import HashedDocuments, Spool, write_text_aside
from inl_core.corpus.tokenizer import Tokenizer, train_tokenizer
from inl_core.corpus.workspace import PLAN, Plan, check_directory, clear, keep_stdin, locked, remove_data_set
from inl_core.errors import ArtefactError
from inl_core.recipe.data import DataSettings

__all__ = ["Manifest", "PrepareProgress", "default_directory", "load_manifest", "prepare", "verify"]

_SPLIT = "split.json"


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is: `done` of `total` bytes (None: unknown) in a stage, or a message worth showing.

    stage: hash, read, tokenizer, tokenise, shards or done.
    """

    stage: str
    done: int = 0
    total: int | None = None
    message: str | None = None


Report = Callable[[PrepareProgress], None]


def prepare(
    settings: DataSettings,
    directory: str | os.PathLike[str],
    *,
    progress: Report | None = None,
    overwrite: bool = False,
    wait: bool = False,
) -> Manifest:
    """Prepare the sources into `directory`, or return its manifest when it holds exactly that already.

    A preparation that was stopped goes on where it was, or starts over when its files were damaged since. Another data
    set in the directory, or one whose sources changed, is replaced only with `overwrite`. Another preparation of the
    same directory is an error, or waited for with `wait`.

    Raises:
        RecipeError: a source is missing or cannot be used, or the directory holds something else.
        ArtefactError: damaged input, too many bad rows, no text at all, or another data set in the directory.
    """
    directory = Path(directory)
    check_directory(directory)
    report = progress or (lambda event: None)
    is_finished = (directory / MANIFEST).exists() and not overwrite
    if is_finished and STDIN not in settings.sources and not (directory / WORK).exists():
        return verify(directory, settings=settings)  # before anything is written: the disk may be read-only

    def waiting() -> None:
        report(PrepareProgress("hash", message=f"{directory}: another process is preparing it; waiting for it to end"))

    with locked(directory, waiting if wait else None) as work:
        is_finished = (directory / MANIFEST).exists() and not overwrite  # by now, perhaps
        stdin_copy = keep_stdin(work) if STDIN in settings.sources else None
        if is_finished:
            manifest = _keep_existing(settings, directory, stdin_copy)
        else:
            try:
                manifest = _Preparation(settings, directory, stdin_copy, report).run()
            except DamagedWork as error:
                report(PrepareProgress("hash", message=f"{error.path}: damaged since a stopped run: starting over"))
                clear(work, keep_stdin=True)
                manifest = _Preparation(settings, directory, stdin_copy, report).run()
        clear(work)
    return manifest


class _Preparation:
    """One run of the stages. `notes`, what was guessed or is unusual, also go into the manifest."""

    def __init__(self, settings: DataSettings, directory: Path, stdin_copy: Path | None, report: Report) -> None:
        self.settings, self.directory, self.stdin_copy, self.report = settings, directory, stdin_copy, report
        self.spool = Spool(directory / WORK)
        self.notes: list[str] = []
        self.stage = "hash"

    def run(self) -> Manifest:
        key = settings_key(self.settings)
        files = self._plan(key)
        self.stage = "read"
        self._read(files)
        counts = check_rows(self.spool.infos(), self.settings.max_bad_ratio)
        split = self._split()
        self.stage = "tokenizer"
        tokenizer = self._tokenizer(split)
        self.stage = "tokenise"
        self._tokenise(tokenizer, split)
        self.stage = "shards"
        return self._write(key, files, counts, tokenizer, split)

    def say(self, message: str) -> None:
        self.report(PrepareProgress(self.stage, message=message))

    def note(self, message: str) -> None:
        # Every run, restarted or not, must note the same, since the manifest holds the notes.
        self.notes.append(message)
        self.say(message)

    def _plan(self, key: dict) -> list[SourceFile]:
        """The files with their hashes. When they differ from those of a stopped run, its work is dropped."""
        files = resolve_sources(
            self.settings.sources, note=self.note, stdin_copy=self.stdin_copy, exclude=self.directory
        )
        path = self.spool.directory / PLAN
        before = read_sealed(path, Plan)
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
        plan = Plan(settings=key, files=hashed)
        if before is None or before.content() != plan.content():
            if before:
                self.say("the settings or the sources changed since a stopped run: starting over")
            clear(self.spool.directory, keep_stdin=True)
            write_sealed(path, plan.model_dump_json(indent=1) + "\n")
        return hashed

    def _read(self, files: list[SourceFile]) -> None:
        ends = np.cumsum([file.size for file in files])
        total = int(ends[-1]) if len(ends) else 0

        def on_chunk(number: int, num_bytes: int) -> None:
            before = int(ends[number - 1]) if number else 0
            size = files[number].size if number < len(files) else 0
            self.report(PrepareProgress("read", before + min(num_bytes, size), total))  # packed text is longer

        ingest(files, self.spool, on_chunk=on_chunk, note=self.say)
        check_unchanged(files)

    def _split(self) -> Split:
        """The split, decided once: after a restart the chunks may hold the cut halves already."""
        path = self.spool.directory / _SPLIT
        before = read_sealed(path, RootModel[Split])
        if before is not None:
            split = before.root
        else:
            per_chunk = [self.spool.hashes(number) for number in range(self.spool.num_chunks())]
            hashes, num_bytes = (np.concatenate(columns) for columns in zip(*per_chunk, strict=True))
            can_cut = len(hashes) == 1 and self._can_cut()
            split = Split.choose(hashes, num_bytes, self.settings.validation_fraction, can_cut=can_cut)
            write_sealed(path, json.dumps(asdict(split)))
        if split.note:
            self.note(split.note)
        return split

    def _can_cut(self) -> bool:
        """Whether the only document is plain text."""
        for number in range(self.spool.num_chunks()):
            for document in self.spool.read_text(number).documents:
                return document.roles == "" and len(document.texts[0]) > 1
        return False

    def _tokenizer(self, split: Split) -> Tokenizer:
        """The given tokenizer, or one trained on an even sample of the training documents; kept for a restart."""
        path, wanted = self.spool.directory / TOKENIZER, self.settings.tokenizer
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
            tokenizer = train_tokenizer(self._sample(split), vocab_size=wanted.vocab_size)
        if wanted.file is None and tokenizer.vocab_size < wanted.vocab_size:
            self.note(f"the text gives only {tokenizer.vocab_size} of {wanted.vocab_size} tokens")
        if not is_kept:
            write_sealed(path, tokenizer.to_json())
        return tokenizer

    def _sample(self, split: Split) -> Iterator[str]:
        budget = self.settings.tokenizer.sample_bytes
        chunks = range(self.spool.num_chunks())
        share = budget / self._num_bytes()
        for number in chunks:
            documents = self._text(number, split)
            chosen = ~split.is_validation(documents.hashes) & in_sample(documents.hashes, share)
            for index in np.flatnonzero(chosen).tolist():
                budget -= int(documents.num_bytes[index])
                if budget < 0:
                    return
                yield from documents.documents[index].texts

    def _num_bytes(self) -> int:
        return sum(int(self.spool.hashes(number)[1].sum()) for number in range(self.spool.num_chunks()))

    def _text(self, number: int, split: Split) -> HashedDocuments:
        chunk = self.spool.read_text(number)
        if not split.cut or not chunk.documents:
            return chunk
        pairs = split.apply_cut(list(zip(chunk.documents, chunk.hashes.tolist(), strict=True)))
        sizes = [len(document.texts[0].encode()) for document, _ in pairs]
        hashes = np.array([hash for _, hash in pairs], dtype=np.uint64)
        return HashedDocuments([document for document, _ in pairs], hashes, np.array(sizes, dtype=np.int32))

    def _tokenise(self, tokenizer: Tokenizer, split: Split) -> None:
        numbers = range(self.spool.num_chunks())
        sizes = {number: int(self.spool.hashes(number)[1].sum()) for number in numbers}
        todo = [number for number in numbers if not self.spool.is_tokenised(number)]
        total, done = sum(sizes.values()), sum(sizes.values()) - sum(sizes[number] for number in todo)
        for number, chunk, num_bytes in encode_chunks(tokenizer, ((n, self._text(n, split)) for n in todo)):
            done += num_bytes
            if chunk is not None:
                self.spool.write_tokens(number, chunk)
            self.report(PrepareProgress("tokenise", done, total))

    def _write(
        self, key: dict, files: list[SourceFile], counts: RowCounts, tokenizer: Tokenizer, split: Split
    ) -> Manifest:
        remove_data_set(self.directory)
        splits, has_prompts = write_shards(
            self.spool,
            self.directory,
            split,
            num_shards=self.settings.num_shards,
            token_type=token_dtype(tokenizer),
            on_chunk=lambda done, total: self.report(PrepareProgress("shards", done, total)),
        )
        write_quarantine(self.directory / QUARANTINE, self.spool.infos())
        tokenizer.save(self.directory / TOKENIZER)
        manifest = Manifest(
            fingerprint=data_fingerprint(tokenizer.fingerprint, [s for info in splits.values() for s in info.shards]),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            document_policy="bos, tokens, eos; text is never read as special tokens",
            has_prompts=has_prompts,
            splits=splits,
            rows=counts.rows,
            duplicates=counts.duplicates,
            empty=counts.empty,
            quarantined=counts.bad,
            sources=tuple(_source(file, counts.found.get(str(index))) for index, file in enumerate(files)),
            settings=key,
            notes=tuple(self.notes),
        )
        write_text_aside(self.directory / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        check_shards(self.directory, manifest, [shard for info in splits.values() for shard in info.shards])
        self.report(PrepareProgress("done", 1, 1))
        return manifest


def _source(file: SourceFile, found: str | None) -> Source:
    return Source(
        name=file.name,
        path="" if file.argument == STDIN else file.path,
        argument=file.argument,
        format=found or file.format,
        size=file.size,
        modified=file.modified,
        sha256=file.sha256,
    )


def _keep_existing(settings: DataSettings, directory: Path, stdin_copy: Path | None) -> Manifest:
    """The manifest of the finished data set when it is whole and the one wanted; else ArtefactError."""
    manifest = verify(directory, settings=settings)
    if stdin_copy is not None and stdin_copy.stat().st_size:
        sha256 = hash_file(SourceFile("stdin", str(stdin_copy), STDIN, "text")).sha256
        if all(source.sha256 != sha256 for source in manifest.sources if source.argument == STDIN):
            raise ArtefactError(f"{directory}: prepared from other text on stdin; use --overwrite or another --output")
    return manifest
