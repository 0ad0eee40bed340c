"""Tokenizers made elsewhere: their text becomes no special tokens, they are not random, and wrong ones are refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from inl_core.corpus.encoding import document_stream
from inl_core.corpus.reading.rows import Document
from inl_core.corpus.shard_check import _problem
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError

SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS = sorted({*"<s>/abcdefl", "x", "\u0120", "\u2581"})
TEXT = "ab <s> x</s>x </s>"


def spelled(*words: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary with these words, and the merges that build each word from its first letter on."""
    vocab = {name: id for id, name in enumerate([*SPECIAL, *CHARACTERS])}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab or (word[: end - 1], word[end - 1]) not in merges:
                vocab.setdefault(word[:end], len(vocab))
                merges.append((word[: end - 1], word[end - 1]))
    return vocab, merges


def finished(model: Any, *, cut: Any = None, special: list[str | AddedToken] | None = None) -> Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = cut or pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    backend.add_special_tokens(special or list(SPECIAL))
    return Tokenizer(backend)


def byte_level(*words: str, special: list[str | AddedToken], **options: Any) -> Tokenizer:
    """A byte-level tokenizer with every byte and these words, of which those in `special` are special tokens."""
    vocab, merges = spelled(*words)
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(byte, len(vocab))
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = finished(models.BPE(vocab, merges, **options), cut=cut, special=special)
    tokenizer._backend.decoder = decoders.ByteLevel()  # pyright: ignore
    return Tokenizer(tokenizer._backend)


def forging_tokenizers() -> dict[str, Tokenizer]:
    """A tokenizer of each kind that would make special tokens of a text which spells them."""
    words = spelled("<s>", "</s>", "ab")
    pieces = [(name, 0.0 if name in SPECIAL else -1.0) for name in words[0]]
    vocab = words[0]
    return {
        "merges": finished(models.BPE(*words, unk_token="<unk>")),
        "suffix": finished(models.BPE(*words, unk_token="<unk>", end_of_word_suffix="</w>")),
        "whole words": finished(models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True)),
        "words": finished(models.WordLevel(vocab, unk_token="<unk>")),
        "pieces": finished(models.WordPiece(vocab, unk_token="<unk>")),
        "probable": finished(models.Unigram(pieces, 0, False), cut=pre_tokenizers.Metaspace()),
        "bytes": byte_level("<s>", "</s>", "ab", special=["<s>", "</s>"]),
    }


@pytest.mark.parametrize("kind", sorted(forging_tokenizers()))
def test_text_never_forges_the_end_of_a_document(kind: str) -> None:
    tokenizer = forging_tokenizers()[kind]
    raw = tokenizer._backend.encode(TEXT, add_special_tokens=False).ids
    ends = {tokenizer.bos_id, tokenizer.eos_id}
    assert ends & set(raw), "this tokenizer would have forged one"
    ids = tokenizer.encode(TEXT)
    assert not ends & set(ids)
    assert tokenizer.encode_documents([TEXT, "ab"]) == [ids, tokenizer.encode("ab")]
    stream = document_stream(tokenizer, [Document("", (TEXT,)), Document("", ("ab",))], document_mask=True)
    assert stream.starts_in(stream.read(np.array([0]), stream.num_tokens)).sum() == 2


def test_text_that_spells_a_special_token_keeps_its_bytes() -> None:
    tokenizer = forging_tokenizers()["bytes"]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.keeps_every_byte


def test_a_special_word_is_not_lost_from_text() -> None:
    word = AddedToken("fell", special=True, lstrip=True, rstrip=True, normalized=False)
    tokenizer = byte_level("fell", special=["<s>", "</s>", word])
    text = "he fell \n dead, fellable"
    assert tokenizer.token_id("fell") not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.keeps_every_byte


def test_a_chat_token_that_is_an_ordinary_one_is_not_spelled_by_text() -> None:
    backend = byte_level("ab", special=["<s>", "</s>"])._backend
    backend.add_tokens(["<|user|>", "<|end|>"])
    tokenizer = Tokenizer(backend)
    text = "ab<|user|>x<|end|>"
    assert not {tokenizer.role_id("user"), tokenizer.role_id("end")} & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("unknown", ["</s>", None])
def test_a_special_token_without_another_spelling_is_refused_by_name(unknown: str | None) -> None:
    vocab = {name: id for id, name in enumerate(["<s>", "</s>", "ab"])}
    options = {"unk_token": unknown} if unknown else {}
    tokenizer = finished(models.WordLevel(vocab, **options), special=["<s>", "</s>"])
    assert tokenizer.encode("ab") == [2]
    with pytest.raises(ArtefactError, match="only its special token <s>"):
        tokenizer.encode("ab <s>")
    if unknown:
        with pytest.raises(ArtefactError, match="only its special token </s> for text that it cannot spell"):
            tokenizer.encode_documents(["ab", "strange"])


def test_ordinary_tokenizers_are_not_looked_through(tokenizer: Tokenizer) -> None:
    assert tokenizer._special_text.instead == {}


def test_dropout_of_merges_is_switched_off() -> None:
    tokenizer = byte_level("abcdef", special=["<s>", "</s>"], dropout=0.5)
    assert {tuple(tokenizer.encode("abcdef" * 4)) for _ in range(20)} == {(tokenizer.token_id("abcdef"),) * 4}
    assert tokenizer.fingerprint == byte_level("abcdef", special=["<s>", "</s>"]).fingerprint


def test_two_tokens_with_one_id_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = json.loads(tokenizer.to_json())
    content["model"]["vocab"]["zzz"] = tokenizer.token_id("a")
    path.write_text(json.dumps(content))
    with pytest.raises(
        ArtefactError, match=f"tokenizer.json: 'a' and 'zzz' have the same id {tokenizer.token_id('a')};"
    ):
        Tokenizer.load(path)


@pytest.mark.parametrize("name", ["<0xZZ>", "<0x+1>", "<0x 1>", "<0x\u0661\u0661>"])
def test_what_only_looks_like_a_byte_is_text(name: str) -> None:
    vocab = {token: id for id, token in enumerate([*SPECIAL, "<0x0A>", name])}
    tokenizer = finished(models.BPE(vocab, [], unk_token="<unk>"))
    assert tokenizer.token_bytes[3:] == [b"\n", name.encode()]


@pytest.mark.parametrize("ends", [(0, 1), (0, 0)])
def test_a_boundary_inside_a_row_is_found(tmp_path: Path, ends: tuple[int, int]) -> None:
    bos, eos = ends

    def problem(*inside: int) -> str | None:
        columns = {
            "tokens": pa.array([[bos, *inside, eos], [bos, eos]], pa.large_list(pa.uint16())),
            "prompt_length": pa.array([0, 0], pa.int32()),
            "num_bytes": pa.array([1, 1], pa.int32()),
        }
        path = tmp_path / "a.arrow"
        table = pa.table(columns)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        shard = SimpleNamespace(documents=2, tokens=len(inside) + 4, bytes=2)
        manifest = SimpleNamespace(vocab_size=10, bos_id=bos, eos_id=eos, has_prompts=False)
        return _problem(path, shard, manifest)  # pyright: ignore

    assert problem(2, 3) is None
    for forged in ends:
        assert problem(2, forged, 3) == "a document has the token for an end of documents inside it"
