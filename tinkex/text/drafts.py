"""Drafts: a conversation as rendered by a chat template, with the position of each turn.

A turn is found by rendering: the conversation up to it, and up to where the assistant begins to
speak. The rules are in docs/data.md. Knows the texts of a tokenizer's control tokens, but does not
encode.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from datetime import date as Date
from functools import cached_property

import attrs

from tinkex.text import templates
from tinkex.text.messages import Conversation, Message, texts_of

#: Stands for a text that no text begins with.
_NEVER = "\ufdd0"


@attrs.frozen
class Turn:
    """Characters *start* to *stop* of a text say message number *message*."""

    message: int
    start: int
    stop: int


@attrs.frozen
class Draft:
    """A rendering before it is encoded.

    Attributes:
        turns: what counts.
        left_out: numbers of messages that should count but do not: see `Rendered`.
        is_template: the text is a template's, which writes begin and end of text itself.
    """

    text: str
    turns: tuple[Turn, ...]
    left_out: tuple[int, ...] = ()
    is_template: bool = True


class Drafter:
    """
    Drafts for one chat template, and keeps what is the same for all conversations.

    Args:
        template: None writes roles out: "User: ...".
        control_tokens: texts that the tokenizer reads as control tokens.
        variables: names of special tokens and their text, such as bos_token.
        date: today, for templates that write it; None is the real date.
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
        """One text, in which every message counts that should and that it says as it was said.

        Raises:
            ValueError: If the template does not accept the messages or cannot show all of them, or
                text of a message would be read as a control token.
        """
        return self._draft_and_form(conversation)[0]

    def drafts(self, conversation: Conversation) -> list[Draft]:
        """All that is needed for every message that should count to count."""
        whole, form = self._draft_and_form(conversation)
        drafts = [whole] if whole.turns or not whole.left_out else []
        drafts += [self._template_draft(self._accepted(form.up_to(i))) for i in whole.left_out]
        return drafts

    def prompt(self, conversation: Conversation) -> str:
        """The text up to where the assistant begins to speak."""
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
        """The conversation in the form in which the template shows all of it.

        Templates differ in what they expect beside tool calls: content null or "", arguments as an
        object or as text. Each form is tried.

        Raises:
            ValueError: If it shows all in no form.
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
        """What of the tools, calls and their results the template does not show, or None."""
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
            # The template's author has said what the assistant says.
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
        return Turn(i, start, stop)

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
        return Draft(text, (Turn(i, len(before), len(text)),))

    def _refuse_control_tokens(self, conversation: Conversation) -> None:
        """
        ValueError if text of a message would be read as a control token.

        A user who writes "<|im_end|>" would otherwise end the turn and speak for the assistant.
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
            tail, following = self.tails
        except templates.TemplateRefusedError:
            return _NEVER
        found = self.control_tokens_in(following)[:1]
        is_next = found and not tail.strip() and following.startswith(found[0])
        return found[0] if is_next else _NEVER

    def control_tokens_in(self, text: str) -> list[str]:
        return self._control_token.findall(text) if self._control_token else []


def completion_draft(prompt: str, completion: str) -> Draft:
    """A prompt and what follows it as one text; the completion counts.

    Raises:
        TypeError, ValueError: If these are not texts.
    """
    for name, part in (("prompt", prompt), ("completion", completion)):
        if not isinstance(part, str):
            raise TypeError(f"{name} must be a str, got {type(part).__name__}.")
    text = prompt + completion
    refuse_surrogates(text)
    return Draft(text, (Turn(0, len(prompt), len(text)),), is_template=False)


def _refuse_missing(conversation: Conversation, text: str) -> None:
    """ValueError if *text* does not say a message of a system, user or tool."""
    missing = conversation.missing(text)
    if missing:
        raise ValueError(
            f"the chat template does not show {missing}; put its text into another message, or use "
            "a model whose template has a place for it"
        )


def _shared(one: str, other: str) -> int:
    """How many characters at their beginning two texts share."""
    pairs = zip(one, other)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def refuse_surrogates(text: str) -> None:
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
            turns.append(Turn(i, len(text), len(text) + len(part)))
        text += part
    if conversation.train_on == "all":
        turns = [Turn(len(conversation.messages) - 1, 0, len(text))]
    return Draft(text, tuple(turns), is_template=False)
