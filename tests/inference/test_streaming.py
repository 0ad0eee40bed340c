"""Streamed text: whole characters, and nothing of a stop string."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.inference.streaming import StopStrings, TextStream
from tests.inference.foreign import KINDS, foreign_tokenizer
from tests.inference.tiny import TEXT, tokenizer

letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that ends first (the longest of those), found by trying every end."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@given(pieces=st.lists(letters, max_size=5), stops=stop_lists)
def test_text_is_cut_at_the_first_stop_string_however_it_is_divided(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    shown = "".join(matcher.push(piece) for piece in pieces)
    is_matched = matcher.matched is not None
    assert (shown + matcher.flush(), is_matched) == cut("".join(pieces), stops)


@given(pieces=st.lists(letters, max_size=5), stops=stop_lists)
def test_only_what_may_begin_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, shown = StopStrings(stops), "", ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        if matcher.matched is not None:
            return
        held = seen[len(shown) :]
        beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
        assert held == max((end for end in beginnings if seen.endswith(end)), key=len, default="")


@given(ids=st.lists(st.integers(6, tokenizer().vocab_size - 1), max_size=40))
def test_streamed_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    stream = TextStream(tokenizer())
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == stream.text == tokenizer().decode(ids)


def test_no_piece_holds_part_of_a_character() -> None:
    ids = tokenizer().encode(TEXT)
    stream = TextStream(tokenizer())
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == TEXT
    assert "" in pieces  # the tokens are smaller than the characters, or this would prove nothing


def test_a_stop_string_inside_a_character_boundary_is_found() -> None:
    stream = TextStream(tokenizer(), ["\u3093\u306b"])
    shown = "".join(stream.push(token) for token in tokenizer().encode("ab\u3053\u3093\u306b\u3061"))
    assert shown == stream.text == "ab\u3053"
    assert stream.is_stopped


SPOKEN = "near falls and reads roofs on the river the small grey town."


def foreign_stream(kind: str, prompt: str, stops: list[str] | None = None) -> tuple[TextStream, list[str]]:
    """A stream after the prompt, and the pieces that the rest of SPOKEN makes."""
    chosen = foreign_tokenizer(kind)
    ids, prompt_ids = chosen.encode(SPOKEN), chosen.encode(prompt)
    assert ids[: len(prompt_ids)] == prompt_ids
    stream = TextStream(chosen, stops or [], prompt_ids=prompt_ids)
    return stream, [stream.push(token) for token in ids[len(prompt_ids) :]]


@pytest.mark.parametrize("kind", ["wordpiece", "meta", "prefix"])
@pytest.mark.parametrize("prompt", ["near", "near falls and reads roofs on the river the"])
def test_what_follows_a_prompt_keeps_its_leading_space(kind: str, prompt: str) -> None:
    stream, pieces = foreign_stream(kind, prompt)
    assert "".join(pieces) + stream.finish() == stream.text == SPOKEN[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_may_begin_with_the_space_after_the_prompt(kind: str) -> None:
    stream, pieces = foreign_stream(kind, "near falls", [" and reads"])
    assert ("".join(pieces), stream.text, stream.is_stopped) == ("", "", True)


@pytest.mark.parametrize("kind", ["wordpiece", "meta"])
def test_without_a_prompt_a_text_begins_as_it_decodes(kind: str) -> None:
    stream, pieces = foreign_stream(kind, "")
    assert "".join(pieces) + stream.finish() == SPOKEN


@pytest.mark.parametrize("kind", ["wordpiece", "meta"])
def test_a_prompt_of_unknown_tokens_counts_as_text(kind: str) -> None:
    chosen = foreign_tokenizer(kind)
    stream = TextStream(chosen, prompt_ids=chosen.encode("\u6771"))
    assert "".join(map(stream.push, chosen.encode("small falls"))) + stream.finish() == " small falls"


@given(data=st.data())
@settings(max_examples=60)
def test_a_long_stream_is_what_the_tokens_add_to_the_prompt(data: st.DataObject) -> None:
    chosen = foreign_tokenizer(data.draw(st.sampled_from(KINDS)))
    words = data.draw(st.lists(st.sampled_from(SPOKEN.split()), min_size=1, max_size=200))
    ids = chosen.encode(" ".join(words))
    place = data.draw(st.integers(1, len(ids)))
    stream = TextStream(chosen, prompt_ids=ids[:place])
    shown = "".join(map(stream.push, ids[place:])) + stream.finish()
    assert chosen.decode(ids[:place]) + shown == chosen.decode(ids)


def byte_fallback() -> Tokenizer:
    """Llama 2's form: pieces for a few words, bytes for the rest, the first space stripped."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {token: len(vocab) + i for i, token in enumerate(["\u2581", "a", "\u2581a"])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(  # pyright: ignore
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


@pytest.mark.parametrize("text", ["a \u6771 a\U0001f600\U0001f600 a", "\u6771\u4eac\u6771\u4eac a a"])
def test_bytes_divided_between_prompt_and_completion_become_their_character(text: str) -> None:
    chosen = byte_fallback()
    ids = chosen.encode(text)
    for place in range(1, len(ids)):
        stream = TextStream(chosen, prompt_ids=ids[:place])
        shown = "".join(map(stream.push, ids[place:])) + stream.finish()
        whole = next(ids[:end] for end in range(place, -1, -1) if "\ufffd" not in chosen.decode(ids[:end]))
        assert chosen.decode(whole) + shown == text
