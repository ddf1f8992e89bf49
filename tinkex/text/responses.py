"""Parses a model's answer into a message: text, reasoning and tool calls.

Each family of models has its own notation for calls and reasoning; the ones below are recognised by
their markers. Anything else stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tinkex.text.renderer import Renderer

#: {"name": ..., "arguments": ...}: the form of calls of Hermes, Qwen, SmolLM3 and Granite.
_TAGGED_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
#: Mistral's list of calls; since 2025 name and arguments.
_MISTRAL_CALLS = re.compile(r"\[TOOL_CALLS\]\s*(\[.*\])\s*$", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\](\{[^\[]*\})")
#: DeepSeek's.
_DEEPSEEK_CALL = re.compile(
    r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([\w.-]+)\s*```json\s*(\{.*?\})\s*```"
    r"|([\w.-]+)<｜tool▁sep｜>(\{.*?\}))\s*<｜tool▁call▁end｜>",
    re.DOTALL,
)
_DEEPSEEK_BLOCK = re.compile(r"<｜tool▁calls▁begin｜>.*", re.DOTALL)
#: A message of gpt-oss: channel, perhaps a recipient, text.
_HARMONY = re.compile(
    r"<\|channel\|>(\w+)([^<]*)(?:<\|constrain\|>\w+)?\s*<\|message\|>(.*?)"
    r"(?=<\|end\|>|<\|return\|>|<\|call\|>|<\|start\|>|$)",
    re.DOTALL,
)


def parse_response(
    tokens: Sequence[int] | np.ndarray, tokenizer: Any, *, stop: Sequence[Any] | None = None
) -> dict[str, Any]:
    """
    Parse sampled tokens into a message.

    Args:
        tokens: of a `SampledSequence`.
        tokenizer: the prompt's tokenizer.
        stop: the stop tokens or strings; None is the `stop` of `render_prompt`.

    Returns:
        {"role": "assistant", "content": ...}; with "reasoning_content" if the model reasoned, and
        "tool_calls" (OpenAI's form, arguments as an object) if it called tools.
    """
    renderer = Renderer(tokenizer)
    ends = list(renderer.stop if stop is None else stop)
    ids = [int(i) for i in tokens]
    while ids and ids[-1] in ends:
        ids.pop()
    text: str = renderer.tokenizer.decode(ids)
    for end in ends:
        if isinstance(end, str):
            text = text.removesuffix(end)
    return parse_text(text, getattr(renderer.tokenizer, "control_tokens", ()))


def parse_text(text: str, control_tokens: Iterable[str] = ()) -> dict[str, Any]:
    """The same for text; *control_tokens* are removed from the content."""
    if "<|channel|>" in text:
        return _harmony(text)
    message: dict[str, Any] = {"role": "assistant"}
    before, closed, after = text.partition("</think>")
    if closed:  # the prompt may have opened it
        message["reasoning_content"] = before.rpartition("<think>")[2].strip()
        text = after
    text, calls = _calls(text)
    for token in control_tokens:
        text = text.replace(token, "")
    message["content"] = text.strip()
    if calls:
        message["tool_calls"] = calls
    return message


def _harmony(text: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for channel, recipient, said in _HARMONY.findall(text):
        called = re.search(r"to=functions\.([\w.-]+)", recipient)
        if called:
            calls += _call(called[1], said)
        elif channel == "analysis":
            message["reasoning_content"] = said.strip()
        else:
            message["content"] += said
    if calls:
        message["tool_calls"] = calls
    return message


def _calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text without its calls, and the calls."""
    found: list[dict[str, Any]] = []
    for match in _TAGGED_CALL.finditer(text):
        found += _call_of(match[1])
    if found:
        return _TAGGED_CALL.sub("", text), found
    whole = _MISTRAL_CALLS.search(text)
    if whole:
        for value in _json(whole[1]) or []:
            found += _call_of(value)
        return (text[: whole.start()], found) if found else (text, [])
    for match in _MISTRAL_CALL.finditer(text):
        found += _call(match[1], match[2])
    if found:
        return text[: text.index("[TOOL_CALLS]")], found
    for match in _DEEPSEEK_CALL.finditer(text):
        found += _call(match[1] or match[3], match[2] or match[4])
    if found:
        return _DEEPSEEK_BLOCK.sub("", text), found
    bare = text.replace("<|python_tag|>", "").strip()  # Llama 3.1
    return ("", found) if bare[:1] == "{" and (found := _call_of(bare)) else (text, [])


def _call_of(value: Any) -> list[dict[str, Any]]:
    """{"name", "arguments"} as a list of one call; empty for other values."""
    value = _json(value) if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return []
    arguments = value.get("arguments", value.get("parameters"))
    return [] if arguments is None else _call(value["name"], arguments)


def _call(name: str, arguments: Any) -> list[dict[str, Any]]:
    value = _json(arguments) if isinstance(arguments, str) else arguments
    function = {"name": name, "arguments": arguments if value is None else value}
    return [{"type": "function", "function": function}]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
