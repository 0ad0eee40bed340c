"""The tokenizer loses no text, makes no special tokens of it, and streams whole characters."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from inl_core.corpus.tokenizer import (
    _LONGEST_WORD,
    _MOST_PIECES,
    SPECIAL_TOKENS,
    StreamDecoder,
    Tokenizer,
    _without_long_words,
    train_tokenizer,
)
from inl_core.errors import ArtefactError, RecipeError

utf8_text = st.text(st.characters(exclude_categories=["Cs"]))
with_markers = st.lists(utf8_text | st.sampled_from([*SPECIAL_TOKENS, " ", "\n", "\r\n", "\u0000"])).map("".join)


@pytest.fixture(scope="module")
def gpt2_like() -> Tokenizer:
    """As GPT-2: one token stands for both ends of a document."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore
    backend.train_from_iterator(["the cat and the other cat"], trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """As Llama 2: a normaliser, tokens for single bytes, and a spelling that depends on the neighbours."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {token: len(vocab) + i for i, token in enumerate(["\u2581", "a", "b", "\u2581a", "ab"])}
    model = tokenizers.models.BPE(vocab, [("\u2581", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")  # pyright: ignore
    backend.decoder = tokenizers.decoders.Sequence(  # pyright: ignore
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend)


@given(text=with_markers)
def test_decoding_returns_the_text_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_num_bytes[ids].sum() == len(text.encode())
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.encode_documents([text, "x", text]) == [ids, tokenizer.encode("x"), ids]


@given(data=st.data())
@settings(max_examples=200)
def test_streaming_shows_what_decoding_shows_and_no_half_character(
    tokenizer: Tokenizer, gpt2_like: Tokenizer, sentencepiece_like: Tokenizer, data: st.DataObject
) -> None:
    chosen = data.draw(st.sampled_from([tokenizer, gpt2_like, sentencepiece_like]))
    ids = chosen.encode(data.draw(utf8_text.filter(lambda text: "\ufffd" not in text)) * 3)
    decoder = StreamDecoder(chosen)
    pieces = [decoder.push(id) for id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == chosen.decode(ids)
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(0, 299)))
@settings(max_examples=300)
def test_streaming_any_ids_equals_decoding_them(tokenizer: Tokenizer, ids: list[int]) -> None:
    ids = [id % tokenizer.vocab_size for id in ids]
    decoder = StreamDecoder(tokenizer)
    assert "".join([decoder.push(id) for id in ids]) + decoder.flush() == tokenizer.decode(ids)


def test_token_bytes_of_foreign_tokenizers(gpt2_like: Tokenizer, sentencepiece_like: Tokenizer) -> None:
    text = "a ab 東 b"
    for foreign in (gpt2_like, sentencepiece_like):
        assert b"".join(foreign.token_bytes[id] for id in foreign.encode(text)) == text.encode()
    assert gpt2_like.bos_id == gpt2_like.eos_id
    assert sentencepiece_like.token_num_bytes[[1, 2]].tolist() == [0, 0]


def test_saving_keeps_the_fingerprint_and_the_policy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, tokenizer.vocab_size)
    assert loaded.bos_id not in loaded.encode("<|bos|>")
    assert list(loaded.special_ids) == list(SPECIAL_TOKENS)
    np.testing.assert_array_equal(loaded.token_num_bytes, tokenizer.token_num_bytes)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic_and_differs_with_the_text() -> None:
    texts = ["the cat sat on the mat, the cat"] * 3
    first, second = (train_tokenizer(iter(texts), vocab_size=270) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != train_tokenizer(iter(["a dog, a dog, a dog"]), vocab_size=270).fingerprint


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(RecipeError, match="need 262"):
        train_tokenizer(iter(["text"]), vocab_size=261)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "none"}}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtefactError, match=str(path)):
        Tokenizer.load(path)


def test_a_tokenizer_without_ends_or_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ArtefactError, match="missing"):
        Tokenizer.load(path)
    tokenizer.save(path)
    content = json.loads(path.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if not k.startswith("<|")}
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="no beginning-of-text token"):
        Tokenizer.load(path)


LONG_WORDS = {
    "dna": lambda generator: "".join(generator.choice("ACGT") for _ in range(100_000)),
    "letters": lambda _: "a" * 100_000,
    "spaces": lambda _: " \n\t" * 30_000,
    "dashes": lambda _: "-=" * 50_000,
    "digits": lambda generator: str(generator.getrandbits(10_000))[:3000] * 30,
    "separators": lambda _: "-\x1c\x1d" * 30_000,
    "no spaces": lambda generator: "".join(chr(generator.randrange(0x4E00, 0x4F00)) for _ in range(50_000)),
}


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_a_tokenizer_trains_on_one_long_word(kind: str) -> None:
    text = LONG_WORDS[kind](random.Random(0))
    cut = list(_without_long_words(iter([text])))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 2 * _LONGEST_WORD  # training takes the square of a word's length in time
    tokenizer = train_tokenizer(iter([text]), vocab_size=400)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_of_endless_words_a_bounded_part_is_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 10 MB without a space comes as ten documents, since documents end after a million characters."""
    words = ["".join(random.Random(number).choices("abcdefgh", k=1 << 20)) for number in range(10)]
    given: list[str] = []

    def spy(texts: Iterator[str]) -> Iterator[str]:
        given.extend(_without_long_words(texts))
        return iter(["ordinary words"])

    monkeypatch.setattr("inl_core.corpus.tokenizer._without_long_words", spy)
    train_tokenizer(iter([*(f"before {word} after" for word in words), "and more"]), vocab_size=270)
    assert max(map(len, given)) <= 2 * _LONGEST_WORD
    assert sum(map(len, given)) <= (_MOST_PIECES + 2 * len(words) + 1) * _LONGEST_WORD
    assert "".join(given).startswith("before " + words[0][: _LONGEST_WORD * 1000])
    assert [text.endswith(" after") for text in given].count(True) == len(words)
    assert given[-1] == "and more"


def test_ordinary_text_trains_the_same_tokenizer_cut_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{number} and_more" for number in range(2000))
    cut = train_tokenizer(iter([text]), vocab_size=400)
    monkeypatch.setattr("inl_core.corpus.tokenizer._LONGEST_WORD", 1 << 30)
    assert train_tokenizer(iter([text]), vocab_size=400).fingerprint == cut.fingerprint
