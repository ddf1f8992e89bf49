"""Checks messages, and normalizes them to the form of chat templates.

Does not know about tokens or templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

TrainOn = Literal["assistant", "last", "all"]
Message = Mapping[str, Any]

#: Keys of a message that hold reasoning, in transformers' order of precedence.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
#: Keys that decide whether a message is in the loss. Not passed to templates.
WEIGHT_KEYS = ("weight", "trainable")


@attrs.frozen
class Conversation:
    """Checked messages, in the form of chat templates.

    Attributes:
        counts: whether each message is in the loss.
        texts: cache of renderings, by the number of messages and whether a generation prompt
            follows. Shared with the conversations of `up_to` and `before`.
        is_formed: True if made by `forms`.
    """

    messages: list[dict[str, Any]]
    tools: list[Mapping[str, Any]] | None
    train_on: TrainOn
    counts: tuple[bool, ...]
    texts: dict[tuple[int, bool], Any] = attrs.field(factory=dict, eq=False, repr=False)
    is_formed: bool = False

    @classmethod
    def of(cls, messages: Any, tools: Any, train_on: TrainOn) -> Conversation:
        if train_on not in ("assistant", "last", "all"):
            raise ValueError(f"train_on must be 'assistant', 'last' or 'all', got {train_on!r}.")
        rows = as_messages(messages)
        return cls(
            [_for_template(i, message) for i, message in enumerate(rows)],
            check_tools(tools),
            train_on,
            _counts(rows, train_on),
        )

    @property
    def counting(self) -> list[int]:
        return [i for i, counts in enumerate(self.counts) if counts]

    @property
    def has_calls(self) -> bool:
        return bool(self.tools) or any("tool_calls" in message for message in self.messages)

    @property
    def has_results(self) -> bool:
        return any(message["role"] == "tool" for message in self.messages)

    def up_to(self, i: int) -> Conversation:
        """The conversation that ends with message *i*, with only that message in the loss."""
        counts = (*[False] * i, True)
        return attrs.evolve(self, messages=self.messages[: i + 1], counts=counts)

    def before(self, i: int) -> Conversation:
        return attrs.evolve(self, messages=self.messages[:i], counts=self.counts[:i])

    def forms(self) -> Iterator[Conversation]:
        """Variants: arguments of calls as objects, text; content beside calls given, null, "",
        none."""
        for arguments in (_as_object, _as_text):
            for content in ({}, {"content": None}, {"content": ""}, None):
                messages = [_form(m, arguments, content) for m in self.messages]
                yield attrs.evolve(self, messages=messages, texts={}, is_formed=True)

    def marked(self) -> tuple[Conversation, list[tuple[str, str]]]:
        """
        The conversation with a mark in every tool, call, argument and result; and the marks with
        descriptions. A text that renders all of these contains all marks.

        Searching for the names themselves is not reliable: a tool's name is in its schema and its
        calls, and an argument is often in the question, too.
        """
        marks: list[tuple[str, str]] = []

        def mark(what: str) -> str:
            marks.append((f"zq{len(marks)}zq", what))
            return marks[-1][0]

        def marked(value: Any, what: str) -> Any:
            if isinstance(value, str):
                return value + mark(what)
            if isinstance(value, Mapping):
                return {key: marked(item, what) for key, item in value.items()}
            return [marked(item, what) for item in value] if isinstance(value, list) else value

        def marked_call(call: Message, i: int) -> dict[str, Any]:
            function = dict(call.get("function") or call)
            name, arguments = function["name"], _as_object(function.get("arguments"))
            function["name"] = marked(name, f"the call of {name!r} in message {i}")
            arguments = marked(arguments, f"the arguments of {name!r} in message {i}")
            is_text = isinstance(function.get("arguments"), str)
            function["arguments"] = _as_text(arguments) if is_text else arguments
            return {**call, "function": function} if "function" in call else function

        tools: list[Mapping[str, Any]] = []
        for tool in self.tools or ():
            function = dict(tool.get("function") or tool)
            function["name"] = marked(function["name"], f"the tool {function['name']!r}")
            tools.append({**tool, "function": function} if "function" in tool else function)
        messages = []
        for i, message in enumerate(self.messages):
            found = dict(message)
            if "tool_calls" in found:
                found["tool_calls"] = [marked_call(call, i) for call in found["tool_calls"]]
            if found["role"] == "tool":
                found["content"] = marked(found.get("content"), f"the tool's message {i}")
            messages.append(found)
        return attrs.evolve(self, messages=messages, tools=tools or None, texts={}), marks

    def missing(self, text: str) -> str | None:
        """A message of a system, user or tool that *text* omits, or None."""
        for i, message in enumerate(self.messages):
            content = str(message.get("content") or "").strip()
            if message["role"] != "assistant" and content and not _says(text, content):
                return f"the {message['role']}'s message {i}"
        return None

    def reasoning_and_answer(self, i: int) -> tuple[str, str]:
        """Reasoning of message *i*, from its key or from <think> in its content; and the rest."""
        message = self.messages[i]
        content = str(message.get("content") or "")
        for key in REASONING_KEYS:
            if message.get(key):
                return str(message[key]).strip(), content.strip()
        if "</think>" in content:
            reasoning, _, answer = content.partition("</think>")
            return reasoning.rpartition("<think>")[2].strip(), answer.strip()
        return "", content.strip()

    def shows_reasoning(self, i: int, said: str) -> bool:
        if self.messages[i]["role"] != "assistant":
            return True
        return self.reasoning_and_answer(i)[0] in said


def _says(text: str, said: str) -> bool:
    """True if *text* contains *said* verbatim or JSON-escaped."""
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text


def as_messages(value: Any) -> list[dict[str, Any]]:
    """
    Messages as a list of dicts.

    Args:
        value: such a list; a DataFrame or a `datasets.Dataset` of such rows.

    Raises:
        TypeError, ValueError: If these are not messages, naming the first invalid one.
    """
    if hasattr(value, "to_dict") and hasattr(value, "columns"):  # a DataFrame
        value = [{k: v for k, v in row.items() if v == v} for row in value.to_dict("records")]
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"messages must be a list of dicts, got {type(value).__name__}.")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {i} is a {type(message).__name__}, not a dict.")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ValueError(f"message {i}: role must be a non-empty string, got {role!r}.")
        for call in _list_of(message.get("tool_calls"), f"message {i}: tool_calls"):
            _check_function(call, f"message {i}: a tool call")
        for key in REASONING_KEYS:
            if not isinstance(message.get(key), (str, type(None))):
                raise TypeError(f"message {i}: {key} must be a string, got {message[key]!r}.")
        found.append(dict(message))
    if not found:
        raise ValueError("messages is empty; give at least one message.")
    return found


def check_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """
    Schemas of functions as a list; None if there are none.

    Raises:
        TypeError, ValueError: If these are not schemas.
    """
    found = _list_of(tools, "tools")
    for tool in found:
        _check_function(tool, "a tool")
    return found or None


def _list_of(value: Any, what: str) -> list[Any]:
    """*value* as a list; [] for None."""
    if value is None:
        return []
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{what} must be a list of dicts, got {type(value).__name__}.")
    return list(value)


def _check_function(value: Any, what: str) -> None:
    """Raise unless *value* is {"function": {"name": ...}} or {"name": ...}."""
    function = value.get("function") or value if isinstance(value, Mapping) else value
    if not isinstance(function, Mapping):
        raise TypeError(f"{what} must be a dict with a function, got {value!r}.")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(f"{what} needs a name, got {value!r}.")


def _counts(messages: Sequence[Message], train_on: TrainOn) -> tuple[bool, ...]:
    """Whether each message is in the loss: by "trainable", else "weight", else the role."""
    counts = []
    for i, message in enumerate(messages):
        is_counted = message["role"] == "assistant"
        for key in WEIGHT_KEYS:
            value = message.get(key)
            if value is not None:
                if value not in (0, 1):
                    raise ValueError(f"message {i}: {key} must be 0 or 1, got {value!r}.")
                is_counted = bool(value)
        counts.append(is_counted)
    if train_on == "last" and any(counts):
        last = max(i for i, is_counted in enumerate(counts) if is_counted)
        counts = [i == last for i in range(len(counts))]
    return tuple(counts)


def _for_template(i: int, message: Message) -> dict[str, Any]:
    """Message *i* for templates: content as text, reasoning under the standard names."""
    found = {k: v for k, v in message.items() if k not in WEIGHT_KEYS}
    for key in [k for k, v in found.items() if v is None and k != "content"]:
        del found[key]  # a table column that only other rows use
    if not found.get("tool_calls"):
        found.pop("tool_calls", None)
    content = found.get("content")
    if isinstance(content, list):
        found["content"] = content = "".join(_text_of_part(i, part) for part in content)
    if content is None and "tool_calls" not in found:
        found["content"] = ""
    elif content is not None and not isinstance(content, str):
        raise TypeError(f"message {i}: content must be a string, got {type(content).__name__}.")
    reasoning = next((found[key] for key in REASONING_KEYS if found.get(key)), None)
    if reasoning is not None:
        # As in transformers: the standard name, and gpt-oss's.
        found = {"thinking": reasoning, **found, "reasoning_content": reasoning}
    return found


def _text_of_part(i: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(
        f"message {i}: content has a part of type {kind!r}; only text can be trained on"
    )


def _form(
    message: dict[str, Any], arguments: Callable[[Any], Any], content: dict[str, Any] | None
) -> dict[str, Any]:
    """*message* with its calls' arguments converted, and its content replaced if it is empty."""
    if "tool_calls" not in message:
        return message
    found = dict(message)
    if not found.get("content"):
        if content is None:
            found.pop("content", None)
        else:
            found.update(content)
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or call)
        function["arguments"] = arguments(function.get("arguments", {}))
        calls.append({**call, "function": function} if "function" in call else function)
    return {**found, "tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a message, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)
