"""Duplicates are found with 8 bytes for each document, and no document is in both splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inl_core.corpus.preparation.text_chunks import SeenHashes, document_hash
from inl_core.corpus.preparation.validation_split import Split, in_sample, shard_of
from inl_core.corpus.reading.rows import Document


@given(blocks=st.lists(st.lists(st.integers(0, 40)), max_size=8))
def test_seen_hashes_is_a_set(blocks: list[list[int]]) -> None:
    seen, reference = SeenHashes(), set()
    for block in blocks:
        expected = []
        for value in block:
            expected.append(value not in reference)
            reference.add(value)
        assert seen.add(np.array(block, dtype=np.uint64)).tolist() == expected
    assert len(seen) == len(reference)


def test_seen_hashes_stays_compact() -> None:
    generator, seen = np.random.default_rng(0), SeenHashes()
    for _ in range(200):
        seen.add(generator.integers(0, 2**64, 1000, dtype=np.uint64))
    assert len(seen) == 200_000
    assert len(seen._runs) < 20


@pytest.mark.parametrize("variant", ["Some  text\n", "some text", "SOME\ttext ", "\uff33ome text", "\u017fome text"])
def test_copies_in_other_spelling_share_a_hash(variant: str) -> None:
    assert document_hash(Document("", (variant,))) == document_hash(Document("", ("some text",)))


def test_other_text_or_roles_have_another_hash() -> None:
    parts = [Document("", ("ab", "c"), "pc"), Document("", ("a", "bc"), "pc"), Document("", ("ab", "c"), "ua")]
    assert len({document_hash(part) for part in [*parts, Document("", ("abc",)), Document("", ("ab c",))]}) == 5


def test_split_shard_and_sample_are_even_and_independent() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**64, 100_000, dtype=np.uint64)
    split = Split.choose(hashes, np.ones(len(hashes)), 0.1, can_cut=False)
    held_out = split.is_validation(hashes)
    assert held_out.mean() == pytest.approx(0.1, abs=0.005)
    shards = shard_of(hashes, 8)
    sample = in_sample(hashes, 0.3)
    for shard in range(8):
        assert (shards[~held_out] == shard).mean() == pytest.approx(1 / 8, abs=0.005)
        assert sample[shards == shard].mean() == pytest.approx(0.3, abs=0.02)
    assert sample[held_out].mean() == pytest.approx(0.3, abs=0.02)
    assert in_sample(hashes, 1.0).all()


@pytest.mark.parametrize("count", [2, 3, 19])
def test_a_tiny_corpus_holds_out_the_document_of_fitting_size(count: int) -> None:
    hashes = np.random.default_rng(count).integers(0, 2**64, count, dtype=np.uint64)
    sizes = np.full(count, 1000)
    sizes[1] = 60
    split = Split.choose(hashes, sizes, 0.05 if count < 10 else 0.003, can_cut=False)
    assert np.flatnonzero(split.is_validation(hashes)).tolist() == [1]
    assert split.note
