"""A corpus for the tests of parts, and a tokenizer."""

import gzip
import json
import random
from pathlib import Path

import pytest

from inl_core.corpus.tokenizer import Tokenizer
from tests.corpus.parts.making import make_small
from tests.corpus.texts import random_text


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of several formats with copies of each other's documents, empty documents and bad rows."""
    root, generator = tmp_path_factory.mktemp("source"), random.Random(7)
    texts = [f"{number} {random_text(generator, generator.choice([5, 20, 90]))}" for number in range(60)]
    for number in range(6):
        own = texts[number * 8 : number * 8 + 12]
        rows, packed = [json.dumps({"text": text}) for text in [*own, " ", own[0].upper(), own[3]]], number % 2 == 0
        data = "\n".join([*rows, "{bad"]).encode()
        name = f"{number}.jsonl.gz" if packed else f"{number}.jsonl"
        (root / name).write_bytes(gzip.compress(data) if packed else data)
    (root / "chat.jsonl").write_text(json.dumps({"prompt": texts[57], "completion": texts[58]}))
    (root / "0.txt").write_text(texts[5].upper())
    (root / "z.txt").write_text(texts[59])
    return root


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "given.json"
    tokenizer.save(path)
    return path
