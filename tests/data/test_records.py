"""What a row of training data may be, and what is said of one that is none."""

from __future__ import annotations

import pytest

from tinkex.data import records

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_a_row_is_recognised_by_its_keys():
    """Other keys may be there: people keep ids and sources in their data."""
    assert records.Chat((USER, ANSWER)) == records.parse({"messages": [USER, ANSWER], "id": 7})
    assert records.Completion("2+2=", "4") == records.parse({"prompt": "2+2=", "completion": "4"})
    assert records.Text("abc") == records.parse({"text": "abc"})


def test_sharegpt_is_a_conversation_with_other_names():
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}

    assert records.Chat((USER, ANSWER)) == records.parse(row)


def test_alpaca_is_a_conversation_of_one_turn():
    """The input, if there is one, is on a line after the instruction."""
    row = {"instruction": "Add", "input": "1+1", "output": "2", "text": "Below is ..."}

    assert records.Chat(
        ({"role": "user", "content": "Add\n1+1"}, {"role": "assistant", "content": "2"})
    ) == records.parse(row)


def test_a_prompt_of_messages_does_not_count():
    """TRL's rule: the completion alone, even if the assistant speaks in the prompt."""
    chat = records.parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})

    assert [False, False, False, None] == [m.get("trainable") for m in chat.messages]


def test_a_preference_pair_is_its_shared_beginning_and_two_answers():
    bad = {"role": "assistant", "content": "go away"}
    expected = records.Preference((USER,), (ANSWER,), (bad,))

    assert expected == records.parse({"chosen": [USER, ANSWER], "rejected": [USER, bad]})
    assert expected == records.parse({"prompt": "hi", "chosen": "hello", "rejected": "go away"})
    assert expected == records.parse(
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [bad]}
    )


def test_keys_may_be_mapped():
    row = {"question": "q", "answer": "a", "prompt": "ignored"}

    assert records.Completion("q", "a") == records.parse(
        row, renames={"prompt": "question", "completion": "answer"}
    )


def test_a_shape_may_be_told():
    row = {"text": "a", "messages": [USER, ANSWER]}

    assert records.Text("a") == records.parse(row, shape="text")


@pytest.mark.parametrize("shape", [name for name, shape in records.SHAPES.items() if shape.keys])
def test_a_shape_that_is_told_but_does_not_fit_is_refused(shape):
    reason = f"has no '{records.SHAPES[shape].keys[0]}', which --format {shape} needs"

    with pytest.raises(ValueError, match=f"{reason}; its keys are 'a', 'b'"):
        records.parse({"a": "1", "b": "2"}, shape=shape)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "a JSON list, not an object"),
        ({}, "has no keys; needs"),
        ({"prompt": "a"}, "has 'prompt'; needs"),
        ({"text": "a", "messages": []}, "has keys of messages and text; say which is meant: "),
        ({"text": ""}, "text is empty"),
        ({"text": 5}, "text must be a string, got number"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": None, "completion": "b"}, "prompt must be a string, got null"),
        ({"messages": []}, "messages must be a list that is not empty"),
        ({"messages": ["hi"]}, "message 0 is a JSON string"),
        ({"messages": [{"content": "a"}]}, "message 0: role must be a string, got null"),
        ({"messages": [{"role": "user"}]}, "message 0: content must be a string, got null"),
        ({"messages": [USER]}, "no message of role 'assistant'"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing to learn"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight must be 0 or 1, got 0.5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            "message 0: content has a part of type 'image_url'; only text can be trained on",
        ),
        ({"question": "q", "answer": "a"}, "try --map prompt=question,completion=answer"),
        ({"conversation": [USER, ANSWER]}, "try --map messages=conversation"),
        ({"content": "a book"}, "try --map text=content"),
        ({"prompt": "a", "completion": "b", "label": False}, "some completions are bad examples"),
        ({"segments": [{"label": True, "text": "a"}]}, 'write them as "prompt" and "completion"'),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "from must be human, gpt or system"),
    ],
)
def test_a_bad_row_is_refused_with_the_reason(row, reason):
    with pytest.raises(ValueError) as caught:
        records.parse(row)
    assert reason in str(caught.value)
