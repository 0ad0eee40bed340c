"""The damaged files: which file, which damage, and which commands then read it."""

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.faults.conftest import SEED
from tests.faults.inject import Fault
from tests.faults.mutations import BYTES, JSON, LINES, RECORD, SHARD, TENSORS, YAML, Mutation, swapped_with
from tests.faults.subject import DATA, RUN, Stage

CHECKPOINT = f"{RUN}/checkpoints/step-00000030"
EVALUATE = ("eval", CHECKPOINT, "--json")
GENERATE = ("generate", CHECKPOINT, "--prompt", "The run", "--max-new-tokens", "6", "--json")
PARAMETERS = ("inspect-params", CHECKPOINT, "--max-tokens", "512", "--json")
INSPECT = ("inspect", CHECKPOINT, "--json")
TRAIN_ON = ("train", "recipe.yaml", "--run-dir", "other", "--set", "training.steps=2", "--json")
PREPARE = ("--output", "out", "--vocab-size", "300", "--json")

Command = tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """One damaged file."""

    state: str
    file: str
    kind: str
    mutation: Mutation | None
    commands: tuple[Command, ...]
    must_refuse: bool = False
    """Whether each command must exit with 4; otherwise it may also succeed with the results of the undamaged file."""
    resumes: bool = False
    """Whether `inl resume` is tried as well, and must come to the undisturbed end."""
    faults: tuple[Fault, ...] = field(default=())
    """For a file that cannot be read."""

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}"

    def damage(self, stage: Stage) -> None:
        """Do it; the dice depend on the seed and the case alone."""
        if self.mutation:
            self.mutation(stage.path / self.file, random.Random(f"{SEED} {self}"))


def _each(state: str, file: str, mutations: dict[str, Mutation], **rest: Any) -> Iterator[Case]:
    for kind, mutation in mutations.items():
        yield Case(state, file, kind, mutation, **rest)
    for kind, number in {"no right to read": errno.EACCES, "a bad sector": errno.EIO}.items():
        faults = (Fault(f"^read {file}$", 0, errno=number),)
        yield Case(state, file, kind, None, faults=faults, **rest)


def checkpoint_cases() -> Iterator[Case]:
    """Files of the newest checkpoint of a run that stopped: it is refused, and `resume` takes the one before.

    What only a resume reads may be damaged when a model is used; the results are then those of the undamaged file.
    """
    files = {
        "model.safetensors": TENSORS | {"swapped": swapped_with("training_state/optimizer.safetensors")},
        "training_state/optimizer.safetensors": TENSORS | {"swapped": swapped_with("../model.safetensors")},
        "config.json": RECORD | {"swapped": swapped_with("tokenizer.json")},
        "tokenizer.json": RECORD | {"swapped": swapped_with("config.json")},
        "training_state/progress.json": RECORD,
        "recipe.yaml": BYTES,
    }
    readers = [EVALUATE, GENERATE, PARAMETERS, INSPECT]
    for name, mutations in files.items():
        for number, case in enumerate(_each("halfway", f"{CHECKPOINT}/{name}", mutations, commands=(), resumes=True)):
            yield Case(
                **{
                    **vars(case),
                    "commands": (readers[number % len(readers)],),
                    "must_refuse": "/" not in name and name != "recipe.yaml",
                }
            )


def manifest_cases() -> Iterator[Case]:
    """Manifests, which no checksum covers: what a command does with one is refused, or right."""
    file = f"{CHECKPOINT}/manifest.json"
    yield from _each("halfway", file, RECORD, commands=(EVALUATE, INSPECT), resumes=True)
    reading = (("eval", RUN, "--json"), TRAIN_ON, ("inspect", DATA, "--json"))
    yield from _each("finished", f"{DATA}/manifest.json", RECORD, commands=reading)


def data_cases() -> Iterator[Case]:
    """Shards and the tokenizer of a data set: nothing is read from it any more."""
    for split, number, other in (
        ("train", "00001-of-00002", "train-00000-of-00002"),
        ("validation", "00000-of-00001", ""),
    ):
        mutations = SHARD | {"swapped": swapped_with(f"{other or 'train-00000-of-00002'}.arrow")}
        reading = (("eval", RUN, "--split", split, "--json"), TRAIN_ON, ("inspect", DATA, "--json"))
        file = f"{DATA}/{split}-{number}.arrow"
        yield from _each("finished", file, mutations, commands=reading, must_refuse=True)
    file = f"{DATA}/tokenizer.json"
    yield from _each("finished", file, JSON, commands=(TRAIN_ON, ("inspect", DATA, "--json")))


def run_cases() -> Iterator[Case]:
    """What a run writes beside its checkpoints: a resume ends as if nothing had been, or is refused."""
    looking = (("inspect", RUN, "--json"),)
    yield from _each("halfway", f"{RUN}/metrics.jsonl", LINES, commands=looking, resumes=True)
    yield from _each("halfway", f"{RUN}/dynamics/step-00000020.parquet", BYTES, commands=looking, resumes=True)
    yield from _each("halfway", f"{RUN}/environment.json", JSON, commands=looking, resumes=True)
    yield from _each("halfway", f"{RUN}/recipe.yaml", YAML, commands=looking, resumes=True)


def input_cases() -> Iterator[Case]:
    """What users bring: recipes, text, rows, prompts."""
    yield from _each(
        "start", "recipe.yaml", YAML, commands=(("plan", "recipe.yaml", "--json"), ("inspect", "recipe.yaml"))
    )
    for file in ("rows.jsonl", "rows.parquet", "text.txt.gz", "text.txt.zst", "text.md"):
        mutations = dict(LINES if file.endswith("jsonl") else BYTES)
        del mutations["sparse terabyte"]  # a text of that size is allowed, and takes its time
        yield from _each("inputs", file, mutations, commands=(("prepare-data", file, *PREPARE),))
    given = ("prepare-data", "text.md", "--tokenizer", "tokenizer.json", "--output", "out", "--json")
    yield from _each("inputs", "tokenizer.json", JSON, commands=(given,))
    reading = ("generate", RUN, "--prompt-file", "prompts.jsonl", "--max-new-tokens", "4", "--json")
    yield from _each("inputs", "prompts.jsonl", LINES, commands=(reading,))
    scoring = ("eval", RUN, "--text", "text.txt.zst", "--json")
    yield from _each("inputs", "text.txt.zst", BYTES, commands=(scoring,))


CASES = [case for make in (checkpoint_cases, manifest_cases, data_cases, run_cases, input_cases) for case in make()]
