"""Streamed text: whole characters, and nothing of a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from inl_core.inference.streaming import StopStrings, TextStream
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
