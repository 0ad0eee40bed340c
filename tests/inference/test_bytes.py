"""Bits per byte are over the bytes of the source text, or none are claimed."""

import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from inl_core.corpus.dataset import TokenDataset, TokenStream
from inl_core.corpus.encoding import document_stream
from inl_core.corpus.loader import evaluation_batches
from inl_core.corpus.preparation import prepare
from inl_core.corpus.reading.rows import Document
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.inference.evaluate import Evaluation, byte_counts, evaluate
from inl_core.inference.texts import Text, plain_text
from inl_core.recipe import DataSettings, TokenizerSettings
from tests.inference.foreign import DIRECTORY, KINDS, WORDS, foreign_model, foreign_tokenizer
from tests.inference.tiny import tokenizer

ASCII = WORDS * 4


def score(text: Text, max_tokens: int | None = None) -> Evaluation:
    counts = text.byte_counts(max_tokens)
    batches = text.windows(window=32, batch_size=8, max_tokens=max_tokens)
    return evaluate(text.loaded.model, batches, counts.token_num_bytes, num_bytes=counts.num_bytes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_text_counts_its_own_bytes_and_a_part_none(kind: str) -> None:
    text = plain_text(foreign_model(kind), "text", ASCII)
    whole, part = score(text), score(text, max_tokens=20)
    assert whole.bytes == len(ASCII)
    assert whole.bytes
    assert whole.bits_per_byte is not None
    text_nats = whole.loss * whole.tokens  # the closing eos is the only target without text
    assert 0 < whole.bits_per_byte <= text_nats / math.log(2) / whole.bytes
    assert (part.bytes, part.bits_per_byte) == (None, None)
    assert part.loss > 0
    assert score(text, max_tokens=text.num_targets).bytes == whole.bytes


@pytest.mark.parametrize("kind", ["wordpiece", "meta"])
def test_text_with_unknown_tokens_claims_no_bytes(kind: str) -> None:
    found = score(plain_text(foreign_model(kind), "text", ASCII + "\u6771\u4eac" * 30))
    assert (found.bytes, found.bits_per_byte) == (None, None)


def byte_level(unknown: str | None = None, **changes: object) -> tokenizers.Tokenizer:
    """A byte-level tokenizer that keeps every byte, but for the changes."""
    vocab = {token: id for id, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


def with_added(token: AddedToken) -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.add_tokens([token])
    return backend


def without_byte(byte: str) -> tokenizers.Tokenizer:
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {byte})
    return byte_level(model=models.BPE({token: id for id, token in enumerate(["<s>", "</s>", *alphabet])}, []))


def before_bytes(cut: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([cut, to_bytes])  # pyright: ignore


def split_first(behavior: str) -> pre_tokenizers.PreTokenizer:
    return before_bytes(pre_tokenizers.Split(tokenizers.Regex("zebra"), behavior))


KEEPING = {
    "byte level": byte_level(),
    "an added word": with_added(AddedToken("zebra", normalized=False)),
    "a split that keeps": byte_level(pre_tokenizer=split_first("isolated")),
    "digits apart": byte_level(pre_tokenizer=before_bytes(pre_tokenizers.Digits(individual_digits=True))),
    "signs apart": byte_level(pre_tokenizer=before_bytes(pre_tokenizers.Punctuation())),
    "an unknown token that is never needed": byte_level(unknown="<s>"),
}
LOSING = {
    "lower case": byte_level(normalizer=normalizers.Lowercase()),
    "NFC": byte_level(normalizer=normalizers.NFC()),
    "a rule for one word": byte_level(normalizer=normalizers.Replace("zebra", "horse")),
    "stripped ends": byte_level(normalizer=normalizers.Strip()),
    "a sequence": byte_level(normalizer=normalizers.Sequence([normalizers.Replace("z", "zz")])),
    "a prefix space": byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "a split that removes": byte_level(pre_tokenizer=split_first("removed")),
    "scripts apart": byte_level(pre_tokenizer=before_bytes(pre_tokenizers.UnicodeScripts())),
    "a delimiter": byte_level(pre_tokenizer=before_bytes(pre_tokenizers.CharDelimiterSplit("\u4e2d"))),
    "a delimiter within": byte_level(
        pre_tokenizer=before_bytes(before_bytes(pre_tokenizers.CharDelimiterSplit("\u4e2d")))
    ),
    "signs that are removed": byte_level(pre_tokenizer=before_bytes(pre_tokenizers.Punctuation("removed"))),
    "words at spaces": byte_level(pre_tokenizer=before_bytes(pre_tokenizers.WhitespaceSplit())),
    "spaces before a word": with_added(AddedToken("zebra", lstrip=True, normalized=False)),
    "spaces after a word": with_added(AddedToken("zebra", rstrip=True, normalized=False)),
    "a missing byte": without_byte("\u00ed"),
    "an added letter that is also a byte's name": with_added(AddedToken("\u00e9", normalized=False)),
}


@pytest.mark.parametrize("name", [*KEEPING, *LOSING])
def test_whether_a_tokenizer_keeps_every_byte(name: str) -> None:
    found = Tokenizer((KEEPING | LOSING)[name])
    assert found.keeps_every_byte == (name in KEEPING)
    sizes = found.token_num_bytes[found.encode("a zebra \u00e9")]
    assert np.isfinite(sizes).all() == (name in KEEPING)


def with_marked_spaces() -> Tokenizer:
    """Keeps every byte, but that U+2581 stands for a space, as in Llama's family; other characters go by bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    vocab = {name: id for id, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")  # pyright: ignore
    return Tokenizer(backend)


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_tokens_bytes_are_believed_only_where_they_add_up(is_whole: bool) -> None:
    found = with_marked_spaces()
    assert found.keeps_every_byte
    assert not found.has_exact_bytes
    for text, is_believed in ((ASCII, True), (ASCII + "\u2581", False)):
        stream = document_stream(found, [Document("", (text,))], document_mask=False)
        counts = byte_counts(found, stream, len(text.encode()), is_whole=is_whole)
        assert counts.num_bytes == (len(text.encode()) if is_whole else None)
        assert np.isfinite(counts.token_num_bytes[found.encode("a b")]).all() == is_believed


@pytest.mark.parametrize(("kind", "is_whole"), [("ours", True), ("ours", False), ("meta", False), ("wordpiece", False)])
def test_no_token_is_read_where_the_bytes_are_known_or_cannot_be(kind: str, is_whole: bool) -> None:
    found = tokenizer() if kind == "ours" else foreign_tokenizer(kind)
    stream = TokenStream.__new__(TokenStream)  # without tokens: reading them would be an error
    stream.prompt_lengths = None
    counts = byte_counts(found, stream, 1000, is_whole=is_whole)
    assert counts.num_bytes == (1000 if is_whole else None)
    assert counts.token_num_bytes is found.token_num_bytes


@pytest.fixture(scope="module")
def spaced_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    for number in range(20):
        (root / f"{number:02}.txt").write_text(f"{'a ' * number}{WORDS}")
    chosen = TokenizerSettings(file=DIRECTORY / "meta.json")
    prepare(DataSettings(sources=(str(root),), tokenizer=chosen, validation_fraction=0.3), root / "data")
    return root / "data"


def test_a_split_counts_its_documents_bytes(spaced_data: Path) -> None:
    loaded = foreign_model("meta")
    dataset = TokenDataset.open(spaced_data, "validation")
    counts = byte_counts(loaded.tokenizer, dataset, dataset.num_bytes)
    batches = evaluation_batches(dataset, sequence_length=32, batch_size=8)
    found = evaluate(loaded.model, batches, counts.token_num_bytes, num_bytes=counts.num_bytes)
    assert found.bytes == dataset.num_bytes
    assert found.bits_per_byte is not None
    assert not foreign_tokenizer("meta").keeps_every_byte
