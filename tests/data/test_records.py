"""
Training data: what a line may be, which tokens count, and which example goes in which batch.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_service import ByteTokenizer
from tinkex.data import records


@pytest.fixture
def write(tmp_path):
    """A JSONL file of values (or of bytes, as they are)."""

    def write(*lines):
        path = tmp_path / "data.jsonl"
        encoded = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in lines]
        path.write_bytes(b"\n".join(encoded))
        return path

    return write


class ChatTokenizer(ByteTokenizer):
    """A template in the style of many models; with *forgets* it drops earlier answers' thoughts."""

    chat_template = "<role>content<end>"

    def __init__(self, forgets=False):
        self.forgets = forgets

    def apply_chat_template(self, messages, add_generation_prompt=False):
        text = ""
        for i, message in enumerate(messages):
            content = message["content"]
            if self.forgets and i < len(messages) - 1:
                content = content.split("</think>")[-1]
            text += f"<{message['role']}>{content}<end>"
        return text + ("<assistant>" if add_generation_prompt else "")


def counted_text(example):
    """What of an example counts, as text."""
    return ByteTokenizer().decode(example.tokens[example.counted == 1].tolist())


def rendered(record, tokenizer=None, max_length=1000):
    [example] = records.render([record], tokenizer or ByteTokenizer(), max_length).examples
    return example


# Reading


def test_a_line_is_recognised_by_its_keys(write):
    """Other keys may be there: people keep ids and sources in their data."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write(
        {"messages": messages, "id": 7}, {"prompt": "2+2=", "completion": "4"}, {"text": "abc"}
    )

    assert [
        records.Chat(tuple(messages)),
        records.Completion("2+2=", "4"),
        records.Text("abc"),
    ] == records.read(path).records


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
        (b'{"text": "\xff"}', "not UTF-8 (byte 10 of the line)"),
        (b'{"a":' * 100_000, "not JSON"),
        ([1], "a JSON list, not an object"),
        ({}, "has no keys; needs"),
        ({"prompt": "a"}, "has 'prompt'; needs"),
        ({"text": "a", "messages": []}, "has messages and text; needs"),
        ({"text": ""}, "text is empty"),
        ({"text": 5}, "text must be a string, got number"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": None, "completion": "b"}, "prompt must be a string, got null"),
        ({"messages": []}, "messages must be a list that is not empty"),
        ({"messages": ["hi"]}, "message 0 is a JSON string"),
        ({"messages": [{"role": "user"}]}, "message 0: content must be a string, got null"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of role 'assistant'"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_reason(write, line, reason):
    path = write({"text": "good"}, b"", line)

    with pytest.raises(ValueError, match="1 bad line:\n  line 3: ") as caught:
        records.read(path)
    assert reason in str(caught.value)


def test_bad_lines_are_reported_together(write):
    """Mending them one run at a time would be a punishment; but a screen has an end."""
    path = write(*[{"text": ""}] * 25)

    with pytest.raises(ValueError, match="25 bad lines") as caught:
        records.read(path)
    assert 20 == str(caught.value).count("text is empty")
    assert "... and 5 more" in str(caught.value)


def test_bad_lines_can_be_left_out_and_are_counted(write):
    data = records.read(write({"text": ""}, {"text": "good"}), skip_bad_lines=True)

    assert [records.Text("good")] == data.records
    assert [records.BadLine(1, "text is empty: nothing to learn")] == data.bad


@pytest.mark.parametrize("lines", [[], [b"\n\n"], [{"text": ""}]])
def test_a_file_without_a_good_line_is_refused(write, lines):
    with pytest.raises(ValueError, match="holds no training example"):
        records.read(write(*lines), skip_bad_lines=True)


def test_a_line_ends_at_a_newline_only(write):
    """JSON strings may hold other line separators unescaped."""
    data = records.read(write('{"text": "a\u2028b"}'.encode()))

    assert [records.Text("a\u2028b")] == data.records


# Rendering


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


def test_without_a_chat_template_roles_are_written_out():
    example = rendered(
        records.Chat(
            (
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "hello"},
            )
        )
    )

    assert "User: hi\nAssistant: hello\n" == ByteTokenizer().decode(example.tokens.tolist())
    assert " hello\n" == counted_text(example)


def test_a_prompt_has_the_tokens_it_had_in_training():
    chat = records.Chat(
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    )

    for tokenizer in (ByteTokenizer(), ChatTokenizer()):
        text = records.chat_prompt(chat.messages[:1], tokenizer)
        tokens = records.encode_prompt(text, tokenizer, tokenizer.chat_template is not None)

        assert rendered(chat, tokenizer).prompt.to_ints() == tokens


CONVERSATION = (
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "<think>so</think>2"},
    {"role": "user", "content": "3"},
    {"role": "assistant", "content": "<think>hm</think>4"},
)


def test_each_assistant_turn_counts_with_its_end():
    """The end too: the model must learn when to stop."""
    example = rendered(records.Chat(CONVERSATION), ChatTokenizer())

    assert "<think>so</think>2<end><think>hm</think>4<end>" == counted_text(example)


def test_of_a_template_that_takes_back_what_it_said_the_last_turn_counts():
    """Counting an earlier turn without its reasoning would teach to answer without it."""
    result = records.render([records.Chat(CONVERSATION)], ChatTokenizer(forgets=True), 1000)

    assert "<think>hm</think>4<end>" == counted_text(result.examples[0])
    assert 1 == result.partly_counted


def test_the_template_says_the_beginning_itself():
    """A second begin-of-text token in front would be one that the model never saw there."""
    example = rendered(records.Chat(CONVERSATION), ChatTokenizer())

    assert 256 not in example.tokens


def test_what_is_too_long_is_cut_and_counted():
    result = records.render([records.Text("abcdef"), records.Text("a")], ByteTokenizer(), 4)

    assert [256, *b"abc"] == result.examples[0].tokens.tolist()
    assert 1 == result.truncated


def test_an_example_without_a_counted_token_is_dropped_and_counted():
    lines = [records.Completion("a long prompt", "x"), records.Text("a")]

    result = records.render(lines, ByteTokenizer(), 4)

    assert 1 == len(result.examples)
    assert 1 == result.dropped


def test_when_nothing_is_left_the_error_says_why():
    with pytest.raises(ValueError, match="none of the 1 examples has a token that counts"):
        records.render([records.Completion("a long prompt", "x")], ByteTokenizer(), 4)


def test_a_datum_predicts_each_token_from_those_before_it():
    datum = rendered(records.Completion("a", "b")).datum(scale=0.5)

    assert [256, 97, 98] == datum.model_input.to_ints()
    assert [97, 98, 257] == datum.loss_fn_inputs["target_tokens"].tolist()
    assert [0, 0.5, 0.5] == datum.loss_fn_inputs["weights"].tolist()


# Splitting and ordering


@given(st.integers(0, 300), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32))
def test_every_example_is_either_held_out_or_trained_on(count, fraction, seed):
    train, held_out = records.split(count, fraction, seed)

    assert list(range(count)) == sorted(train + held_out)
    assert (train, held_out) == records.split(count, fraction, seed)
    if count >= 2 and fraction > 0:
        assert train
        assert held_out


@given(st.integers(1, 60), st.integers(1, 70), st.integers(1, 3), st.integers(0, 9))
def test_an_epoch_has_every_example_once(count, batch_size, epochs, seed):
    plan = records.Plan(count, batch_size, epochs, seed)

    for epoch in range(epochs):
        first = epoch * plan.steps_per_epoch + 1
        batches = [plan.batch(first + i) for i in range(plan.steps_per_epoch)]
        assert list(range(count)) == sorted(itertools.chain(*batches))
    assert epochs * plan.steps_per_epoch == plan.total_steps


def test_each_epoch_has_an_order_of_its_own():
    plan = records.Plan(100, 100, 2, seed=0)

    assert plan.batch(1) != plan.batch(2)


def test_max_steps_cuts_a_plan_short():
    assert 3 == records.Plan(100, 10, 1, seed=0, max_steps=3).total_steps
    assert 10 == records.Plan(100, 10, 1, seed=0, max_steps=30).total_steps


def test_the_order_is_the_same_on_every_machine():
    """A run may be resumed elsewhere; numpy promises its generators' streams per version only,
    so that this tells when they change."""
    assert [2, 7, 0] == records.Plan(10, 3, 1, seed=0).batch(1)
    assert np.array_equal([4], records.split(10, 0.1, 0)[1])
