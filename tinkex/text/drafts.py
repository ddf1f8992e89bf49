"""Drafts: a conversation as rendered by a chat template, with the position of each turn.

A turn is located by rendering the conversation up to it, and up to the generation prompt. The rules
are in docs/data.md. Knows the texts of a tokenizer's control tokens, but does not encode.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date as Date
from functools import cached_property

import attrs

from tinkex.text import templates
from tinkex.text.messages import Conversation, Message, texts_of

#: A prefix that no text has.
_NEVER = "\ufdd0"


@attrs.frozen
class Turn:
    """Characters *start* to *stop* of a text are message number *message*."""

    message: int
    start: int
    stop: int


@attrs.frozen
class Draft:
    """A rendering before it is encoded.

    Attributes:
        turns: the parts in the loss.
        left_out: numbers of messages that should be in the loss but
        are not: see `Rendered`.
        is_template: True if a template rendered the text, including begin and end of text.
    """

    text: str
    turns: tuple[Turn, ...]
    left_out: tuple[int, ...] = ()
    is_template: bool = True


class Drafter:
    """
    Makes drafts with one chat template, and caches what all conversations share.

    Args:
        template: None renders roles as plain text: "User: ...".
        control_tokens: texts that the tokenizer encodes as control tokens.
        variables: names of special tokens and their text, such as bos_token.
        date: the date for templates that use it; None is today.
    """

    def __init__(
        self,
        template: str | None,
        control_tokens: Collection[str] = (),
        variables: Mapping[str, str] | None = None,
        date: Date | None = None,
    ) -> None:
        self.template = template
        self._variables = variables or {}
        self._date = date
        special = [re.escape(text) for text in control_tokens if text.strip()]
        self._control_token = re.compile("|".join(special)) if special else None

    def draft(self, conversation: Conversation) -> Draft:
        """One text, in which every message that should be in the loss is, if rendered unchanged.

        Raises:
            ValueError: If the template does not accept the messages or omits some of them, or text
                of a message would be encoded as a control token.
        """
        return self._draft_and_form(conversation)[0]

    def drafts(self, conversation: Conversation) -> list[Draft]:
        """As many texts as needed to put every message that should be in the loss into it."""
        whole, form = self._draft_and_form(conversation)
        drafts = [whole] if whole.turns or not whole.left_out else []
        drafts += [self._template_draft(self._accepted(form.up_to(i))) for i in whole.left_out]
        return drafts

    def prompt(self, conversation: Conversation) -> str:
        """The text up to and including the generation prompt."""
        self._refuse_control_tokens(conversation)
        if self.template is None:
            return "".join(part for part, _ in _plain_parts(conversation.messages)) + "Assistant:"
        form = self._accepted(conversation)
        text = self._text(form, prompted=True)
        _refuse_missing(form, text)
        return text

    def _draft_and_form(self, conversation: Conversation) -> tuple[Draft, Conversation]:
        self._refuse_control_tokens(conversation)
        if self.template is None:
            return _plain_draft(conversation), conversation
        form = self._accepted(conversation)
        return self._template_draft(form), form

    def _text(self, conversation: Conversation, prompted: bool = False) -> str:
        return self._text_and_marks(conversation, prompted)[0]

    def _text_and_marks(
        self, conversation: Conversation, prompted: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        key = (len(conversation.messages), prompted)
        if key not in conversation.texts:
            conversation.texts[key] = templates.render_template(
                self.template or "",
                conversation.messages,
                tools=conversation.tools,
                add_generation_prompt=prompted,
                variables=self._variables,
                date=self._date,
            )
        text, marks = conversation.texts[key]
        return text, marks

    def _accepted(self, conversation: Conversation) -> Conversation:
        """The conversation in the form that the template renders completely.

        Templates differ in the form of tool calls: content null or "", arguments as an object or as
        text. Each form is tried.

        Raises:
            ValueError: If no form is rendered completely.
        """
        if not conversation.has_calls and not conversation.has_results:
            return conversation
        if conversation.is_formed and not self._missing(conversation):
            return conversation
        problem: ValueError | None = None
        for form in conversation.forms():
            try:
                self._text(form)
                missing = self._missing(form)
            except templates.TemplateRefusedError as exc:
                problem = problem or exc
                continue
            if not missing:
                return form
            problem = problem or ValueError(
                f"the chat template does not show {missing}; use a model whose template has a "
                "place for it"
            )
        raise problem or ValueError("the chat template does not show the tool calls")

    def _missing(self, conversation: Conversation) -> str | None:
        """The tools, calls or results that the template omits, or None."""
        marked, marks = conversation.marked()
        text = self._text(marked)
        return next((what for mark, what in marks if mark not in text), None)

    def _template_draft(self, conversation: Conversation) -> Draft:
        whole, marks = self._text_and_marks(conversation)
        _refuse_missing(conversation, whole)
        if conversation.train_on == "all":
            return Draft(whole, (Turn(len(conversation.messages) - 1, 0, len(whole)),))
        counting = conversation.counting
        assistants = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if len(marks) == len(assistants) and set(counting) <= set(assistants):
            # The template itself marks the assistant's parts.
            by_message = dict(zip(assistants, marks))
            turns = [Turn(i, *by_message[i]) for i in counting]
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

    def _turn(self, conversation: Conversation, i: int, whole: str) -> Turn | None:
        """
        The position of message *i* in *whole*, or None if it is rendered differently there.

        A turn is the text that rendering through it adds to rendering up to it with the generation
        prompt. If the generation prompt has text that the template omits in the turn (DeepSeek-R1's
        "<think>"), the turn begins where the two diverge.
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
        return Turn(i, start, stop)

    def _start(self, conversation: Conversation, i: int, until: str) -> int | None:
        is_assistant = conversation.messages[i]["role"] == "assistant"
        try:
            before = self._text(conversation.before(i), prompted=is_assistant)
        except templates.TemplateRefusedError:
            # Some templates cannot render only the beginning (no messages, no user): then the turn
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
        The last turn, with reasoning that the template drops but the generation prompt opens.

        DeepSeek-R1's distilled models work like this: the prompt ends in "<think>", the model
        generates its reasoning, "</think>" and the answer; in the history only the answer stays.

        Raises:
            ValueError: If the generation prompt does not open reasoning.
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
        return Draft(text, (Turn(i, len(before), len(text)),))

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """
        Raise ValueError if text of a message would be encoded as a control token.

        A user who writes "<|im_end|>" could otherwise end the turn and impersonate the assistant.
        """
        for i, message in enumerate(conversation.messages):
            for text in texts_of(message):
                refuse_surrogates(text)
                found = self._control_token.search(text) if self._control_token else None
                if found is not None:
                    raise ValueError(
                        f"message {i} contains {found[0]!r}, which this tokenizer reads as a "
                        "control token; reword it"
                    )

    @cached_property
    def tails(self) -> tuple[str, str]:
        """The text that the template writes after the assistant's last message; and between an
        assistant's message and the content of the user's next one."""
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
            tail, following = self.tails
        except templates.TemplateRefusedError:
            return _NEVER
        found = self.control_tokens_in(following)[:1]
        is_next = found and not tail.strip() and following.startswith(found[0])
        return found[0] if is_next else _NEVER

    def control_tokens_in(self, text: str) -> list[str]:
        return self._control_token.findall(text) if self._control_token else []


def completion_draft(prompt: str, completion: str) -> Draft:
    """A prompt and its completion as one text; the completion is in the loss.

    Raises:
        TypeError, ValueError: If they are not texts.
    """
    for name, part in (("prompt", prompt), ("completion", completion)):
        if not isinstance(part, str):
            raise TypeError(f"{name} must be a str, got {type(part).__name__}.")
    text = prompt + completion
    refuse_surrogates(text)
    return Draft(text, (Turn(0, len(prompt), len(text)),), is_template=False)


def _refuse_missing(conversation: Conversation, text: str) -> None:
    """Raise ValueError if *text* omits a message of a system, user or tool."""
    missing = conversation.missing(text)
    if missing:
        raise ValueError(
            f"the chat template does not show {missing}; put its text into another message, or use "
            "a model whose template has a place for it"
        )


def _shared(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    pairs = zip(one, other)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def refuse_surrogates(text: str) -> None:
    """Raise ValueError for a lone surrogate, which cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(
            f"contains a lone surrogate ({text[exc.start]!a} at character {exc.start}), "
            "which is half a character: repair the text's encoding"
        ) from exc


# Models without a chat template


def _plain_parts(messages: Sequence[Message]) -> list[tuple[str, int | None]]:
    """ "User: ...", "Assistant: ...", one line each: the text, and the number of its message."""
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
            turns.append(Turn(i, len(text), len(text) + len(part)))
        text += part
    if conversation.train_on == "all":
        turns = [Turn(len(conversation.messages) - 1, 0, len(text))]
    return Draft(text, tuple(turns), is_template=False)
