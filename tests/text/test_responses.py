"""What a model said, as a message: text, reasoning and tool calls."""

from __future__ import annotations

import pytest

import tinkex
from tests.support.fake_service import ByteTokenizer
from tinkex.text.responses import parse_text

CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It is sunny.", {"content": "It is sunny."}),
        (
            "<think>\nHm.\n</think>\n\nIt is.",
            {"content": "It is.", "reasoning_content": "Hm."},
        ),
        ("Hm.\n</think>\n\nIt is.", {"content": "It is.", "reasoning_content": "Hm."}),
        (
            'Wait.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}'
            "\n</tool_call>",
            {"content": "Wait.", "tool_calls": CALL},
        ),
        (
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abc"}]',
            {"content": "", "tool_calls": CALL},
        ),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', {"content": "", "tool_calls": CALL}),
        (
            '{"name": "get_weather", "parameters": {"city": "Paris"}}',
            {"content": "", "tool_calls": CALL},
        ),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
            '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            {"content": "", "tool_calls": CALL},
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
            "<|message|>It is.",
            {"content": "It is.", "reasoning_content": "Hm."},
        ),
        (
            "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
            '{"city": "Paris"}',
            {"content": "", "tool_calls": CALL},
        ),
        ('{"name": 5}', {"content": '{"name": 5}'}),
        ("<tool_call>nonsense</tool_call>", {"content": "<tool_call>nonsense</tool_call>"}),
    ],
)
def test_a_message_is_read_from_its_notation(text, expected):
    assert {"role": "assistant", **expected} == parse_text(text)


@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3", "gptoss", "glm4moe", "llama3"])
def test_what_was_rendered_is_read_back(load, kind):
    """The same message comes out, without the token that ended it."""
    ours, _ = load(kind)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "It is sunny."}]
    rendered = tinkex.render(messages, ours)
    span = rendered.spans[-1]
    said = rendered.tokens[span.start : span.stop].tolist()
    stop = tinkex.render_prompt(messages[:1], ours).stop
    end = next((i for i, token in enumerate(said) if token in stop), len(said))

    message = tinkex.parse_response(said[: end + 1], ours)

    assert "It is sunny." == message["content"]
    assert "tool_calls" not in message


def test_without_a_template_the_next_line_of_the_user_is_cut_off():
    tokens = list(b" It is.\nUser:")

    assert {"role": "assistant", "content": "It is."} == (
        tinkex.parse_response(tokens, ByteTokenizer())
    )
