"""Text that arrives in pieces is the same text, whatever the pieces."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinkex.text import tokenizer
from tinkex.text.streaming import HALF, StopStrings, TokenText

TINY = tokenizer.load("tiny")


def pieces_of(tokens, decode=TINY.decode):
    text = TokenText(decode)
    return [*(text.push(token) for token in tokens), text.finish()]


@given(st.text(max_size=60))
def test_the_pieces_of_any_text_are_the_text(text):
    tokens = TINY.encode(text, add_special_tokens=False)

    assert TINY.decode(tokens) == "".join(pieces_of(tokens))


@given(st.lists(st.integers(0, 255), max_size=40))
@example([128] * 5 + [241, 128, 128, 128])
@example([241, 128] * 8 + [128, 128])
def test_so_are_those_of_bytes_that_are_no_text(tokens):
    """A model that is sampled hot says them."""
    assert TINY.decode(tokens) == "".join(pieces_of(tokens))


def test_what_is_no_character_holds_back_four_bytes_at_most():
    """A model that says nothing but broken bytes is shown as it goes."""
    pieces = pieces_of([*[128] * 20, 241, 128, 128, 128])

    assert all(1 >= len(piece) for piece in pieces[4:20])
    assert "".join(pieces) == TINY.decode([*[128] * 20, 241, 128, 128, 128])


def test_half_a_character_is_held_back():
    tokens = TINY.encode("a🦉b", add_special_tokens=False)
    pieces = pieces_of(tokens)

    assert all(HALF not in piece for piece in pieces)
    assert "a🦉b" == "".join(pieces)


def test_a_space_before_a_word_is_not_lost():
    """As SentencePiece decodes: the first token of a text loses its leading space."""
    words = {1: "▁Hello", 2: "▁big", 3: "ger", 4: "▁world"}

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert ["Hello", " big", "ger", " world", ""] == pieces_of([1, 2, 3, 4], decode)


ALPHABET = st.text("ab<>", max_size=12)


@given(st.lists(ALPHABET), st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_first_of_them_begins(pieces, stops):
    whole = "".join(pieces)
    cuts = [at for stop in stops if (at := whole.find(stop)) >= 0]
    finder = StopStrings(stops)
    passed = "".join([*(finder.push(piece) for piece in pieces), finder.finish()])

    # Pieces decide which of two overlapping stops is seen first, never what was let through before.
    assert passed == whole if not cuts else whole.startswith(passed)
    assert bool(cuts) == (finder.found is not None)
    if cuts:
        assert whole[len(passed) :].startswith(finder.found)
        assert whole == passed + finder.found + finder.rest


@pytest.mark.parametrize("stop", ["</s>", "\n\nUser:"])
def test_what_may_begin_a_stop_waits_until_it_is_clear(stop):
    finder = StopStrings([stop])

    assert ["x", "", "", stop[:2] + "y"] == [
        finder.push("x"), finder.push(stop[0]), finder.push(stop[1]), finder.push("y"),
    ]  # fmt: skip
