"""Training data: JSONL lines -> checked records -> tokens and weights -> batches.

Reads a file, renders what it says with a tokenizer that it is handed, and decides which example
goes in which batch. All of it is a pure function of the file, the tokenizer and a few numbers,
which is what makes a resumed run the same run. Knows nothing of servers, models or clients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Union

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types

#: Bad lines that a message lists; the rest are counted.
MAX_BAD_LINES_SHOWN = 20
#: Most tokens of a plain text that serve as its prompt; otherwise a quarter of them do.
MAX_TEXT_PROMPT = 32

Tokenizer = Any  # encode, decode, bos_token_id, eos_token_id, chat_template, apply_chat_template


# What a file says


@attrs.frozen
class Chat:
    """A conversation; the assistant's turns count. Messages are {"role", "content"} dicts."""

    messages: tuple[dict[str, str], ...]


@attrs.frozen
class Completion:
    """A prompt and what should follow it; the completion counts."""

    prompt: str
    completion: str


@attrs.frozen
class Text:
    """Plain text; all of it counts."""

    text: str


Record = Union[Chat, Completion, Text]


@attrs.frozen
class BadLine:
    """A line that is no record: its number, from 1, and the reason."""

    number: int
    reason: str


@attrs.frozen
class DataFile:
    """What a JSONL file holds.

    Attributes:
        records: the good lines, in the file's order.
        bad: the others, but for blank ones.
        sha256: of the bytes of the file.
    """

    path: Path
    records: list[Record] = attrs.field(repr=False)
    bad: list[BadLine]
    sha256: str


def read(path: Path, skip_bad_lines: bool = False) -> DataFile:
    """
    Read and check a JSONL file, one object a line: messages, prompt + completion, or text.

    Args:
        skip_bad_lines: leave bad lines out instead of raising.

    Raises:
        ValueError: If lines are bad, each (of the first 20) named with its reason; or none is good.
        OSError: If the file cannot be read.
    """
    content = Path(path).read_bytes()
    records: list[Record] = []
    bad: list[BadLine] = []
    # By newline only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line))
        except ValueError as exc:
            bad.append(BadLine(number, str(exc)))
    if bad and not skip_bad_lines:
        raise ValueError(_describe(path, bad) + "\nMend them, or leave them out: --skip-bad-lines.")
    if not records:
        raise ValueError(
            f"{path} holds no training example. {_describe(path, bad) if bad else 'It is empty.'}"
        )
    return DataFile(Path(path), records, bad, hashlib.sha256(content).hexdigest())


def _describe(path: Path, bad: Sequence[BadLine]) -> str:
    lines = [f"{path} has {len(bad)} bad line{'s' if len(bad) > 1 else ''}:"]
    lines += [f"  line {line.number}: {line.reason}" for line in bad[:MAX_BAD_LINES_SHOWN]]
    if len(bad) > MAX_BAD_LINES_SHOWN:
        lines.append(f"  ... and {len(bad) - MAX_BAD_LINES_SHOWN} more")
    return "\n".join(lines)


def _parse(line: bytes) -> Record:
    """One line's record. ValueError says what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise ValueError(f"not UTF-8 (byte {exc.start} of the line)") from exc
    except json.JSONDecodeError as exc:
        raise ValueError(f"not JSON: {exc.msg} (column {exc.colno})") from exc
    except RecursionError as exc:
        raise ValueError("not JSON that makes sense: nested too deeply") from exc
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {_kind(value)}, not an object")
    kinds = [keys for keys in _PARSERS if set(keys) <= set(value)]
    if len(kinds) != 1:
        found = " and ".join("/".join(k) for k in kinds) or ", ".join(map(repr, value)) or "no keys"
        raise ValueError(
            f'has {found}; needs "messages", or "prompt" and "completion", or "text"'
            + (", only one of these" if kinds else "")
        )
    return _PARSERS[kinds[0]](value)


def _parse_chat(value: Mapping[str, Any]) -> Chat:
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list that is not empty")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is a JSON {_kind(message)}, not an object")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(
                    f"message {i}: {key} must be a string, got {_kind(message.get(key))}"
                )
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise ValueError("no message of role 'assistant' that says something: nothing to learn")
    return Chat(tuple({"role": m["role"], "content": m["content"]} for m in messages))


def _parse_completion(value: Mapping[str, Any]) -> Completion:
    for key in ("prompt", "completion"):
        if not isinstance(value[key], str):
            raise ValueError(f"{key} must be a string, got {_kind(value[key])}")
    if not value["completion"]:
        raise ValueError("completion is empty: nothing to learn")
    return Completion(value["prompt"], value["completion"])


def _parse_text(value: Mapping[str, Any]) -> Text:
    if not isinstance(value["text"], str):
        raise ValueError(f"text must be a string, got {_kind(value['text'])}")
    if not value["text"]:
        raise ValueError("text is empty: nothing to learn")
    return Text(value["text"])


_PARSERS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Record]] = {
    ("messages",): _parse_chat,
    ("prompt", "completion"): _parse_completion,
    ("text",): _parse_text,
}


def _kind(value: object) -> str:
    """What JSON calls the type of *value*."""
    if value is None:
        return "null"
    names = {dict: "object", list: "list", str: "string", bool: "boolean"}
    return names.get(type(value), "number")


# What a model reads


@attrs.frozen(eq=False)
class Example:
    """A rendered record.

    Attributes:
        tokens: (T,) int64, T >= 2.
        counted: (T,) float32; 1 where predicting the token counts, 0 where not. The first is 0:
            nothing comes before it.
        prompt_length: tokens to show a model that shall say the rest; at least 1.
    """

    tokens: npt.NDArray[np.int64]
    counted: npt.NDArray[np.float32]
    prompt_length: int

    @property
    def prompt(self) -> types.ModelInput:
        return types.ModelInput.from_ints(self.tokens[: self.prompt_length])

    def datum(self, scale: float = 1.0) -> types.Datum:
        """Targets are the tokens moved by one; each counted one weighs *scale*."""
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": self.tokens[1:],
                "weights": self.counted[1:] * np.float32(scale),
            },
        )


@attrs.frozen
class Rendered:
    """All records of a file as examples.

    Attributes:
        truncated: how many were longer than max_length.
        dropped: how many had no counted token (left), and are not in `examples`.
        partly_counted: conversations of which only the last assistant turn counts, because the
            chat template renders earlier turns differently once later ones follow.
    """

    examples: list[Example] = attrs.field(repr=False)
    truncated: int
    dropped: int
    partly_counted: int


# A piece of text, and whether it counts.
_Piece = tuple[str, bool]


def render(records: Sequence[Record], tokenizer: Tokenizer, max_length: int) -> Rendered:
    """
    Tokens and weights of every record; longer ones are cut to their first *max_length* tokens.

    Raises:
        ValueError: If no example with a counted token is left.
    """
    examples = []
    truncated = partly_counted = 0
    opening = _opening(tokenizer)
    for record in records:
        pieces, is_partly_counted = _pieces(record, tokenizer)
        tokens, counted, prompt_length = _encode(pieces, record, tokenizer, opening)
        truncated += len(tokens) > max_length
        partly_counted += is_partly_counted
        tokens, counted = tokens[:max_length], counted[:max_length]
        if counted.any():
            examples.append(Example(tokens, counted, min(prompt_length, len(tokens))))
    if not examples:
        raise ValueError(
            f"none of the {len(records)} examples has a token that counts within its first "
            f"{max_length} tokens; raise --max-length."
        )
    return Rendered(examples, truncated, len(records) - len(examples), partly_counted)


def _pieces(record: Record, tokenizer: Tokenizer) -> tuple[list[_Piece], bool]:
    """A record's text in pieces; and whether assistant turns had to be left uncounted."""
    if isinstance(record, Text):
        return [(record.text, True)], False
    if isinstance(record, Completion):
        return [(record.prompt, False), (record.completion, True)], False
    if tokenizer.chat_template is None:
        return _plain_chat(record.messages), False
    return _template_chat(record.messages, tokenizer)


def _plain_chat(messages: Sequence[Mapping[str, str]]) -> list[_Piece]:
    """For tokenizers without a chat template: "User: ...", "Assistant: ...", a line each."""
    pieces: list[_Piece] = []
    for message in messages:
        name, is_counted = message["role"].capitalize(), message["role"] == "assistant"
        pieces += [(f"{name}:", False), (f" {message['content']}\n", is_counted)]
    return pieces


def chat_prompt(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """The text of a conversation up to where the assistant begins to speak."""
    if tokenizer.chat_template is not None:
        text: str = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)
        return text
    return "".join(text for text, _ in _plain_chat(messages)) + "Assistant:"


def encode_prompt(text: str, tokenizer: Tokenizer, is_template: bool = False) -> list[int]:
    """The tokens of a prompt as training had them; *is_template* if a chat template wrote it."""
    opening = [] if is_template else _opening(tokenizer)
    return [*opening, *tokenizer.encode(text, add_special_tokens=False)]


def _template_chat(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer
) -> tuple[list[_Piece], bool]:
    """
    The template's own text, cut where assistant turns begin and end.

    A turn is what rendering up to and with it adds to rendering up to it with the generation
    prompt. A template that takes back what it said before (drops the reasoning of earlier turns,
    say) makes that false for all turns but the last, which then alone counts.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    whole = tokenizer.apply_chat_template(list(messages))
    spans = []
    for i in turns:
        before = chat_prompt(messages[:i], tokenizer)
        upto = tokenizer.apply_chat_template(list(messages[: i + 1]))
        if whole.startswith(upto) and upto.startswith(before):
            spans.append((len(before), len(upto)))
    pieces: list[_Piece] = []
    end = 0
    for start, stop in spans:
        pieces += [(whole[end:start], False), (whole[start:stop], True)]
        end = stop
    return [*pieces, (whole[end:], False)], len(spans) < len(turns)


def _encode(
    pieces: Sequence[_Piece], record: Record, tokenizer: Tokenizer, opening: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], int]:
    """
    Tokens, what counts, and where the last counted piece begins.

    Each piece is encoded on its own, so that a prompt has the tokens it will have when the model
    is asked. What is not rendered by a chat template begins with the tokenizer's own beginning
    of text (if it adds one) and ends with its end of text, which counts if what it ends does.
    """
    is_template = isinstance(record, Chat) and tokenizer.chat_template is not None
    tokens: list[int] = [] if is_template else [*opening]
    counted = [False] * len(tokens)
    prompt_length = 0
    for text, is_counted in pieces:
        if not text:
            continue
        piece = tokenizer.encode(text, add_special_tokens=False)
        if is_counted:
            prompt_length = len(tokens)
        tokens += piece
        counted += [is_counted] * len(piece)
    if not is_template and tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)
        counted.append(pieces[-1][1])
    if isinstance(record, Text):
        prompt_length = len(opening) + min(len(tokens) // 4, MAX_TEXT_PROMPT)
    weights = np.asarray(counted, np.float32)
    weights[:1] = 0  # nothing comes before the first token, so it cannot be predicted
    return np.asarray(tokens, np.int64), weights, max(prompt_length, 1)


def _opening(tokenizer: Tokenizer) -> list[int]:
    """The begin-of-text token, if the tokenizer puts it before any text unasked."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer.encode("")[:1] == [begin] else []


# Which example goes where


def split(count: int, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Indices of the examples to train on, and of those held out; the same for the same arguments.

    At least one is held out if *eval_fraction* > 0 and there are two.
    """
    held_out = round(count * eval_fraction)
    if eval_fraction > 0 and count >= 2:
        held_out = min(max(held_out, 1), count - 1)
    order = np.random.default_rng([seed, 0]).permutation(count)
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


@attrs.frozen
class Plan:
    """Which examples make up which step: a pure function of these numbers.

    Steps count from 1. Each epoch takes every example once, in an order of its own; its last
    batch may be smaller. *max_steps* cuts the plan short, None does not.
    """

    examples: int
    batch_size: int
    epochs: int
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.batch_size)

    @property
    def total_steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch(self, step: int) -> int:
        """The epoch of *step*, from 1."""
        return (step - 1) // self.steps_per_epoch + 1

    def batch(self, step: int) -> list[int]:
        """Positions, among the examples to train on, of those in *step*."""
        start = (step - 1) % self.steps_per_epoch * self.batch_size
        order = _epoch_order(self.examples, self.seed, self.epoch(step))
        return order[start : start + self.batch_size]


@lru_cache(maxsize=2)
def _epoch_order(examples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, 1, epoch]).permutation(examples).tolist()
    return order


def slices(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """The examples, *size* at a time."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
