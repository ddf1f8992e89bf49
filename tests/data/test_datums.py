"""Records to examples: what counts, what is cut, what is left out, what is kept on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers

import tinkex
from tests.support.fake_service import ByteTokenizer
from tinkex import types
from tinkex.data import datums, files, records
from tinkex.text.tokenizer import Tokenizer


def rendered(record, tokenizer=None, max_length=1000):
    options = datums.Options(max_length)
    [example] = datums.render([record], tokenizer or ByteTokenizer(), options).examples
    return example


def test_all_of_a_text_counts_and_so_does_its_end():
    example = rendered(records.Text("abc"))

    assert [256, *b"abc", 257] == example.tokens.tolist()
    assert [0, 1, 1, 1, 1] == example.counted.tolist()


def test_of_a_completion_the_prompt_does_not_count():
    example = rendered(records.Completion("2+2=", "4"))

    assert [256, *b"2+2=4", 257] == example.tokens.tolist()
    assert [0, 0, 0, 0, 0, 1, 1] == example.counted.tolist()
    assert [256, *b"2+2="] == example.prompt.to_ints()


def test_the_first_token_never_counts():
    """Nothing comes before it, so nothing can predict it."""

    class Bare(ByteTokenizer):
        bos_token_id = eos_token_id = None

        def encode(self, text, add_special_tokens=True):
            return super().encode(text, add_special_tokens=False)

    example = rendered(records.Completion("", "ab"), Bare())

    assert [0, 1] == example.counted.tolist()


def test_what_is_too_long_is_cut_and_counted():
    lines = [records.Text("abcdef"), records.Text("a")]

    result = datums.render(lines, ByteTokenizer(), datums.Options(4))

    assert [256, *b"abc"] == result.examples[0].tokens.tolist()
    assert 1 == result.truncated


def test_an_example_without_a_counted_token_is_dropped_and_counted():
    lines = [records.Completion("a long prompt", "x"), records.Text("a")]

    result = datums.render(lines, ByteTokenizer(), datums.Options(4))

    assert 1 == len(result.examples)
    assert 1 == result.dropped


def test_raise_max_length_is_said_only_where_that_helps():
    cut = datums.render(
        [records.Completion("a long prompt", "x")], ByteTokenizer(), datums.Options(4)
    )
    with pytest.raises(ValueError, match="raise --max-length"):
        datums.check_some_are_left(cut, 1, 4)

    silent = {"role": "assistant", "content": "a", "weight": 0}
    nothing = datums.render([records.Chat((silent,))], ByteTokenizer(), datums.Options(1000))
    with pytest.raises(ValueError, match="no message counts") as caught:
        datums.check_some_are_left(nothing, 1, 1000)
    assert "max-length" not in str(caught.value)


def test_a_record_that_cannot_be_rendered_is_a_bad_line():
    """A lone surrogate: half of a character, which no encoding has."""
    bad = records.Text("a\ud800", where="line 2")

    result = datums.render([records.Text("a"), bad], ByteTokenizer(), datums.Options(10))

    assert 1 == len(result.examples)
    assert "line 2" == result.bad[0].where
    assert "lone surrogate ('\\ud800' at character 1)" in result.bad[0].reason


def test_a_datum_predicts_each_token_from_those_before_it():
    datum = rendered(records.Completion("a", "b")).datum(scale=0.5)

    assert [256, 97, 98] == datum.model_input.to_ints()
    assert [97, 98, 257] == datum.loss_fn_inputs["target_tokens"].tolist()
    assert [0, 0.5, 0.5] == datum.loss_fn_inputs["weights"].tolist()


# On disk


@pytest.fixture
def tokenizer():
    words = {"a": 0, "b": 1, "c": 2}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "\ud800"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return files.read(path)


def test_what_was_rendered_is_not_rendered_again(data, tokenizer, tmp_path, monkeypatch):
    """Rendering ten thousand conversations takes long; --resume should not."""
    first = datums.cached(tmp_path, data, tokenizer, datums.Options(10))
    monkeypatch.setattr(datums, "render", None)

    second = datums.cached(tmp_path, data, tokenizer, datums.Options(10))

    assert first.bad == second.bad
    assert 1 == len(second.bad)
    for one, other in zip(first.examples, second.examples):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.counted, other.counted)
        assert (one.prompt_length, one.record) == (other.prompt_length, other.record)


@pytest.mark.parametrize("change", ["options", "template", "data"])
def test_other_data_options_or_templates_are_rendered_again(
    data, tokenizer, tmp_path, change, monkeypatch
):
    datums.cached(tmp_path, data, tokenizer, datums.Options(10))
    options = datums.Options(11 if change == "options" else 10)
    if change == "template":
        tokenizer = Tokenizer(tokenizer._backend, {"chat_template": "another"})
    if change == "data":
        (tmp_path / "data.jsonl").write_text('{"text": "other"}')
        data = files.read(tmp_path / "data.jsonl")
    asked = []
    render = datums.render
    monkeypatch.setattr(datums, "render", lambda *args: asked.append(1) or render(*args))

    datums.cached(tmp_path, data, tokenizer, options)

    assert [1] == asked


def test_a_broken_cache_is_ignored(data, tokenizer, tmp_path):
    first = datums.cached(tmp_path, data, tokenizer, datums.Options(10))
    [path] = tmp_path.glob("rendered-*.npz")
    path.write_bytes(path.read_bytes()[:100])

    second = datums.cached(tmp_path, data, tokenizer, datums.Options(10))

    assert len(first.examples) == len(second.examples)


# For scripts

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_datums_of_rows_in_memory():
    [one, two] = datums.datums([{"text": "ab"}, {"messages": MESSAGES}], ByteTokenizer())

    assert [256, *b"ab"] == one.model_input.to_ints()
    assert b" ho\n" == bytes(
        two.loss_fn_inputs["target_tokens"]
        .to_numpy()[two.loss_fn_inputs["weights"].to_numpy() == 1][:-1]
        .tolist()
    )


def test_datums_of_a_bad_row_name_it():
    with pytest.raises(ValueError, match="row 2: text is empty"):
        datums.datums([{"text": "ab"}, {"text": ""}], ByteTokenizer())


def test_a_datum_is_made_of_messages_of_a_completion_and_of_a_text():
    """The same tokens and weights as `render` gives."""
    tokenizer = ByteTokenizer()
    expected = tinkex.render(MESSAGES, tokenizer)

    chat = types.Datum.from_messages(MESSAGES, tokenizer)
    completion = types.Datum.from_completion("2+2=", "4", tokenizer)
    text = types.Datum.from_text("abc", tokenizer)

    assert expected.tokens[:-1].tolist() == chat.model_input.to_ints()
    assert expected.weights[1:].tolist() == chat.loss_fn_inputs["weights"].tolist()
    assert [0, 0, 0, 0, 1, 1] == completion.loss_fn_inputs["weights"].tolist()
    assert [256, *b"abc"] == text.model_input.to_ints()
