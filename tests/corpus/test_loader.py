"""Batches equal those that a slow reference makes from a list of all documents, and depend on nothing but the step."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from inl_core.corpus import dataset as dataset_module
from inl_core.corpus import loader
from inl_core.corpus.dataset import TokenDataset, TokenStream
from inl_core.corpus.encoding import document_stream
from inl_core.corpus.loader import IGNORED, Batch, BatchLoader, evaluation_batches, make_batch
from inl_core.corpus.manifest import load_manifest
from inl_core.corpus.reading.rows import Document
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.recipe.data import LossOn


def all_documents(directory: Path, split: str) -> list[tuple[list[int], int]]:
    """(tokens, prompt_length) of every document, read by Arrow, in the order of the shards."""
    found = []
    for shard in load_manifest(directory).splits[split].shards:
        for row in pa.ipc.open_file(directory / shard.file).read_all().to_pylist():
            found.append((row["tokens"], row["prompt_length"]))
    return found


def learned(tokens: list[int], prompt: int, loss_on: str, roles: Mapping[str, int]) -> list[bool]:
    """Which tokens of a document are learned, found by reading it from its begin."""
    found, speaker = [], ""
    names = {id: name for name, id in roles.items()}
    for place, token in enumerate(tokens):
        if names.get(token, "end") != "end":
            speaker = names[token]
            is_answer = False  # the token that names the speaker belongs to the prompt
        else:
            is_answer = speaker == "assistant"
        if token == roles["end"]:
            speaker = ""
        found.append(place > 0 and (place >= prompt or loss_on == "all" or (loss_on == "answers" and is_answer)))
    return found


def reference_window(
    documents: list[tuple[list[int], int]],
    start: int,
    length: int,
    loss_on: str = "answers",
    roles: Mapping[str, int] = MappingProxyType({"end": -1}),
) -> dict[str, list[int]]:
    """The window that begins at `start`, made token by token."""
    stream = [
        (token, number, place, is_learned)
        for number, (tokens, prompt) in enumerate(documents)
        for place, (token, is_learned) in enumerate(zip(tokens, learned(tokens, prompt, loss_on, roles), strict=True))
    ]
    window = stream[start : start + length + 1]
    targets = [token if is_learned else IGNORED for token, _, _, is_learned in window[1:]]
    first = window[0][1]
    begins = [max(0, i - place) for i, (_, _, place, _) in enumerate(window)]
    return {
        "tokens": [token for token, *_ in window[:length]],
        "targets": targets,
        "document_ids": [number - first for _, number, _, _ in window[:length]],
        "positions": [i - begin for i, begin in enumerate(begins[:length])],
    }


def check_row(batch: Batch, row: int, expected: dict[str, list[int]]) -> None:
    assert batch.tokens[row].tolist() == expected["tokens"]
    assert batch.targets[row].tolist() == expected["targets"]
    if batch.document_ids is None or batch.positions is None:
        assert batch.document_ids is None
        assert batch.positions is None
        assert max(expected["document_ids"]) == 0
    else:
        assert batch.document_ids[row].tolist() == expected["document_ids"]
        assert batch.positions[row].tolist() == expected["positions"]


CASES = [("text_data", "answers"), ("prompt_data", "answers"), ("prompt_data", "last_answer"), ("prompt_data", "all")]


@pytest.mark.parametrize(("data", "loss_on"), CASES)
@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64, 500])
def test_every_window_equals_the_reference(
    data: str,
    loss_on: LossOn,
    sequence_length: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = request.getfixturevalue(data)
    monkeypatch.setattr(dataset_module, "_LOOK_BACK", 5)  # shorter than many messages
    dataset = TokenDataset.open(directory, "train", loss_on=loss_on)
    documents = all_documents(directory, "train")
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    roles = {role: tokenizer.role_id(role) for role in ("system", "user", "assistant", "end")}
    assert dataset.num_documents == len(documents)
    assert dataset.num_tokens == sum(len(tokens) for tokens, _ in documents)
    assert len(dataset.segments) > 1
    batches = BatchLoader(dataset, sequence_length=sequence_length, batch_size=3, seed=4)
    assert batches.num_windows == (dataset.num_tokens - 1) // sequence_length
    for step in range(min(20, batches.num_windows // 3)):
        windows = batches.windows(np.arange(3 * step, 3 * step + 3))
        batch = batches.batch(step)
        for row, window in enumerate(windows.tolist()):
            start = window * sequence_length
            check_row(batch, row, reference_window(documents, start, sequence_length, loss_on, roles))


def test_types_and_shapes_are_those_promised(text_data: Path) -> None:
    batch = BatchLoader(TokenDataset.open(text_data), sequence_length=300, batch_size=4, seed=0).batch(0)
    assert batch.document_ids is not None
    assert batch.positions is not None
    for array, dtype in (
        (batch.tokens, "i8"),
        (batch.targets, "i8"),
        (batch.document_ids, "i4"),
        (batch.positions, "i8"),
    ):
        assert array.shape == (4, 300)
        assert array.dtype == np.dtype(dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable


def test_without_the_mask_only_the_ids_are_gone(text_data: Path) -> None:
    masked, unmasked = (
        BatchLoader(TokenDataset.open(text_data, document_mask=mask), sequence_length=300, batch_size=4, seed=0).batch(
            0
        )
        for mask in (True, False)
    )
    np.testing.assert_array_equal(masked.tokens, unmasked.tokens)
    np.testing.assert_array_equal(masked.targets, unmasked.targets)
    assert masked.document_ids is not None
    assert unmasked.document_ids is None
    assert unmasked.positions is None


@pytest.mark.parametrize("block", [1 << 20, 8])
def test_an_epoch_is_a_permutation_and_the_next_another(
    text_data: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "BLOCK_WINDOWS", block)
    loader._block_order.cache_clear()
    loader._shuffled.cache_clear()
    batches = BatchLoader(TokenDataset.open(text_data), sequence_length=50, batch_size=7, seed=11)
    count = batches.num_windows
    assert count > 40
    assert count % 7  # so that a batch spans two epochs
    epochs = batches.windows(np.arange(3 * count)).reshape(3, count)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(count))
        assert epoch.tolist() != list(range(count))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    other = BatchLoader(TokenDataset.open(text_data), sequence_length=50, batch_size=7, seed=12)
    assert other.windows(np.arange(count)).tolist() != epochs[0].tolist()
    loader._block_order.cache_clear()
    loader._shuffled.cache_clear()


def test_the_shuffle_is_the_same_for_ever() -> None:
    """A run that is resumed with another numpy must meet the old order, so these values may never change."""
    assert loader._permutation((3, 1, 4), 10).tolist() == [4, 5, 0, 8, 3, 7, 6, 9, 2, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_interleave_to_the_single_process(text_data: Path, world_size: int) -> None:
    dataset = TokenDataset.open(text_data)
    single = BatchLoader(dataset, sequence_length=20, batch_size=6, seed=5)
    ranks = [
        BatchLoader(dataset, sequence_length=20, batch_size=6, seed=5, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 3, single.num_windows // 6, 1000):
        whole = single.batch(step)
        for rank, batches in enumerate(ranks):
            part = batches.batch(step)
            np.testing.assert_array_equal(part.tokens, whole.tokens[rank::world_size])
            np.testing.assert_array_equal(part.targets, whole.targets[rank::world_size])


def test_a_batch_depends_on_nothing_but_its_step(text_data: Path) -> None:
    def batches() -> BatchLoader:
        return BatchLoader(TokenDataset.open(text_data), sequence_length=33, batch_size=5, seed=8)

    once = batches()
    forward = [once.batch(step) for step in range(30)]
    for step in reversed(range(30)):
        fresh = batches().batch(step)
        np.testing.assert_array_equal(fresh.tokens, forward[step].tokens)
        np.testing.assert_array_equal(fresh.targets, forward[step].targets)
    forward[0].tokens[:] = 0  # a caller may write into its batch
    np.testing.assert_array_equal(once.batch(0).tokens, batches().batch(0).tokens)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 100), max_size=5),
    sequence_length=st.integers(1, 40),
    same_ends=st.booleans(),
)
@hypothesis_settings(max_examples=200)
def test_any_stream_in_any_pieces_equals_the_reference(
    lengths: list[int], cuts: list[int], sequence_length: int, same_ends: bool
) -> None:
    eos = 0 if same_ends else 1
    documents = [([0, *range(2, 2 + length), eos], 0) for length in lengths]
    tokens = np.array([token for document, _ in documents for token in document], dtype=np.uint16)
    bounds = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    segments = [tokens[a:b] for a, b in pairwise(bounds)]
    stream = TokenStream(segments, bos_id=0, eos_id=eos, document_mask=True)
    starts = np.arange(0, len(tokens) - sequence_length, 1)
    if len(starts):
        batch = make_batch(stream, starts, sequence_length)
        for row, start in enumerate(starts.tolist()):
            check_row(batch, row, reference_window(documents, start, sequence_length))


@given(
    num_tokens=st.integers(1, 120),
    sequence_length=st.integers(1, 50),
    stride=st.integers(1, 50),
    batch_size=st.integers(1, 5),
    max_tokens=st.none() | st.integers(1, 130),
)
@hypothesis_settings(max_examples=300)
def test_evaluation_scores_every_target_once_with_enough_context(
    num_tokens: int, sequence_length: int, stride: int, batch_size: int, max_tokens: int | None
) -> None:
    stride = min(stride, sequence_length)
    stream = [0, *range(10, 10 + num_tokens), 1]
    scored: list[int] = []
    for batch in evaluation_batches(
        TokenStream([np.array(stream)], bos_id=0, eos_id=1),
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
    ):
        assert batch.tokens.shape[0] <= batch_size
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            first = not scored
            for place, target in enumerate(targets):
                if target != IGNORED:
                    assert first or place >= sequence_length - stride
                    assert stream[len(scored)] == tokens[place]
                    scored.append(target)
    assert scored == stream[1:][:max_tokens]


def test_evaluation_of_a_split_counts_all_its_bytes(text_data: Path) -> None:
    dataset = TokenDataset.open(text_data, "validation")
    tokenizer = Tokenizer.load(text_data / "tokenizer.json")
    batches = list(evaluation_batches(dataset, sequence_length=40, stride=15, batch_size=4))
    targets = np.concatenate([batch.targets[batch.targets != IGNORED] for batch in batches])
    assert tokenizer.token_num_bytes[targets].sum() == dataset.num_bytes
    assert len(targets) == dataset.num_tokens - dataset.num_documents
    assert sum(batch.num_targets for batch in batches) == len(targets)
    assert any(batch.document_ids is not None for batch in batches)


def test_a_raw_text_is_one_document(tokenizer: Tokenizer) -> None:
    text = "alpha beta 東京"
    stream = document_stream(tokenizer, [Document("", (text,))], document_mask=False)
    (batch,) = evaluation_batches(stream, sequence_length=64, batch_size=1)
    ids = tokenizer.encode(text)
    assert batch.tokens[0, : len(ids) + 1].tolist() == [tokenizer.bos_id, *ids]
    assert batch.targets[0, : len(ids) + 1].tolist() == [*ids, tokenizer.eos_id]
    assert batch.document_ids is None


def test_bad_requests_are_named(text_data: Path, tmp_path: Path) -> None:
    dataset = TokenDataset.open(text_data)
    with pytest.raises(RecipeError, match="batch of 5 sequences does not divide by 2"):
        BatchLoader(dataset, sequence_length=8, batch_size=5, seed=0, world_size=2)
    with pytest.raises(ArtefactError, match=r"train split has .* tokens, a window needs 1,000,001"):
        BatchLoader(dataset, sequence_length=1_000_000, batch_size=4, seed=0)
    with pytest.raises(RecipeError, match="stride of 9 is not between 1"):
        next(evaluation_batches(dataset, sequence_length=8, stride=9, batch_size=1))
    with pytest.raises(ArtefactError, match="no data set here"):
        TokenDataset.open(tmp_path)
    with pytest.raises(ArtefactError, match="holds no test documents"):
        TokenDataset.open(text_data, "test")
