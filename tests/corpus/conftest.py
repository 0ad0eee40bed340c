"""Small corpora: a few dozen documents of many lengths, prepared once."""

import json
import random
from pathlib import Path

import pytest

from inl_core.corpus.preparation import prepare
from inl_core.corpus.tokenizer import Tokenizer, train_tokenizer
from tests.corpus.texts import random_text, settings


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    generator = random.Random(0)
    return train_tokenizer((random_text(generator, 50) for _ in range(40)), vocab_size=300)


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    generator = random.Random(1)
    for number in range(60):
        text = f"{number} " + random_text(generator, generator.choice([1, 3, 10, 60, 200]))
        (root / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def text_data(text_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "text"
    prepare(settings(text_directory, num_shards=3, validation_fraction=0.2), directory)
    return directory


@pytest.fixture(scope="session")
def prompt_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    generator = random.Random(2)
    rows = []
    for number in range(40):
        rows.append({"prompt": f"{number} " + random_text(generator, 5), "completion": random_text(generator, 8)})
        turns = [("system", 2), ("user", 5), ("assistant", 7), ("user", 1), ("assistant", 9)]
        messages = [{"role": role, "content": f"{number} " + random_text(generator, size)} for role, size in turns]
        rows.append({"messages": messages})
    for kind in ("prompt", "messages"):
        lines = [json.dumps(row) for row in rows if kind in row]
        (root / f"{kind}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "plain.txt").write_text(random_text(generator, 300), encoding="utf-8")
    directory = root / "prepared"
    prepare(settings(root, num_shards=2, validation_fraction=0.1), directory)
    return directory
