"""`/v1/chat/completions`, and the conversations that it shares with `/anthropic/.../messages`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import attrs
from starlette.responses import Response

from tinkex import types
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.openai.events import event_stream
from tinkex.server.openai.fields import Fields
from tinkex.server.openai.generation import Collected, Generation, Piece, collect, token_text
from tinkex.server.openai.names import Model, find_model
from tinkex.server.request_context import Call, reply
from tinkex.text.renderer import Prompt, render_prompt
from tinkex.text.responses import parse_response, parse_text
from tinkex.text.streaming import StopStrings

MOST_LOGPROBS = 20
MOST_STOPS = 64
ROLES = ("system", "developer", "user", "assistant", "tool")
#: A template with this mark (gpt-oss) separates reasoning and answer by control tokens.
_CHANNELS = "<|channel|>"
_THINK, _THINK_END = "<think>", "</think>"


@attrs.frozen(eq=False)
class Chat:
    """A conversation, ready to be continued.

    Attributes:
        stops: the caller's stop strings, and the template's if it ends turns with text.
        has_tools: True if answers are searched for tool calls.
    """

    model: Model
    prompt: Prompt
    params: types.SamplingParams
    count: int
    stops: tuple[str, ...]
    has_tools: bool
    top_logprobs: int = 0

    @property
    def is_parsed_whole(self) -> bool:
        """True if an answer can be parsed only when it is complete."""
        template = getattr(self.model.tokenizer, "chat_template", None) or ""
        return self.has_tools or _CHANNELS in template

    def generation(self, call: Call) -> Generation:
        request = types.SampleRequest(
            prompt=self.prompt.model_input,
            sampling_params=self.params,
            num_samples=self.count,
            topk_sample_logprobs=self.top_logprobs,
        )
        return Generation(
            call, self.model, request, self.stops, needs_response=self.top_logprobs > 0
        )

    def message(self, sequence: Collected) -> dict[str, Any]:
        """A sequence as a message: content, and reasoning_content and tool_calls if any."""
        opened = _THINK if self.prompt.text.rstrip().endswith(_THINK) else ""
        if sequence.stop_string is None and self.is_parsed_whole:
            message = parse_response(
                sequence.tokens, self.model.tokenizer, stop=list(self.prompt.stop)
            )
        else:
            message = parse_text(opened + sequence.text)
        if opened and sequence.finish == "length" and _THINK_END not in sequence.text:
            message = {"role": "assistant", "content": "", "reasoning_content": sequence.text}
        if not self.has_tools and message.pop("tool_calls", None):
            message["content"] = sequence.text  # no tools were offered: it is text
        return message


async def read_chat(
    call: Call,
    fields: Fields,
    *,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    max_tokens: int | None,
    stops: Sequence[str],
    count: int = 1,
    top_logprobs: int = 0,
) -> Chat:
    """
    Find the model and render the conversation with its template.

    Raises:
        Refusal: 400 with the template's reason if it does not accept the conversation.
    """
    if not messages:
        raise Refusal(400, "messages is empty; give at least one.")
    model = await find_model(call, fields.text("model"))
    try:
        prompt: Prompt = await call.site.in_pool(
            render_prompt, list(messages), model.tokenizer, list(tools) or None
        )
    except (ValueError, TypeError) as exc:
        raise Refusal(400, f"the messages cannot be rendered for this model: {exc}") from exc
    ids = [stop for stop in prompt.stop if isinstance(stop, int)]
    texts = [stop for stop in prompt.stop if isinstance(stop, str)]
    params = fields.sampling(max_tokens, ids or None)
    return Chat(model, prompt, params, count, (*stops, *texts), bool(tools), top_logprobs)


class AnswerText:
    """
    Splits text that arrives in pieces into reasoning and answer, at <think> and </think>.

    Args:
        opened: True if the prompt ends with an opened <think>.
    """

    def __init__(self, *, opened: bool) -> None:
        self._opening = None if opened else StopStrings([_THINK])
        self._closing = StopStrings([_THINK_END])
        self._reasoning = opened
        self._began = False
        self._skips = False  # blank lines between the reasoning and the answer

    def push(self, text: str, *, final: bool = False) -> tuple[str, str]:
        """The new text of (reasoning, answer)."""
        reasoning = answer = ""
        if not self._reasoning and self._opening is not None:
            answer, text = self._before_opening(text, final)
        if self._reasoning:
            reasoning = self._closing.push(text)
            if self._closing.found:
                self._reasoning, self._skips = False, True
                answer += self._closing.rest
            elif final:
                reasoning += self._closing.finish()
        elif self._opening is None:
            answer += text
        if self._skips:
            answer = answer.lstrip("\n")
            self._skips = not answer
        return reasoning, answer

    def _before_opening(self, text: str, final: bool) -> tuple[str, str]:
        """Reasoning can open only at the beginning of an answer."""
        opening = self._opening
        if opening is None:
            return "", text
        passed = opening.push(text)
        if opening.found and not self._began and not passed.strip():
            self._opening, self._reasoning = None, True
            return "", opening.rest
        self._began = self._began or bool(passed.strip())
        if opening.found or self._began or final:
            self._opening = None
            held = opening.found + opening.rest if opening.found else opening.finish()
            return passed + held, ""
        return passed, ""


# OpenAI's form


async def chat_completions(call: Call) -> Response:
    fields = Fields(await call.read_json())
    stream, wants_logprobs = fields.flag("stream"), fields.flag("logprobs")
    top_logprobs = fields.integer("top_logprobs", 0, 0, MOST_LOGPROBS) or 0
    _refuse_what_is_not_there(fields)
    if top_logprobs and not wants_logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true.")
    if stream and top_logprobs:
        raise Refusal(400, "stream does not go with top_logprobs; omit one of them.")
    limits = call.site.limits
    tools = [] if fields.get("tool_choice") == "none" else fields.objects("tools")
    longest = fields.integer("max_tokens", None, 1, limits.max_tokens)
    chat = await read_chat(
        call,
        fields,
        messages=[_known_role(message) for message in fields.objects("messages")],
        tools=tools,
        max_tokens=fields.integer("max_completion_tokens", longest, 1, limits.max_tokens),
        stops=fields.strings("stop", MOST_STOPS),
        count=fields.integer("n", 1, 1, limits.num_samples) or 1,
        top_logprobs=top_logprobs,
    )
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion.chunk" if stream else "chat.completion",
        "created": int(time.time()),
        "model": chat.model.name,
    }
    if stream:
        options = Fields(fields.get("stream_options", {}))
        include_usage = options.flag("include_usage")
        return await event_stream(_stream(call, chat, head, wants_logprobs, include_usage))
    generation = chat.generation(call)
    sequences = await collect(generation, chat.count)
    choices = [
        {
            "index": index,
            "message": openai_message(chat.message(sequence)),
            "finish_reason": finish_reason(sequence.finish, chat.message(sequence)),
            "logprobs": _logprobs(chat, sequence, generation, index) if wants_logprobs else None,
        }
        for index, sequence in enumerate(sequences)
    ]
    return reply({**head, "choices": choices, "usage": _usage(chat, generation)})


def _refuse_what_is_not_there(fields: Fields) -> None:
    fields.refuse_unless("logit_bias", ({},), "omit it.")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.refuse_unless(name, (0,), "omit it.")
    fields.refuse_unless("tool_choice", ("auto", "none"), 'use "auto" or "none".')
    fields.refuse_unless("modalities", (["text"],), "this model writes text alone.")
    kind = Fields(fields.get("response_format", {})).get("type", "text")
    if kind != "text":
        raise Refusal(
            400,
            f"response_format {shown(kind)} is not supported here; ask for the format in the "
            "messages.",
        )


def _known_role(message: Mapping[str, Any]) -> dict[str, Any]:
    """Replace "developer", newer clients' name of "system"."""
    role = message.get("role")
    if role not in ROLES:
        raise Refusal(400, f"role must be one of {', '.join(ROLES)}, got {shown(role)}.")
    return {**message, "role": "system" if role == "developer" else role}


def openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed message in OpenAI's form: calls have ids, arguments are text, no empty content."""
    told = {"role": "assistant", "content": message["content"], **message}
    if message.get("tool_calls"):
        told["tool_calls"] = [_call(call) for call in message["tool_calls"]]
        told["content"] = message["content"] or None
    return told


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def finish_reason(finish: str, message: Mapping[str, Any]) -> str:
    return "tool_calls" if finish == "stop" and message.get("tool_calls") else finish


def _usage(chat: Chat, generation: Generation) -> dict[str, int]:
    prompt, sampled = len(chat.prompt.tokens), generation.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _logprobs(
    chat: Chat, sequence: Collected, generation: Generation, index: int
) -> dict[str, Any]:
    count = len(sequence.tokens)
    rows: Sequence[Sequence[tuple[int, float]] | None] = [None] * count
    if generation.response is not None:
        rows = generation.response.sequences[index].topk_logprobs or rows
    return {
        "content": [
            {
                **_token(chat, token, logprob),
                "top_logprobs": [_token(chat, *pair) for pair in row or ()],
            }
            for token, logprob, row in zip(sequence.tokens, sequence.logprobs, rows)
        ]
    }


def _token(chat: Chat, token: int, logprob: float) -> dict[str, Any]:
    text = token_text(chat.model.tokenizer, token)
    is_whole = not text.startswith("token_id:")
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}


async def _stream(
    call: Call, chat: Chat, head: dict[str, Any], wants_logprobs: bool, include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    generation = chat.generation(call)
    opened = chat.prompt.text.rstrip().endswith(_THINK)
    answers = [AnswerText(opened=opened) for _ in range(chat.count)]
    collected = [Collected() for _ in range(chat.count)]

    def chunk(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
        return {**head, "choices": [{**choice, **fields}]}

    begun: set[int] = set()
    async for piece in generation.pieces():
        index, sequence = piece.index, collected[piece.index]
        sequence.add(piece)
        delta = {} if chat.is_parsed_whole else delta_of(answers[index], piece)
        if chat.is_parsed_whole and piece.finish:
            delta = openai_message(chat.message(sequence))
            for number, own in enumerate(delta.get("tool_calls", ())):
                own["index"] = number
        logprobs = None
        if wants_logprobs and piece.tokens:
            logprobs = {
                "content": [
                    {**_token(chat, token, logprob), "top_logprobs": []}
                    for token, logprob in zip(piece.tokens, piece.logprobs)
                ]
            }
        if index not in begun and (delta or logprobs or piece.finish):
            begun.add(index)
            delta = {"role": "assistant", "content": "", **delta}
        if delta or logprobs:
            yield chunk(index, delta, logprobs=logprobs)
        if piece.finish:
            message = chat.message(sequence) if chat.has_tools else {}
            yield chunk(index, {}, finish_reason=finish_reason(piece.finish, message))
    if include_usage:
        yield {**head, "choices": [], "usage": _usage(chat, generation)}


def delta_of(answer: AnswerText, piece: Piece) -> dict[str, Any]:
    """The part of the message that a piece adds."""
    reasoning, text = answer.push(piece.text, final=piece.finish is not None)
    delta = {"reasoning_content": reasoning, "content": text}
    return {name: value for name, value in delta.items() if value}
