"""Renderers: messages to tokens and weights, and a model's tokens back to a message.

The text is exactly what the model's chat template makes of the messages, and it is encoded as a
whole. Which tokens count follows from the characters that they stand for. The rules are in
docs/train.md. Does not know about files, servers or models. One subject in one module: a turn is
found by rendering, so text, places and weights are decided together.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from datetime import date as Date
from functools import cached_property
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.text import templates
from tinkex.text.messages import Conversation, Message, TrainOn, texts_of
from tinkex.text.tokenizer import Offsets, Tokenizer

#: Tokens that end an assistant's turn beside the one that the template writes.
OTHER_STOPS = ("<|eom_id|>", "<|call|>")
#: What a user says next, in a conversation of a model without a chat template.
PLAIN_STOP = "\nUser:"


@attrs.frozen
class Span:
    """Tokens *start* to *stop* (exclusive) say what counts of message number *message*."""

    message: int
    start: int
    stop: int


@attrs.frozen(eq=False)
class Rendered:
    """
    A conversation, a completion or a text as tokens.

    Attributes:
        tokens: (T,) int64.
        weights: (T,) float32; 1 where predicting the token counts, 0 where not. The first is 0:
            nothing comes before it.
        spans: where the messages that count stand.
        left_out: numbers of messages that should count but do not, because the template writes
            them differently once later messages follow. `render_turns` renders these separately.
        text: what was encoded.
    """

    tokens: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    spans: tuple[Span, ...] = ()
    left_out: tuple[int, ...] = ()
    text: str = attrs.field(default="", repr=False)

    @property
    def prompt_length(self) -> int:
        """Tokens before the last span that counts, at least 1."""
        return max(1, self.spans[-1].start if self.spans else 1)

    def datum(self) -> types.Datum:
        """The tokens without the last as input; targets and weights moved by one.

        Raises:
            ValueError: If there are fewer than two tokens.
        """
        if len(self.tokens) < 2:
            raise ValueError(
                f"{len(self.tokens)} token is too short to learn from: give a longer text."
            )
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.tokens[:-1]),
            loss_fn_inputs={"target_tokens": self.tokens[1:], "weights": self.weights[1:]},
        )


@attrs.frozen
class Prompt:
    """
    A conversation up to where the assistant begins to speak.

    Attributes:
        tokens: what to sample from.
        text: the same as text.
        stop: ends the assistant's turn: for `SamplingParams(stop=...)`. Token ids where the
            template ends a turn with a special token, texts otherwise.
    """

    tokens: list[int] = attrs.field(repr=False)
    text: str
    stop: list[int] | list[str]

    @property
    def model_input(self) -> types.ModelInput:
        return types.ModelInput.from_ints(self.tokens)


# What a script calls


def render(
    messages: Any,
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    train_on: TrainOn = "assistant",
    *,
    date: Date | None = None,
) -> Rendered:
    """
    One conversation as tokens, with the weight of each.

    Args:
        messages: a list of {"role", "content"} dicts, or rows of a DataFrame or a
            `datasets.Dataset` with these columns. "weight" (0 or 1) and "trainable" (a bool) of
            a message decide whether it counts; "reasoning_content" or "thinking", "tool_calls"
            and "tool_call_id" reach the template.
        tokenizer: from `get_tokenizer()`, or a fast tokenizer of transformers.
        tools: JSON schemas of the functions that the assistant may call.
        train_on: what counts: each message of the assistant, the last one, or every token.
        date: today, for templates that write it; None is the real date.

    Raises:
        ValueError: If the template does not accept the messages or cannot show all of them, or
            text of a message would be read as a control token.
        TypeError: If the messages are not messages.
    """
    return Renderer(tokenizer, date=date).render(messages, tools, train_on)


def render_turns(
    messages: Any,
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    train_on: TrainOn = "assistant",
    *,
    date: Date | None = None,
) -> list[Rendered]:
    """
    The same, but every message that should count does, in one rendering or another.

    Some templates write a turn differently once others follow: they drop its reasoning. Such a turn
    is rendered separately, with the conversation up to it. Most conversations give one rendering.
    """
    return Renderer(tokenizer, date=date).render_turns(messages, tools, train_on)


def render_prompt(
    messages: Any,
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    date: Date | None = None,
) -> Prompt:
    """
    A conversation as a prompt for the assistant's next message, and what ends that message.

    Raises:
        ValueError, TypeError: As `render`.
    """
    return Renderer(tokenizer, date=date).prompt(messages, tools)


def render_completion(prompt: str, completion: str, tokenizer: Any) -> Rendered:
    """
    A prompt and what follows it, encoded as one text; the completion counts.

    A token that straddles the border counts. The tokenizer's own begin-of-text and end-of-text
    tokens are added; the end counts.
    """
    return Renderer(tokenizer).completion(prompt, completion)


def render_text(text: str, tokenizer: Any) -> Rendered:
    """Plain text between the tokenizer's begin and end of text; all of it counts."""
    return Renderer(tokenizer).completion("", text)


# How it is done


@attrs.frozen
class _Turn:
    """Characters *start* to *stop* of a text say message number *message*."""

    message: int
    start: int
    stop: int


@attrs.frozen
class Draft:
    """A rendering before it is encoded: `Renderer.drafts` makes it, `Renderer.finish` ends it.

    Attributes:
        is_template: the text is a template's, which writes begin and end of text itself.
    """

    text: str
    turns: tuple[_Turn, ...]
    left_out: tuple[int, ...] = ()
    is_template: bool = True
    counts_all: bool = False


class Renderer:
    """
    Renders for one tokenizer, and keeps what is the same for all conversations.

    Args:
        date: today, for templates that write it; None is the real date.
    """

    def __init__(self, tokenizer: Any, *, date: Date | None = None) -> None:
        self.tokenizer = _as_tokenizer(tokenizer)
        self.template: str | None = getattr(self.tokenizer, "chat_template", None)
        self.date = date

    # The public functions above, for many conversations

    def render(self, messages: Any, tools: Any = None, train_on: TrainOn = "assistant") -> Rendered:
        return self.finish([self._draft(Conversation.of(messages, tools, train_on))])[0]

    def render_turns(
        self, messages: Any, tools: Any = None, train_on: TrainOn = "assistant"
    ) -> list[Rendered]:
        return self.finish(self.drafts(messages, tools, train_on))

    def prompt(self, messages: Any, tools: Any = None) -> Prompt:
        conversation = Conversation.of(messages, tools, "assistant")
        self._refuse_control_tokens(conversation)
        if self.template is None:
            text = "".join(part for part, _ in _plain_parts(conversation.messages)) + "Assistant:"
            return Prompt([*self.opening, *self._encode(text)], text, [PLAIN_STOP])
        text = self._text(self._accepted(conversation), prompted=True)
        return Prompt(self._encode(text), text, self.stop)

    def completion(self, prompt: str, completion: str) -> Rendered:
        return self.finish([self.completion_draft(prompt, completion)])[0]

    def completion_draft(self, prompt: str, completion: str) -> Draft:
        text = prompt + completion
        for name, part in (("prompt", prompt), ("completion", completion)):
            if not isinstance(part, str):
                raise TypeError(f"{name} must be a str, got {type(part).__name__}.")
        _refuse_surrogates(text)
        return Draft(text, (_Turn(0, len(prompt), len(text)),), is_template=False)

    def drafts(
        self, messages: Any, tools: Any = None, train_on: TrainOn = "assistant"
    ) -> list[Draft]:
        """All that is needed for every message that should count to count; see `finish`."""
        conversation = Conversation.of(messages, tools, train_on)
        whole = self._draft(conversation)
        drafts = [whole] if whole.turns or not whole.left_out else []
        drafts += [self._draft(conversation.up_to(i)) for i in whole.left_out]
        return drafts

    def finish(self, drafts: Sequence[Draft]) -> list[Rendered]:
        """Encode the texts (together: that is faster) and weigh their tokens."""
        if isinstance(self.tokenizer, Tokenizer):
            encoded = self.tokenizer.encode_batch_with_offsets([d.text for d in drafts])
        else:
            encoded = [self._encode_in_pieces(draft) for draft in drafts]
        return [self._weighed(draft, *pair) for draft, pair in zip(drafts, encoded)]

    # Text

    def _draft(self, conversation: Conversation) -> Draft:
        self._refuse_control_tokens(conversation)
        if self.template is None:
            return _plain_draft(conversation)
        return self._template_draft(self._accepted(conversation))

    def _text(self, conversation: Conversation, prompted: bool = False) -> str:
        return self._text_and_marks(conversation, prompted)[0]

    def _text_and_marks(
        self, conversation: Conversation, prompted: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        assert self.template is not None
        key = (len(conversation.messages), prompted)
        if key not in conversation.texts:
            conversation.texts[key] = templates.render_template(
                self.template,
                conversation.messages,
                tools=conversation.tools,
                add_generation_prompt=prompted,
                variables=self._variables,
                date=self.date,
            )
        text, marks = conversation.texts[key]
        return text, marks

    def _accepted(self, conversation: Conversation) -> Conversation:
        """The conversation in the form in which the template shows all of it.

        Templates differ in what they expect beside tool calls: content null or "", arguments as an
        object or as text. Each form is tried.

        Raises:
            ValueError: If it shows all in no form.
        """
        if not conversation.has_calls:
            return conversation
        problem: ValueError | None = None
        for form in conversation.forms():
            try:
                missing = form.missing_calls(self._text(form))
            except templates.TemplateRefusedError as exc:
                problem = problem or exc
                continue
            if not missing:
                return form
            problem = problem or ValueError(
                f"the chat template does not show {missing}; use a model whose template has a "
                "place for it"
            )
        assert problem is not None
        raise problem

    def _template_draft(self, conversation: Conversation) -> Draft:
        whole, marks = self._text_and_marks(conversation)
        missing = conversation.missing(whole)
        if missing:
            raise ValueError(f"the chat template does not show {missing}")
        if conversation.train_on == "all":
            return Draft(whole, (_Turn(len(conversation.messages) - 1, 0, len(whole)),))
        counting = conversation.counting
        assistants = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if len(marks) == len(assistants) and set(counting) <= set(assistants):
            # The template's author has said what the assistant says.
            by_message = dict(zip(assistants, marks))
            turns = [_Turn(i, *by_message[i]) for i in counting]
            if all(conversation.shows_reasoning(t.message, whole[t.start : t.stop]) for t in turns):
                return Draft(whole, tuple(turns))
        turns, left_out = [], []
        for i in counting:
            found = self._turn(conversation, i, whole)
            if found is not None:
                turns.append(found)
            elif i < len(conversation.messages) - 1:
                left_out.append(i)
            else:
                return self._reasoned_draft(conversation, whole)
        return Draft(whole, tuple(turns), tuple(left_out))

    def _turn(self, conversation: Conversation, i: int, whole: str) -> _Turn | None:
        """
        Where *whole* says message *i*, or None if it does not say it as it was said.

        A turn is what rendering up to and with it adds to rendering up to it with the generation
        prompt. Where the generation prompt says more than the template repeats in the turn
        (DeepSeek-R1's "<think>"), the turn begins where the two part.
        """
        is_last = i == len(conversation.messages) - 1
        until = whole if is_last else self._text(conversation.up_to(i))
        if not whole.startswith(until):
            return None
        start = self._start(conversation, i, until)
        if start is None or not conversation.shows_reasoning(i, until[start:]):
            return None
        stop = len(until)
        if conversation.messages[i]["role"] == "assistant" and whole.startswith(
            self._next_begins, stop
        ):
            stop += len(self._next_begins)
        return _Turn(i, start, stop)

    def _start(self, conversation: Conversation, i: int, until: str) -> int | None:
        is_assistant = conversation.messages[i]["role"] == "assistant"
        try:
            before = self._text(conversation.before(i), prompted=is_assistant)
        except templates.TemplateRefusedError:
            # Some templates cannot show the beginning alone (nothing yet, no user): then the turn
            # begins with its content.
            content = str(conversation.messages[i].get("content") or "").strip()
            found = until.rfind(content)
            return found if content and found >= 0 else None
        if until.startswith(before):
            return len(before)
        start = _shared(before, until)
        if not is_assistant or before[start:].lstrip().startswith("<think>"):
            return start
        base = self._text(conversation.before(i))
        return start if start >= len(base) else None

    def _reasoned_draft(self, conversation: Conversation, whole: str) -> Draft:
        """
        The last turn with the reasoning that its template drops but its generation prompt opens.

        That is how DeepSeek-R1's distilled models are: the prompt ends in "<think>", the model says
        its reasoning, "</think>" and the answer; as history only the answer stays.

        Raises:
            ValueError: If the generation prompt opens no reasoning, so that there is no place.
        """
        i = len(conversation.messages) - 1
        reasoning, answer = conversation.reasoning_and_answer(i)
        before = self._text(conversation.before(i), prompted=True)
        if not reasoning:
            raise ValueError(
                "the chat template begins the assistant's turn differently from its generation "
                "prompt, so the part to train on cannot be found"
            )
        opener = before.rstrip()
        start = _shared(before, whole)
        if not opener.endswith("<think>") or answer not in whole[start:]:
            raise ValueError(
                "the chat template drops the reasoning of the assistant's message "
                f"{i}; write it into the content, or use a model whose template shows it"
            )
        tail = whole[whole.rindex(answer) + len(answer) :] if answer else whole[start:]
        gap = "" if before != opener else "\n"
        text = f"{before}{gap}{reasoning}\n</think>\n\n{answer}{tail}"
        return Draft(text, (_Turn(i, len(before), len(text)),))

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """
        ValueError if text of a message would be read as a control token.

        A user who writes "<|im_end|>" would otherwise end the turn and speak for the assistant.
        """
        for i, message in enumerate(conversation.messages):
            for text in texts_of(message):
                _refuse_surrogates(text)
                found = self._control_token.search(text) if self._control_token else None
                if found is not None:
                    raise ValueError(
                        f"message {i} contains {found[0]!r}, which this tokenizer reads as a "
                        "control token; reword it"
                    )

    @cached_property
    def _control_token(self) -> re.Pattern[str] | None:
        """Matches the text of any special token."""
        special = [re.escape(t) for t in getattr(self.tokenizer, "control_tokens", {}) if t.strip()]
        return re.compile("|".join(special)) if special else None

    @cached_property
    def _variables(self) -> dict[str, str]:
        found: dict[str, str] = getattr(self.tokenizer, "special_texts", {})
        return found

    @cached_property
    def stop(self) -> list[int] | list[str]:
        """What ends the assistant's turn: token ids, or texts if the template has no token for it.

        The first special token that the template writes after what the assistant said: there, or
        at the beginning of the user's next message.
        """
        if self.template is None:
            return [PLAIN_STOP]
        tail, following = self._tails
        eos = getattr(self.tokenizer, "eos_token_id", None)
        known: dict[str, int] = getattr(self.tokenizer, "control_tokens", {})
        ends = self._control_tokens_in(tail)[:1] or self._control_tokens_in(following)[:1]
        if ends:
            found = [known[text] for text in (*ends, *OTHER_STOPS) if text in known]
            return [*dict.fromkeys([*found, *([eos] if eos is not None else [])])]
        return [tail.strip()] if tail.strip() else [eos] if eos is not None else []

    @cached_property
    def _tails(self) -> tuple[str, str]:
        """What the template writes after a last message of the assistant; and between it and the
        content of the user's next."""
        said, asked = "turnabout", "nevertheless"
        messages = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": asked},
        ]
        conversation = Conversation.of(messages, None, "assistant")
        tail = self._text(conversation.up_to(1)).rpartition(said)[2]
        following = self._text(conversation).rpartition(said)[2].partition(asked)[0]
        return tail, following

    @cached_property
    def _next_begins(self) -> str:
        """The token that begins the user's next message, if the template ends a turn with none."""
        try:
            tail, following = self._tails
        except templates.TemplateRefusedError:
            return "\ufdd0"  # nothing is ever equal to it
        found = self._control_tokens_in(following)[:1]
        is_next = found and not tail.strip() and following.startswith(found[0])
        return found[0] if is_next else "\ufdd0"

    def _control_tokens_in(self, text: str) -> list[str]:
        return self._control_token.findall(text) if self._control_token else []

    # Tokens

    @cached_property
    def opening(self) -> list[int]:
        """The begin-of-text token, if the tokenizer puts it before any text unasked."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return [begin] if begin is not None and self.tokenizer.encode("")[:1] == [begin] else []

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a plain prompt, as training has them."""
        _refuse_surrogates(text)
        return [*self.opening, *self._encode(text)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _encode_in_pieces(self, draft: Draft) -> tuple[list[int], Offsets]:
        """For tokenizers that give no offsets: each part between two borders on its own."""
        borders = {
            0,
            len(draft.text),
            *(t.start for t in draft.turns),
            *(t.stop for t in draft.turns),
        }
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, stop in zip(sorted(borders), sorted(borders)[1:]):
            piece = self._encode(draft.text[start:stop])
            ids += piece
            offsets += [(start, stop)] * len(piece)
        return ids, offsets

    def _weighed(self, draft: Draft, ids: list[int], offsets: Offsets) -> Rendered:
        weights, bounds = _weigh(draft.turns, offsets)
        opening = [] if draft.is_template else self.opening
        eos = None if draft.is_template else getattr(self.tokenizer, "eos_token_id", None)
        tokens = [*opening, *ids, *([eos] if eos is not None else [])]
        all_weights = np.zeros(len(tokens), np.float32)
        all_weights[len(opening) : len(opening) + len(ids)] = weights
        ends_counted = bool(draft.turns) and draft.turns[-1].stop == len(draft.text)
        if eos is not None:
            all_weights[-1] = ends_counted
        all_weights[:1] = 0  # nothing comes before the first token, so it cannot be predicted
        shift = len(opening)
        spans = [Span(t.message, a + shift, b + shift) for t, (a, b) in zip(draft.turns, bounds)]
        if eos is not None and ends_counted:
            spans[-1] = attrs.evolve(spans[-1], stop=len(tokens))
        return Rendered(
            np.asarray(tokens, np.int64), all_weights, tuple(spans), draft.left_out, draft.text
        )


def _weigh(
    turns: Sequence[_Turn], offsets: Offsets
) -> tuple[npt.NDArray[np.float32], list[tuple[int, int]]]:
    """
    Weights (T,), and the range of tokens of each turn.

    A token counts if any character that it stands for does. Tokenizers trim white space off
    offsets; characters that no token claims belong to the one after them.
    """
    extent = np.asarray(offsets, np.int64).reshape(-1, 2)
    seen = np.maximum.accumulate(extent[:, 1]) if len(extent) else extent[:, 1]
    starts = np.minimum(extent[:, 0], np.concatenate([[0], seen[:-1]])) if len(extent) else seen
    # A token of no characters stands where it stands.
    stops = np.maximum(extent[:, 1], starts + 1)
    weights = np.zeros(len(extent), np.float32)
    bounds = []
    for turn in turns:
        inside = np.flatnonzero((stops > turn.start) & (starts < turn.stop))
        first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (len(extent),) * 2
        weights[first:last] = 1
        bounds.append((first, last))
    return weights, bounds


def _shared(one: str, other: str) -> int:
    """How many characters at their beginning two texts share."""
    pairs = zip(one, other)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _refuse_surrogates(text: str) -> None:
    """ValueError for half of a character outside the basic plane, which has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"contains a lone surrogate ({text[exc.start]!a} at character {exc.start}), "
            "which is half a character: repair the text's encoding"
        ) from exc


# Models without a chat template


def _plain_parts(messages: Sequence[Message]) -> list[tuple[str, int | None]]:
    """ "User: ...", "Assistant: ...", a line each: the text, and the message that it says."""
    parts: list[tuple[str, int | None]] = []
    for i, message in enumerate(messages):
        parts += [(f"{message['role'].capitalize()}:", None), (f" {message['content']}\n", i)]
    return parts


def _plain_draft(conversation: Conversation) -> Draft:
    if conversation.has_calls:
        raise ValueError(
            "this tokenizer has no chat template, so it cannot show tools or tool calls"
        )
    if any(conversation.messages[i].get("reasoning_content") for i in conversation.counting):
        raise ValueError("this tokenizer has no chat template, so it cannot show reasoning")
    text = ""
    turns = []
    for part, i in _plain_parts(conversation.messages):
        if i is not None and conversation.counts[i]:
            turns.append(_Turn(i, len(text), len(text) + len(part)))
        text += part
    if conversation.train_on == "all":
        turns = [_Turn(len(conversation.messages) - 1, 0, len(text))]
    return Draft(text, tuple(turns), is_template=False)


# Tokenizers


_converted: weakref.WeakKeyDictionary[Any, tuple[Any, Tokenizer]] = weakref.WeakKeyDictionary()


def _as_tokenizer(tokenizer: Any) -> Any:
    """Ours as it is; a fast one of transformers as ours; any other as it is."""
    if isinstance(tokenizer, Tokenizer) or not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    template = getattr(tokenizer, "chat_template", None)
    known = _converted.get(tokenizer)
    if known is None or known[0] != template:
        settings = {**tokenizer.special_tokens_map, "chat_template": template}
        if isinstance(template, dict):
            settings["chat_template"] = [{"name": k, "template": v} for k, v in template.items()]
        known = (template, Tokenizer(tokenizer.backend_tokenizer, settings))
        _converted[tokenizer] = known
    return known[1]
