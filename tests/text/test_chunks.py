"""Chunks: the tokens of a text as a whole, and which of them stand for which characters."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.conftest import SPECIAL, TEMPLATES, backend, real_qwen
from tinkex.text.chunks import ChunkEncoder
from tinkex.text.tokenizer import Tokenizer

KINDS = {"qwen3": False, "gptoss": False, "llama2": True, "mistral_v03": True, "real": False}


def made(kind):
    if kind == "real":
        return Tokenizer(real_qwen())
    template = (TEMPLATES / f"{kind}.jinja").read_text(encoding="utf-8")
    special = next(v for k, v in SPECIAL.items() if kind.startswith(k))
    return Tokenizer(backend(template, tuple(special.values()), KINDS[kind]))


def texts_with(pieces):
    """Texts in which the tokens at which a tokenizer cuts are frequent, also half of them."""
    words = st.sampled_from([*pieces, *(p[1:] for p in pieces), *(p[:-1] for p in pieces)])
    words |= st.sampled_from([" ", "  ", "\n", " Paris", "is sunny ", "é", "晴れ", "☀️", "\u200d"])
    return st.lists(words, max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tokens_are_those_of_the_whole_text(kind, data):
    tokenizer = made(kind)
    texts = data.draw(st.lists(texts_with(sorted(tokenizer.control_tokens)), max_size=4))

    found = ChunkEncoder(tokenizer).encode(texts)

    assert [e.ids for e in tokenizer.encode_batch(texts)] == [f.ids.tolist() for f in found]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_tokens_of_characters_are_those_that_stand_for_them(kind, data):
    """Against a reading of the whole text's offsets, one token and one character at a time."""
    tokenizer = made(kind)
    text = data.draw(texts_with(sorted(tokenizer.control_tokens)))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))

    [found] = ChunkEncoder(tokenizer).encode([text])
    first, last = found.tokens_of(start, stop)

    [whole] = tokenizer.encode_batch([text])
    expected = []
    claimed = 0
    for i, (begins, ends) in enumerate(whole.offsets):
        # White space that no token claims belongs to the token after it, unless the text is cut
        # there.
        if whole.tokens[i] not in tokenizer.first_cuts:
            begins = min(begins, claimed)
        claimed = max(claimed, ends)
        if begins < stop and max(ends, begins + 1) > start and start < stop:
            expected.append(i)
    assert expected == list(range(first, last))


@pytest.mark.parametrize("option", ["lstrip", "single_word"])
def test_a_token_that_looks_at_what_is_before_it_is_never_a_border(option):
    """White space before it, or a letter, would be in another chunk."""
    plain = backend("", ("<s>",), False)
    changed = tokenizers.Tokenizer.from_str(plain.to_str())
    changed.add_special_tokens([tokenizers.AddedToken("<|b|>", special=True, **{option: True})])
    tokenizer = Tokenizer(changed)
    texts = ["a  <|b|>b", "a<|b|> b", "<|b|>"]

    found = ChunkEncoder(tokenizer).encode(texts)

    assert [] == tokenizer.first_cuts
    assert [e.ids for e in tokenizer.encode_batch(texts)] == [f.ids.tolist() for f in found]


def test_a_chunk_is_encoded_once_for_all_texts():
    class Counting(Tokenizer):
        encoded = 0

        def encode_batch(self, texts):
            self.encoded += len(texts)
            return super().encode_batch(texts)

    tokenizer = Counting(real_qwen())
    asked = "<|im_start|>user\nWhat is it?<|im_end|>\n"
    texts = [asked, asked + "<|im_start|>assistant\nParis", asked * 3]

    ChunkEncoder(tokenizer).encode(texts)

    assert 3 == tokenizer.encoded  # the question, its end, the answer


def test_of_nothing_there_are_no_tokens():
    [found] = ChunkEncoder(made("qwen3")).encode([""])

    assert np.zeros(0).tolist() == found.ids.tolist()
    assert (0, 0) == found.tokens_of(0, 0)
