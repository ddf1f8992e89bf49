"""Chats with OpenAI-style servers: our own, and answers as others give them."""

from __future__ import annotations

import json

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.processes import free_port
from tinkex import errors
from tinkex.recipes.conversation import Conversation, Settings
from tinkex.recipes.openai_server import OpenAIServer, is_openai_style
from tinkex.server.app import LocalServer

URL = "http://other.test/v1"
SETTINGS = Settings(max_tokens=8, temperature=0.0, seed=3)
HELLO = [{"role": "user", "content": "Hello"}]


def events(*payloads):
    """A stream as servers send it."""
    lines = [f"data: {json.dumps(payload)}\n\n" for payload in payloads]
    return ": a comment\n\n" + "".join(lines) + "data: [DONE]\n\n"


def says(**delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


@pytest.fixture
def server(requests_mock):
    """Answers with what is given to it; returns the speaker."""

    def answering(text, status=200):
        requests_mock.post(f"{URL}/chat/completions", text=text, status_code=status)
        return OpenAIServer(URL, "sk-1", "qwen")

    answering.mock = requests_mock
    return answering


def test_which_addresses_are_meant():
    assert is_openai_style("http://127.0.0.1:8000/v1") and is_openai_style("https://a.b/openai/v1/")
    assert not is_openai_style("http://127.0.0.1:8000") and not is_openai_style(None)


def test_an_answer_comes_in_pieces_and_is_remembered_with_its_reasoning(server):
    usage = {"choices": [], "usage": {"total_tokens": 9}}
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "Hm."}]
    deltas += [{"content": "Hi"}, {"content": " there"}]
    speaker = server(events(*(says(**delta) for delta in deltas), usage))

    assert ["Hi", " there"] == list(speaker.pieces(HELLO, SETTINGS))
    assert {"role": "assistant", "content": "Hi there", "reasoning_content": "Hm."} == (
        speaker.message
    )


def test_the_request_is_openai_s(server):
    list(server(events()).pieces(HELLO, SETTINGS))
    sent = server.mock.last_request

    assert "Bearer sk-1" == sent.headers["Authorization"]
    assert {
        "model": "qwen", "messages": HELLO, "max_tokens": 8, "temperature": 0.0, "seed": 3,
        "stream": True,
    } == sent.json()  # fmt: skip


def test_the_model_sees_what_was_said_before(server):
    conversation = Conversation(server(events(says(content="Hi"))), SETTINGS)
    conversation.set_system("Be kind.")
    for text in ("Hello", "And?"):
        list(conversation.ask(text))

    roles = [message["role"] for message in server.mock.last_request.json()["messages"]]
    assert ["system", "user", "assistant", "user"] == roles


def test_a_stopped_answer_is_remembered_as_far_as_it_came(server):
    conversation = Conversation(server(events(says(content="Hi"), says(content="!"))), SETTINGS)
    pieces = conversation.ask("Hello")
    next(pieces)
    pieces.close()

    assert "Hi" == conversation.messages[-1]["content"]


@pytest.mark.parametrize(
    "text, status, says",
    [
        ('{"error": {"message": "no such model"}}', 404, "404: no such model"),
        ('{"error": "no such model"}', 404, "404: no such model"),
        ("<html>bad gateway", 502, "502: <html>bad gateway"),
        ('data: {"error": {"message": "out of memory"}}\n\n', 200, "out of memory"),
        ("data: {\n\n", 200, "not in OpenAI's form"),
        ("data: [1]\n\n", 200, "not in OpenAI's form"),
        ('data: {"choices": 3}\n\n', 200, "not in OpenAI's form"),
    ],
)
def test_what_is_wrong_is_an_error_and_the_question_is_forgotten(server, text, status, says):
    conversation = Conversation(server(text, status), SETTINGS)

    with pytest.raises(errors.TinkexError, match=says):
        list(conversation.ask("Hello"))
    assert [] == conversation.messages


def test_a_server_that_is_not_there_is_named():
    url = f"http://127.0.0.1:{free_port()}/v1"

    with pytest.raises(errors.APIConnectionError, match=f"{url}/chat/completions does not answer"):
        list(OpenAIServer(url, "", "m").pieces(HELLO, SETTINGS))


def test_our_own_server_is_one(tmp_path):
    with LocalServer(tmp_path, engine=FakeEngine) as server:
        speaker = OpenAIServer(f"{server.url}/v1", "", "tiny")
        pieces = list(speaker.pieces(HELLO, SETTINGS))

    assert "".join(pieces) == speaker.message["content"] != ""
