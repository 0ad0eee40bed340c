"""The tiny run that everything is tried on: its files, and what of them must come back whatever happened."""

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from inl_core.corpus.shard_check import VERIFIED
from inl_core.inference.checkpoint_files import MANIFEST, list_checkpoints, verify_checkpoint
from tests.faults.commands import PROJECT, Outcome, Server, check_manners
from tests.faults.inject import Fault

STEPS = 40
RECIPE = f"""\
name: subject
model: {{preset: v4, d_model: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, max_seq_len: 64}}
data:
  sources: [text.jsonl]
  directory: data
  tokenizer: {{vocab_size: 300}}
  validation_fraction: 0.2
  num_shards: 2
training:
  steps: {STEPS}
  sequence_length: 32
  batch_tokens: 128
  evaluation: {{every: 10, tokens: 256, final_tokens: 512}}
  checkpoint: {{every: 6, keep_last: 2, keep_every: 18}}
  logging: {{every: 1, dynamics_every: 10}}
"""
RUN, DATA = "run", "data"
CLOCKS = {"time", "tokens_per_second", "memory_bytes", "validation_seconds"}
"""What differs between two runs of the same recipe."""


@dataclass(frozen=True)
class Whole:
    """The undisturbed run: its results, and the events of its making, in order."""

    tensors: dict[str, bytes]
    rows: list[dict[str, Any]]
    data: dict[str, bytes]
    names: set[str]
    events: list[str]


class Stage:
    """One directory, always the same, that is brought to a known state before each case."""

    def __init__(self, base: Path) -> None:
        self.path, self._kept = base / "stage", base / "kept"
        scratch = base / "scratch"
        for directory in (self.path, self._kept, scratch):
            directory.mkdir()
        self.server = Server(self.path, scratch)
        self.log = base / "events"

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.path / RUN

    @property
    def data(self) -> Path:
        """The data set's."""
        return self.path / DATA

    def set(self, name: str) -> None:
        """Bring the directory to a state kept before; times of files are kept as well."""
        clear(self.path)
        shutil.copytree(self._kept / name, self.path, symlinks=True, dirs_exist_ok=True)

    def keep(self, name: str) -> None:
        """Remember the directory as it is."""
        shutil.copytree(self.path, self._kept / name, symlinks=True)

    def train(self, **options: Any) -> Outcome:
        """`inl train` into the run's directory."""
        return self.server.run("train", "recipe.yaml", "--run-dir", RUN, "--json", **options)

    def resume(self, *arguments: str, **options: Any) -> Outcome:
        """`inl resume` of the run."""
        return self.server.run("resume", RUN, "--json", *arguments, **options)

    def go_on(self, **options: Any) -> Outcome:
        """The one line of a job script, which starts the run or goes on with it."""
        return self.server.run("train", "recipe.yaml", "--run-dir", RUN, "--resume-or-start", "--json", **options)


def clear(directory: Path) -> None:
    """Empty a directory, whatever kind of thing is in it."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def open_stage(base: Path) -> Iterator[tuple[Stage, Whole]]:
    """A stage and the undisturbed run; its states are start, prepared, finished, halfway (killed) and inputs (text)."""
    stage = Stage(base)
    try:
        (stage.path / "recipe.yaml").write_text(RECIPE)
        paragraphs = (PROJECT / "docs" / "commands.md").read_text(encoding="utf-8")[:14_000].split("\n\n")
        (stage.path / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in paragraphs))
        stage.keep("start")
        check_manners(
            stage.train(log=stage.log, timeout=120), codes=[0]
        )  # it may have to compile the operations in C++
        stage.keep("finished")
        whole = Whole(
            tensors(stage.run),
            rows(stage.run),
            data_files(stage.data),
            names(stage.path),
            [line for line in stage.log.read_text().splitlines() if not line.startswith("read ")],
        )
        shutil.rmtree(stage.run)
        stage.keep("prepared")
        assert stage.train(faults=[Fault("^step$", 34, signal=9)]).code == -9
        stage.keep("halfway")
        stage.set("finished")
        write_inputs(stage.path)
        stage.keep("inputs")
        yield stage, whole
    finally:
        stage.server.close()


def write_inputs(directory: Path) -> None:
    """Text in the formats that are read, a tokenizer, and prompts."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    parts = [json.loads(line)["text"] for line in (directory / "text.jsonl").read_text().splitlines()][:30]
    whole = "\n\n".join(parts).encode()
    chats = [
        {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": part}]} for part in parts
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    pq.write_table(pa.table({"text": parts, "number": list(range(len(parts)))}), directory / "rows.parquet")
    (directory / "text.txt.gz").write_bytes(gzip.compress(whole, mtime=0))
    (directory / "text.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(whole))
    (directory / "text.md").write_bytes(whole)
    shutil.copy(directory / DATA / "tokenizer.json", directory / "tokenizer.json")
    (directory / "prompts.txt").write_text("The run\nA checkpoint\n")
    (directory / "prompts.jsonl").write_text('"The run"\n{"prompt": "A checkpoint"}\n')


def tensors(run: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint, weights and optimizer."""
    last = list_checkpoints(run / "checkpoints")[-1]
    assert last.name == f"step-{STEPS:08d}", last
    files = {str(path.relative_to(last)): load_file(path) for path in last.rglob("*.safetensors")}
    return {f"{file}/{name}": value.tobytes() for file, found in files.items() for name, value in found.items()}


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, every line of it, without what a clock decides."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def data_files(directory: Path) -> dict[str, bytes]:
    """The data set's files but for those that hold times: the manifest, and what was verified when."""
    files = {path.name: path for path in directory.iterdir() if path.name not in ("manifest.json", VERIFIED)}
    return {name: path.read_bytes() for name, path in files.items()}


def names(directory: Path) -> set[str]:
    """Every file's name but for the checkpoints', of which a stopped run may keep others, and what was verified."""
    files = {os.path.relpath(path, directory) for path in directory.rglob("*") if not path.is_dir()}
    files.discard(f"{DATA}/{VERIFIED}")
    return {name for name in files if not name.startswith(f"{RUN}/checkpoints/step-") or ".tmp" in name}


def check_is_whole(stage: Stage, whole: Whole) -> None:
    """The run in the stage's directory is the undisturbed one: weights, optimizer, metrics, data, and no leftovers."""
    found = tensors(stage.run)
    assert found.keys() == whole.tensors.keys()
    assert [name for name in found if found[name] != whole.tensors[name]] == []
    assert rows(stage.run) == whole.rows
    assert data_files(stage.data) == whole.data
    assert names(stage.path) == whole.names, f"missing or left over: {names(stage.path) ^ whole.names}"
    for path in list_checkpoints(stage.run / "checkpoints"):
        verify_checkpoint(path)


def check_checkpoints(stage: Stage) -> None:
    """Every directory with a checkpoint's name and a manifest is intact; without a manifest it is none."""
    for path in list_checkpoints(stage.run / "checkpoints"):
        if (path / MANIFEST).exists():
            verify_checkpoint(path)
