"""No request gets a 500 in these dialects, either: odd values in every field."""

from __future__ import annotations

import attrs
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.conftest import QUICK, Served
from tests.server.test_fuzz import QUIET, with_odd_places
from tinkex.server.openai.endpoints import ANTHROPIC_PREFIXES, OPENAI_PREFIXES

TOOL = {
    "name": "find",
    "description": "Find.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "yes", "reasoning_content": "why"},
    {"role": "user", "content": "more"},
]
CALLED = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "a",
                "type": "function",
                "function": {"name": "find", "arguments": '{"city": "x"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "a", "content": "far"},
]
SETTINGS = {"model": "tiny", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5}
OPENAI = {**SETTINGS, "n": 2, "seed": 3, "stop": ["x"], "stream": False}
BODIES = {
    "completions": {
        **OPENAI, "prompt": [[1, 2], [3]], "echo": True, "logprobs": 2, "logit_bias": {},
        "suffix": "", "best_of": 2, "presence_penalty": 0, "frequency_penalty": 0,
    },
    "completions streamed": {
        **OPENAI, "prompt": "hi", "stream": True, "stream_options": {"include_usage": True},
    },
    "chat/completions": {
        **OPENAI, "messages": SAID, "logprobs": True, "top_logprobs": 2, "tool_choice": "auto",
        "response_format": {"type": "text"}, "max_completion_tokens": 3,
    },
    "chat/completions tools": {
        **OPENAI, "messages": CALLED, "tools": [{"type": "function", "function": TOOL}],
    },
    "chat/completions streamed": {**OPENAI, "messages": SAID, "stream": True, "logprobs": True},
    "messages": {
        **SETTINGS, "system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"],
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "why"},
                                              {"type": "text", "text": "yes"}]},
            {"role": "user", "content": [{"type": "text", "text": "more"}]},
        ],
    },
    "messages tools": {
        **SETTINGS,
        "tools": [{"name": "find", "description": "f", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto"},
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "a", "name": "find", "input": {"city": "x"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "far"}]},
        ],
    },
    "messages streamed": {
        **SETTINGS, "messages": [{"role": "user", "content": "hi"}], "stream": True,
    },
    "messages/count_tokens": {**SETTINGS, "messages": [{"role": "user", "content": "hi"}]},
}  # fmt: skip


def _prefixes(name):
    return ANTHROPIC_PREFIXES if name.startswith("messages") else OPENAI_PREFIXES


#: The routes that these bodies go to.
FUZZED = {("POST", prefix + name.split(" ")[0]) for name in BODIES for prefix in _prefixes(name)}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    limits = attrs.evolve(QUICK, max_tokens=64, num_samples=8)
    served = Served(tmp_path_factory.mktemp("home"), limits=limits)
    yield served.server.url
    served.close()


@pytest.mark.parametrize("name", BODIES)
@settings(QUIET, max_examples=80)
@given(data=st.data())
def test_odd_values_in_any_field_are_refused_or_answered(url, name, data):
    check(url, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", BODIES)
@settings(QUIET, max_examples=1000)
@given(data=st.data())
def test_a_thousand_odd_values_are_refused_or_answered(url, name, data):
    check(url, name, data)


def check(url, name, data):
    """Change *name*'s body in odd places and send it: an answer or a refusal, not a 500."""
    body = with_odd_places(data, BODIES[name])
    path = name.split(" ")[0]
    prefix = data.draw(st.sampled_from(_prefixes(path)))
    answer = requests.post(f"{url}{prefix}{path}", json=body, timeout=20)

    assert answer.status_code < 500, (body, answer.text)
    if answer.status_code == 200 and "event-stream" in answer.headers["Content-Type"]:
        assert '"server_error"' not in answer.text and '"api_error"' not in answer.text, body
    elif answer.status_code != 200:
        assert answer.json()["error"]["message"], body
