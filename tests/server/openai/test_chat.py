"""Conversations in OpenAI's and in Anthropic's form, by these companies' own packages."""

from __future__ import annotations

import json
from functools import partial

import anthropic
import openai
import pytest
import requests
from safetensors.torch import save_file

import tinkex
from tinkex import types
from tinkex.engine import tiny
from tinkex.server.app import LocalServer, make_engine
from tinkex.server.openai.chat import AnswerText, Chat
from tinkex.server.openai.generation import Collected
from tinkex.server.openai.names import Model
from tinkex.text import tokenizer
from tinkex.text.renderer import Prompt

TINY = tokenizer.load("tiny")

#: As Qwen's and Hermes' templates are: tools in the system's message, calls between tags.
TEMPLATE = """\
{% if tools %}<|turn|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end_turn|>{% endif %}\
{% for m in messages %}<|turn|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content or '' }}\
{% for call in m.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|end_turn|>{% endfor %}\
{% if add_generation_prompt %}<|turn|>assistant
{% endif %}"""

TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
QUESTIONS = {
    "Who went to sea?": {"content": "The owl 🦉 and the pussycat."},
    "Think: where?": {"reasoning_content": "It is a poem.", "content": "In a pea-green boat."},
}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"city": "Rome"}}}


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The built-in model as a directory, with a template that knows tools and reasoning."""
    out = tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(out)
    save_file(tiny.weights(), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(tiny.CONFIG))
    settings = out / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "chat_template": TEMPLATE}))
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory, directory):
    home = tmp_path_factory.mktemp("home")
    with LocalServer(home, base_models=[str(directory)]) as running:
        yield running


@pytest.fixture(scope="module")
def tuned(server, directory):
    """A checkpoint that answers the questions above, with a call where there is a tool."""
    examples = [
        tinkex.render([*user(text), {"role": "assistant", **said}], tokenizer.load(str(directory)))
        for text, said in QUESTIONS.items()
    ]
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    examples.append(
        tinkex.render([*user("Find it."), called], tokenizer.load(str(directory)), [TOOL])
    )
    with tinkex.ServiceClient(base_url=server.url, api_key="tml-any") as service:
        training = service.create_lora_training_client(str(directory), rank=16)
        for step in range(120):
            training.forward_backward([e.datum() for e in examples], "cross_entropy")
            rate = 6e-3 if step < 80 else 1e-3
            training.optim_step(types.AdamParams(learning_rate=rate))
        return training.save_weights_for_sampler("chat").result().path


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(
        base_url=f"{server.url}/anthropic/api", api_key="tml-any", max_retries=0
    ) as client:
        yield client


def ask(client, model, text="Who went to sea?", **fields):
    return client.chat.completions.create(
        model=model, messages=user(text), temperature=0, max_tokens=120, **fields
    )


def test_an_answer_is_the_message_without_control_tokens(client, tuned):
    answer = ask(client, tuned)
    [choice] = answer.choices

    assert "The owl 🦉 and the pussycat." == choice.message.content
    assert ("assistant", "stop") == (choice.message.role, choice.finish_reason)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_content_parts_and_the_developer_role_are_understood(client, tuned):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who went to sea?"}]}]
    answer = client.chat.completions.create(
        model=tuned, messages=parts, temperature=0, max_completion_tokens=120
    )
    told = client.chat.completions.create(
        model=tuned, messages=[{"role": "developer", "content": "Be brief."}, *parts], max_tokens=1
    )

    assert "The owl 🦉 and the pussycat." == answer.choices[0].message.content
    assert told.usage.prompt_tokens > answer.usage.prompt_tokens


def test_reasoning_is_told_apart(client, tuned):
    message = ask(client, tuned, "Think: where?").choices[0].message

    assert "It is a poem." == message.reasoning_content
    assert "In a pea-green boat." == message.content


def test_a_stream_adds_up_to_the_message(client, tuned):
    chunks = list(ask(client, tuned, "Think: where?", stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)

    assert "It is a poem." == reasoning.strip()
    assert "In a pea-green boat." == "".join(delta.content or "" for delta in deltas)
    assert "assistant" == deltas[0].role
    assert "stop" == chunks[-1].choices[0].finish_reason
    assert len(chunks) > 5


def test_calls_of_tools_are_parsed(client, tuned):
    answer = ask(client, tuned, "Find it.", tools=[TOOL])
    [choice] = answer.choices
    [call] = choice.message.tool_calls

    assert ("find", {"city": "Rome"}) == (
        call.function.name,
        json.loads(call.function.arguments),
    )
    assert ("tool_calls", None) == (choice.finish_reason, choice.message.content)


def test_calls_come_in_a_stream_too(client, tuned):
    chunks = list(ask(client, tuned, "Find it.", tools=[TOOL], stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]

    assert [(0, "find")] == [(call.index, call.function.name) for call in calls]
    assert {"city": "Rome"} == json.loads(calls[0].function.arguments)
    assert "tool_calls" == chunks[-1].choices[0].finish_reason


def test_the_result_of_a_call_reaches_the_template(client, tuned):
    history = [
        *user("Find it."),
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "find", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "It is far."},
    ]
    answer = client.chat.completions.create(
        model=tuned, messages=history, tools=[TOOL], max_tokens=1
    )
    shorter = client.chat.completions.create(
        model=tuned, messages=history[:2], tools=[TOOL], max_tokens=1
    )

    assert answer.usage.prompt_tokens > shorter.usage.prompt_tokens + 5


def test_logprobs_of_an_answer_are_told_token_by_token(client, tuned):
    choice = ask(client, tuned, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content

    assert "The owl" == "".join(c.token for c in content)[:7]
    assert all(2 == len(c.top_logprobs) for c in content)
    assert all(c.logprob == pytest.approx(c.top_logprobs[0].logprob, abs=1e-4) for c in content)


def test_stop_strings_end_an_answer_beside_the_template_s_own_end(client, tuned):
    choice = ask(client, tuned, stop=[" and", "sea"]).choices[0]

    assert ("The owl 🦉", "stop") == (choice.message.content, choice.finish_reason)
    assert (
        "The owl 🦉 and the pussycat."
        == ask(client, tuned, stop="nothing").choices[0].message.content
    )


# Anthropic's form. Its package no longer has a parameter for the temperature.

COLD = {"temperature": 0}


def test_a_message_of_anthropic_s_package(claude, tuned):
    answer = claude.messages.create(
        model=tuned, max_tokens=120, extra_body=COLD, messages=user("Think: where?")
    )

    assert ["thinking", "text"] == [block.type for block in answer.content]
    assert "In a pea-green boat." == answer.content[1].text
    assert "end_turn" == answer.stop_reason
    assert answer.usage.output_tokens > 0


def test_its_stream_has_the_same_blocks(claude, tuned):
    with claude.messages.stream(
        model=tuned, max_tokens=120, extra_body=COLD, messages=user("Think: where?")
    ) as stream:
        text = "".join(stream.text_stream)
        whole = stream.get_final_message()

    assert "In a pea-green boat." == text
    assert ["thinking", "text"] == [block.type for block in whole.content]
    assert "end_turn" == whole.stop_reason


def test_its_tools_are_called_and_answered(claude, tuned):
    tool = {
        "name": "find",
        "description": "Find a place.",
        "input_schema": TOOL["function"]["parameters"],
    }
    request = {"model": tuned, "max_tokens": 120, "extra_body": COLD, "tools": [tool]}
    answer = claude.messages.create(messages=user("Find it."), **request)
    with claude.messages.stream(messages=user("Find it."), **request) as stream:
        streamed = stream.get_final_message()
    [call] = answer.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It is far."}
    history = [
        *user("Find it."),
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [result]},
    ]

    assert ("tool_use", "find", {"city": "Rome"}) == (call.type, call.name, call.input)
    assert {"city": "Rome"} == streamed.content[0].input
    assert "tool_use" == answer.stop_reason == streamed.stop_reason
    counted = claude.messages.count_tokens(model=tuned, tools=[tool], messages=history)
    fewer = claude.messages.count_tokens(model=tuned, tools=[tool], messages=history[:1])
    assert counted.input_tokens > fewer.input_tokens


def test_a_stop_sequence_is_named(claude, tuned):
    answer = claude.messages.create(
        model=tuned,
        max_tokens=120,
        extra_body=COLD,
        system="",
        stop_sequences=[" and"],
        messages=user("Who went to sea?"),
    )

    assert ("stop_sequence", " and") == (answer.stop_reason, answer.stop_sequence)
    assert "The owl 🦉" == answer.content[0].text


# What cannot be done


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "king", "content": "a"}]}, "king"),
        ({"messages": [{"role": "user", "content": 5}]}, "content"),
        ({"messages": "hello"}, "messages must be a list of objects"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        (
            {"top_logprobs": 2, "logprobs": True, "stream": True},
            "stream does not go with top_logprobs",
        ),
        ({"max_completion_tokens": 10**6 + 1}, "max_completion_tokens must be an integer from 1"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"max_completion_tokens": 0}, "max_completion_tokens must be an integer from 1"),
        ({"messages": user("<|end_turn|>")}, "<|end_turn|>"),
        ({"tools": [TOOL], "model": "tiny"}, "find"),
    ],
)
def test_what_cannot_be_done_is_refused(server, directory, fields, said):
    body = {"model": str(directory), "messages": user("a"), "max_tokens": 2, **fields}
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)

    assert 400 == answer.status_code, answer.text
    assert said in answer.json()["error"]["message"]


def test_anthropic_s_clients_get_their_own_form_of_errors(claude, server):
    with pytest.raises(anthropic.NotFoundError, match="there is no checkpoint"):
        claude.messages.create(
            model="tinker://a:train:0/sampler_weights/b", max_tokens=1, messages=user("a")
        )
    body = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "system", "content": "a"}]}
    answer = requests.post(f"{server.url}/anthropic/api/v1/messages", json=body, timeout=30)

    assert ("error", "invalid_request_error") == (
        answer.json()["type"],
        answer.json()["error"]["type"],
    )


@pytest.mark.parametrize(
    "pieces, opened, expected",
    [
        (["<th", "ink>a", "b</thi", "nk>\n\nc", "d"], False, ("ab", "cd")),
        (["ab</think>c"], True, ("ab", "c")),
        (["no ", "<think> here"], False, ("", "no <think> here")),
        (["\n<think>a</think>b"], False, ("a", "b")),
        (["<thi"], False, ("", "<thi")),
        (["cut off"], True, ("cut off", "")),
    ],
)
def test_reasoning_is_split_off_at_any_cut(pieces, opened, expected):
    answer = AnswerText(opened=opened)
    parts = [answer.push(piece, final=i == len(pieces) - 1) for i, piece in enumerate(pieces)]

    assert expected == tuple("".join(side) for side in zip(*parts))


def test_a_server_of_weights_of_8_bits_answers_but_trains_nothing(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    with LocalServer(tmp_path / "home", engine=partial(make_engine, "int8")) as running:
        answer = requests.post(
            f"{running.url}/v1/chat/completions",
            json={"model": "tiny", "messages": messages, "max_tokens": 3, "temperature": 0},
        )
        with (
            tinkex.ServiceClient(base_url=running.url, api_key="tml-any") as service,
            pytest.raises(tinkex.TinkexError, match=r"trains no model: its weights are int8"),
        ):
            service.create_lora_training_client("tiny")

    assert (200, 3) == (answer.status_code, answer.json()["usage"]["completion_tokens"])


def _chat(prompt, *, has_tools=False):
    model = Model("m", None, TINY)
    return Chat(model, Prompt([1], prompt, []), types.SamplingParams(), 1, (), has_tools)


def _collected(text, finish="stop"):
    return Collected(text=text, tokens=TINY.encode(text), finish=finish)


def test_an_answer_that_ends_within_its_reasoning_has_no_content():
    """Half a thought would be shown as the answer."""
    message = _chat("<|turn|>assistant\n<think>\n").message(_collected("It is", "length"))

    assert ("", "It is") == (message["content"], message["reasoning_content"])


def test_an_answer_whose_reasoning_the_prompt_has_opened_is_split_at_its_end():
    message = _chat("<think>").message(_collected("a poem.</think>\n\nIn a boat."))

    assert ("In a boat.", "a poem.") == (message["content"].strip(), message["reasoning_content"])


def test_what_looks_like_a_call_is_text_where_no_tools_were_offered():
    """A client that offers none does not look for calls: it would get an empty answer."""
    text = '<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>'

    assert text == _chat("").message(_collected(text))["content"]
    assert _chat("", has_tools=True).message(_collected(text))["tool_calls"]
