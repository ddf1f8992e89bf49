"""`/anthropic/api/v1/messages`: conversations in Anthropic's form."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.responses import Response

from tinkex.server.http_errors import Refusal, shown
from tinkex.server.openai.chat import MOST_STOPS, AnswerText, Chat, delta_of, read_chat
from tinkex.server.openai.events import event, named_event_stream
from tinkex.server.openai.fields import Fields
from tinkex.server.openai.generation import Collected, Generation, Piece, collect
from tinkex.server.request_context import Call, reply

_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(refusal: Refusal) -> dict[str, Any]:
    kind = _ERRORS.get(refusal.status) or (
        "invalid_request_error" if refusal.status < 500 else "api_error"
    )
    return {"type": "error", "error": {"type": kind, "message": refusal.sentence}}


def refuse(refusal: Refusal) -> Response:
    return reply(error_body(refusal), refusal.status, refusal.headers)


async def messages(call: Call) -> Response:
    fields = Fields(await call.read_json())
    fields.needed("max_tokens")
    chat = await _chat(call, fields)
    name = f"msg_{uuid.uuid4().hex[:24]}"
    if fields.flag("stream"):
        generation = chat.generation(call)
        pieces = generation.pieces()
        first = await pieces.__anext__()  # an error can still be sent as a status here
        return named_event_stream(_stream(chat, generation, name, first, pieces))
    generation = chat.generation(call)
    [sequence] = await collect(generation, 1)
    message = chat.message(sequence)
    return reply(
        {
            **_head(chat, name),
            "content": _blocks(message),
            **_ending(sequence, message),
            "usage": _usage(chat, generation),
        }
    )


async def count_tokens(call: Call) -> Response:
    chat = await _chat(call, Fields(await call.read_json()))
    return reply({"input_tokens": len(chat.prompt.tokens)})


async def _chat(call: Call, fields: Fields) -> Chat:
    kind = Fields(fields.get("tool_choice", {})).get("type", "auto")
    if kind not in ("auto", "none"):
        raise Refusal(400, f'tool_choice {shown(kind)} is not supported here; use "auto".')
    tools = [] if kind == "none" else [_tool(tool) for tool in fields.objects("tools")]
    return await read_chat(
        call,
        fields,
        messages=[*_system(fields), *_conversation(fields.objects("messages"))],
        tools=tools,
        max_tokens=fields.integer("max_tokens", None, 1, call.site.limits.max_tokens),
        stops=fields.strings("stop_sequences", MOST_STOPS),
    )


def _system(fields: Fields) -> list[dict[str, Any]]:
    text = _text(fields.get("system", ""), "system")
    return [{"role": "system", "content": text}] if text else []


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool in the form of chat templates."""
    described = {"description": tool["description"]} if tool.get("description") else {}
    function = {"name": tool.get("name"), **described, "parameters": tool.get("input_schema") or {}}
    return {"type": "function", "function": function}


def _conversation(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        content = row.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise Refusal(
                400,
                f"messages[{number}].content must be a string or a list of blocks, "
                f"got {shown(content)}.",
            )
        found += _messages_of(number, row.get("role"), blocks)
    return found


def _messages_of(
    number: int, role: Any, blocks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One of Anthropic's messages as ours: each tool result becomes a separate message."""
    if role not in ("user", "assistant"):
        raise Refusal(400, f"messages[{number}].role must be user or assistant, got {shown(role)}.")
    texts, thoughts, calls, results = [], [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(block.get("text"), f"messages[{number}]"))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            content = _text(block.get("content", ""), f"messages[{number}]")
            result = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}
            results.append(result)
        else:
            raise Refusal(
                400,
                f"messages[{number}] has a block of type {shown(kind)}; this model reads text, "
                "thinking, tool_use and tool_result.",
            )
    message: dict[str, Any] = {"role": role, "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if texts or calls or thoughts or not results else results


def _text(value: Any, where: str) -> str:
    """A string, or text blocks."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(block, dict) and isinstance(block.get("text"), str) for block in value
    ):
        return "".join(block["text"] for block in value)
    raise Refusal(400, f"{where} must hold a string or text blocks, got {shown(value)}.")


def _head(chat: Chat, name: str) -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "assistant", "model": chat.model.name}


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        thinking = message["reasoning_content"]
        blocks.append({"type": "thinking", "thinking": thinking, "signature": ""})
    if message.get("content"):
        blocks.append({"type": "text", "text": message["content"]})
    for call in message.get("tool_calls", ()):
        function = call["function"]
        arguments = function["arguments"]
        blocks.append(
            {
                "type": "tool_use",
                "id": f"toolu_{uuid.uuid4().hex[:24]}",
                "name": function["name"],
                "input": arguments if isinstance(arguments, dict) else {"arguments": arguments},
            }
        )
    return blocks


def _ending(sequence: Collected, message: Mapping[str, Any]) -> dict[str, Any]:
    reason = "end_turn" if sequence.finish == "stop" else "max_tokens"
    if sequence.stop_string is not None:
        reason = "stop_sequence"
    elif sequence.finish == "stop" and message.get("tool_calls"):
        reason = "tool_use"
    return {"stop_reason": reason, "stop_sequence": sequence.stop_string}


def _usage(chat: Chat, generation: Generation) -> dict[str, int]:
    return {
        "input_tokens": len(chat.prompt.tokens),
        "output_tokens": generation.completion_tokens,
    }


async def _stream(
    chat: Chat, generation: Generation, name: str, first: Piece, rest: AsyncIterator[Piece]
) -> AsyncIterator[bytes]:
    """message_start, then each block as start, deltas, stop, then message_delta and _stop."""
    usage = {"input_tokens": len(chat.prompt.tokens), "output_tokens": 0}
    head = {**_head(chat, name), "content": [], "stop_reason": None, "stop_sequence": None}
    yield event({"type": "message_start", "message": {**head, "usage": usage}}, "message_start")
    blocks = _Blocks()
    sequence = Collected()
    answer = AnswerText(opened=chat.prompt.text.rstrip().endswith("<think>"))
    try:
        async for piece in _chained(first, rest):
            sequence.add(piece)
            if chat.is_parsed_whole:
                continue
            delta = delta_of(answer, piece)
            for part in blocks.add("thinking", delta.get("reasoning_content", "")):
                yield part
            for part in blocks.add("text", delta.get("content", "")):
                yield part
    except Refusal as refusal:
        yield event(error_body(refusal), "error")
        return
    message = chat.message(sequence)
    if chat.is_parsed_whole:
        for block in _blocks(message):
            for part in blocks.whole(block):
                yield part
    for part in blocks.close():
        yield part
    ending = {"type": "message_delta", "delta": _ending(sequence, message)}
    yield event({**ending, "usage": _usage(chat, generation)}, "message_delta")
    yield event({"type": "message_stop"}, "message_stop")


async def _chained(first: Piece, rest: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
    yield first
    async for piece in rest:
        yield piece


class _Blocks:
    """The content blocks of a stream, one after the other."""

    def __init__(self) -> None:
        self._kind = ""
        self._index = -1

    def add(self, kind: str, text: str) -> list[bytes]:
        """Add text to a block of *kind*; begins a new block if the last one is of another kind."""
        if not text:
            return []
        events = []
        if kind != self._kind:
            empty = {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
            events += self._begin(kind, {"type": kind, **empty})
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def whole(self, block: Mapping[str, Any]) -> list[bytes]:
        if block["type"] != "tool_use":
            return self.add(block["type"], block[block["type"]])
        start = self._begin("tool_use", {**block, "input": {}})
        text = json.dumps(block["input"], ensure_ascii=False)
        events = [*start, self._delta({"type": "input_json_delta", "partial_json": text})]
        return [*events, *self.close()]

    def close(self) -> list[bytes]:
        if not self._kind:
            return []
        self._kind = ""
        stop = {"type": "content_block_stop", "index": self._index}
        return [event(stop, "content_block_stop")]

    def _begin(self, kind: str, block: Mapping[str, Any]) -> list[bytes]:
        events = self.close()
        self._index, self._kind = self._index + 1, kind
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*events, event(start, "content_block_start")]

    def _delta(self, delta: Mapping[str, Any]) -> bytes:
        payload = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return event(payload, "content_block_delta")
