"""Records: checked rows of training data, in any known shape.

A row is a dict: a line of JSON, or a row of a table. Its keys determine its shape. Does not know
about files or tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import attrs

#: ShareGPT's names of roles, and the standard ones.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@attrs.frozen
class Chat:
    """A conversation; the assistant's messages are in the loss.

    Attributes:
        messages: in the form of `tinkex.render`.
        tools: JSON schemas of the functions that the assistant may call.
        where: position for error messages, such as "line 3".
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    where: str = attrs.field(default="", eq=False, repr=False)


@attrs.frozen
class Completion:
    """A prompt and its completion; the completion is in the loss."""

    prompt: str
    completion: str
    where: str = attrs.field(default="", eq=False, repr=False)


@attrs.frozen
class Text:
    """Plain text; all of it is in the loss."""

    text: str
    where: str = attrs.field(default="", eq=False, repr=False)


@attrs.frozen
class Tokens:
    """Given tokens, without a tokenizer or a template.

    Attributes:
        tokens: at least two.
        weights: of the loss, one per token; the first is ignored, since no token precedes it.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    where: str = attrs.field(default="", eq=False, repr=False)


@attrs.frozen
class Preference:
    """A prompt with a chosen and a rejected answer, as messages.

    Attributes:
        prompt: the messages before both answers; may be empty.
        tools: JSON schemas of the functions that the assistant may call.
    """

    prompt: tuple[dict[str, Any], ...]
    chosen: tuple[dict[str, Any], ...]
    rejected: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    where: str = attrs.field(default="", eq=False, repr=False)


@attrs.frozen
class Task:
    """A prompt to answer, with the values that a reward function needs.

    Attributes:
        prompt: text, or messages.
        row: the whole row.
    """

    prompt: str | tuple[dict[str, Any], ...]
    row: dict[str, Any] = attrs.field(repr=False)
    where: str = attrs.field(default="", eq=False, repr=False)

    @property
    def text(self) -> str:
        """The text of the prompt, or of its last message, for display."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content"))


Record = Union[Chat, Completion, Text, Tokens, Preference, Task]


def parse(
    row: object,
    shape: str | None = None,
    renames: Mapping[str, str] | None = None,
    where: str = "",
) -> Record:
    """
    Parse a row into a record.

    Args:
        shape: a name in `SHAPES`; None detects it from the row's keys.
        renames: expected key -> the row's key: {"prompt": "question"}.
        where: stored in the record.

    Raises:
        ValueError: With the reason, and the option that helps if there is one.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {kind_of(row)}, not an object")
    row = _renamed(row, renames or {})
    # Tables have every column in every row.
    present = {key: value for key, value in row.items() if value is not None} if row else {}
    if shape is None:
        shape = _shape_of(row, present)
    else:
        _check_keys(row, shape)
    return attrs.evolve(SHAPES[shape].parse(row), where=where)


def kind_of(value: object) -> str:
    """JSON's name of the type of *value*."""
    if value is None:
        return "null"
    names = {dict: "object", list: "list", str: "string", bool: "boolean"}
    return names.get(type(value), "number")


def _renamed(row: dict[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    missing = [old for old in renames.values() if old not in row]
    if missing:
        raise ValueError(f"has no {missing[0]!r} to map; its keys are {', '.join(map(repr, row))}")
    used = set(renames.values())
    return {
        **{key: value for key, value in row.items() if key not in used},
        **{new: row[old] for new, old in renames.items()},
    }


def _check_keys(row: Mapping[str, Any], shape: str) -> None:
    missing = [key for key in SHAPES[shape].keys if key not in row]
    if missing:
        names = ", ".join(map(repr, row)) or "none"
        raise ValueError(
            f"has no {missing[0]!r}, which --format {shape} needs; its keys are {names}"
        )


def _shape_of(row: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    for keys in (present, row):
        found = [
            name for name, shape in SHAPES.items() if shape.keys and set(shape.keys) <= set(keys)
        ]
        if found == ["prompt-completion"] and isinstance(row.get("label"), bool):
            raise ValueError(
                'has a "label" of true or false, so some completions are bad examples; keep the '
                "good ones, then --format prompt-completion"
            )
        if len(found) == 1:
            return found[0]
        if found:
            break
    if found in (["messages", "sharegpt"], ["alpaca", "text"]):
        return found[0]  # the second is the same data in another form
    if found:
        raise ValueError(
            f"has keys of {' and '.join(found)}; say which is meant: --format {found[0]}"
        )
    names = ", ".join(map(repr, row)) or "no keys"
    raise ValueError(f"has {names}; {_suggestion(row)}")


def _suggestion(row: Mapping[str, Any]) -> str:
    """Which option makes sense of a row of unknown keys."""
    for prompt, answer in (
        ("question", "answer"),
        ("question", "response"),
        ("query", "response"),
        ("query", "answer"),
        ("prompt", "response"),
        ("prompt", "answer"),
        ("prompt", "output"),
        ("instruction", "response"),
        ("input", "output"),
        ("source", "target"),
    ):
        if prompt in row and answer in row:
            return f"try --map prompt={prompt},completion={answer}"
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            if "label" in value[0] and "text" in value[0]:
                return 'axolotl\'s "segments" are not read; write them as "prompt" and "completion"'
            if "role" in value[0]:
                return f"try --map messages={key}"
            if "from" in value[0]:
                return f"try --map conversations={key}"
    for key in ("content", "body", "document", "completion"):
        if isinstance(row.get(key), str) and len(row) == 1:
            return f"try --map text={key}"
    return 'needs "messages", or "prompt" and "completion", or "text"'


# The shapes


def _parse_chat(row: Mapping[str, Any]) -> Chat:
    messages = _messages(row["messages"], "messages")
    _check_something_is_said(messages)
    return Chat(messages, _tools(row.get("tools")))


def _parse_sharegpt(row: Mapping[str, Any]) -> Chat:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("conversations must be a list that is not empty")
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"message {i} is a JSON {kind_of(turn)}, not an object")
        if "role" in turn:
            messages.append(turn)
            continue
        role = SHAREGPT_ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise ValueError(
                f"message {i}: from must be human, gpt or system, got {turn.get('from')!r}"
            )
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({**rest, "role": role, "content": turn.get("value")})
    checked = _messages(messages, "conversations")
    _check_something_is_said(checked)
    return Chat(checked, _tools(row.get("tools")))


def _parse_alpaca(row: Mapping[str, Any]) -> Chat:
    instruction, given = row["instruction"], row.get("input") or ""
    for key, value in (("instruction", instruction), ("input", given), ("output", row["output"])):
        if not isinstance(value, str):
            raise ValueError(f"{key} must be a string, got {kind_of(value)}")
    if not row["output"]:
        raise ValueError("output is empty: nothing to learn")
    messages = [
        {"role": "user", "content": f"{instruction}\n{given}" if given else instruction},
        {"role": "assistant", "content": row["output"]},
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Chat(_messages(messages, "messages"))


def _parse_completion(row: Mapping[str, Any]) -> Chat | Completion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _messages(_as_turns(prompt, "user"), "prompt")
        after = _messages(_as_turns(completion, "assistant"), "completion")
        # Only the completion is in the loss, whatever roles the prompt has.
        not_learned = tuple({**message, "trainable": False} for message in before)
        _check_something_is_said(after)
        return Chat((*not_learned, *after), _tools(row.get("tools")))
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise ValueError(f"{key} must be a string, got {kind_of(row[key])}")
    if not completion:
        raise ValueError("completion is empty: nothing to learn")
    return Completion(prompt, completion)


def _parse_text(row: Mapping[str, Any]) -> Text:
    if not isinstance(row["text"], str):
        raise ValueError(f"text must be a string, got {kind_of(row['text'])}")
    if not row["text"]:
        raise ValueError("text is empty: nothing to learn")
    return Text(row["text"])


def _parse_tokens(row: Mapping[str, Any]) -> Tokens:
    tokens, weights = row["tokens"], row.get("weights")
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of whole numbers")
    if len(tokens) < 2:
        raise ValueError("tokens must be at least two: the first only begins the text")
    if weights is None:
        weights = [0, *[1] * (len(tokens) - 1)]
    if (
        not isinstance(weights, list)
        or len(weights) != len(tokens)
        or not all(type(w) in (int, float) and math.isfinite(w) for w in weights)
    ):
        raise ValueError(f"weights must be a list of {len(tokens)} numbers, one per token")
    return Tokens(tuple(tokens), (0.0, *map(float, weights[1:])))


def _parse_preference(row: Mapping[str, Any]) -> Preference:
    chosen = _messages(_as_turns(row["chosen"], "assistant"), "chosen")
    rejected = _messages(_as_turns(row["rejected"], "assistant"), "rejected")
    if row.get("prompt"):
        prompt = _messages(_as_turns(row["prompt"], "user"), "prompt")
    else:  # each holds the whole conversation
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages:
            raise ValueError(f"{name} says nothing that the other does not")
    return Preference(prompt, chosen, rejected, _tools(row.get("tools")))


def _parse_task(row: Mapping[str, Any]) -> Task:
    if "prompt" not in row:
        names = ", ".join(map(repr, row)) or "no keys"
        raise ValueError(f'has {names}; it needs "prompt" (or --map prompt=KEY)')
    prompt = row["prompt"]
    if not isinstance(prompt, str) or prompt.lstrip().startswith("[{"):
        prompt = _messages(_as_turns(prompt, "user"), "prompt")
    if not prompt:
        raise ValueError("prompt is empty")
    return Task(prompt, dict(row))


def _parse_openai_preference(row: Mapping[str, Any]) -> Preference:
    given = row["input"]
    prompt = given.get("messages") if isinstance(given, dict) else given
    return _parse_preference(
        {
            "prompt": prompt,
            "chosen": row["preferred_output"],
            "rejected": row["non_preferred_output"],
            "tools": given.get("tools") if isinstance(given, dict) else None,
        }
    )


@attrs.frozen
class Shape:
    """A shape of rows: the keys by which it is detected, and its parser.

    A shape without keys is used only if it is named explicitly.
    """

    keys: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Record]


SHAPES: dict[str, Shape] = {
    "messages": Shape(("messages",), _parse_chat),
    "sharegpt": Shape(("conversations",), _parse_sharegpt),
    "alpaca": Shape(("instruction", "output"), _parse_alpaca),
    "preference": Shape(("chosen", "rejected"), _parse_preference),
    "openai-preference": Shape(
        ("input", "preferred_output", "non_preferred_output"), _parse_openai_preference
    ),
    "prompt-completion": Shape(("prompt", "completion"), _parse_completion),
    "text": Shape(("text",), _parse_text),
    "tokens": Shape(("tokens",), _parse_tokens),
    "task": Shape((), _parse_task),
}


# Messages


def _as_turns(value: Any, role: str) -> Any:
    """Turn a text into a list of one message of *role*, and a message into a list."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [value] if isinstance(value, dict) else value


def _messages(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:  # CSV holds messages as JSON
            value = json.loads(value)
        except ValueError as exc:
            raise ValueError(f"{name} is a string that is not JSON: {exc}") from exc
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list that is not empty")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is a JSON {kind_of(message)}, not an object")
        if not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i}: role must be a string, got {kind_of(message.get('role'))}"
            )
        _check_content(i, message)
        _check_calls(i, message)
    return tuple(value)


def _check_content(i: int, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else kind_of(part)
                raise ValueError(
                    f"message {i}: content has a part of type {kind!r}; only text can be trained on"
                )
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"message {i}: content must be a string, got {kind_of(content)}")
    for key in ("weight", "trainable"):
        if message.get(key) is not None and message[key] not in (0, 1):
            raise ValueError(f"message {i}: {key} must be 0 or 1, got {message[key]!r}")


def _check_calls(i: int, message: Mapping[str, Any]) -> None:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"message {i}: tool_calls must be a list, got {kind_of(calls)}")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"message {i}: a tool call has no name of a function")


def _check_something_is_said(messages: Sequence[Mapping[str, Any]]) -> None:
    for message in messages:
        counts = message["role"] == "assistant"
        for key in ("weight", "trainable"):
            if message.get(key) is not None:
                counts = bool(message[key])
        if counts and (message.get("content") or message.get("tool_calls")):
            return
    raise ValueError("no message of role 'assistant' that says something: nothing to learn")


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):
        try:  # some data sets hold the schemas as JSON in a string
            value = json.loads(value)
        except ValueError as exc:
            raise ValueError(f"tools is a string that is not JSON: {exc}") from exc
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("tools must be a list of objects")
    return tuple(value)
