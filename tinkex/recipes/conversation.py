"""Conversations with a model: its history, and answers as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import attrs

from tinkex import types
from tinkex.recipes import answers
from tinkex.text.renderer import Renderer
from tinkex.text.responses import parse_response


@attrs.define
class Settings:
    """How answers are sampled."""

    max_tokens: int
    temperature: float
    seed: int | None


class Speaker(Protocol):
    """What answers a conversation: a model that is sampled from, or a server of another API."""

    @property
    def has_template(self) -> bool:
        """False if the conversation is written as plain text, which a model may not follow."""

    @property
    def message(self) -> dict[str, Any] | None:
        """The last answer, as far as it was taken; None if nothing was said."""

    def pieces(self, messages: list[dict[str, Any]], settings: Settings) -> Iterator[str]:
        """The answer to *messages*, piece by piece. Raises ValueError, TinkexError."""


class Sampled:
    """
    A model that is sampled from.

    Args:
        sampler: a `SamplingClient`; tokenizer: its tokenizer.
    """

    def __init__(self, sampler: Any, tokenizer: Any) -> None:
        self._sampler, self._tokenizer = sampler, tokenizer
        self._renderer = Renderer(tokenizer)
        self._tokens: list[int] = []

    @property
    def has_template(self) -> bool:
        return self._renderer.template is not None

    @property
    def message(self) -> dict[str, Any] | None:
        return parse_response(self._tokens, self._tokenizer) if self._tokens else None

    def pieces(self, messages: list[dict[str, Any]], settings: Settings) -> Iterator[str]:
        self._tokens = []
        prompt = self._renderer.prompt(messages)
        params = types.SamplingParams(
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            seed=settings.seed,
            stop=prompt.stop or None,
        )
        yield from answers.pieces(
            self._sampler, prompt.model_input, params, self._tokenizer, self._tokens
        )


class Conversation:
    """
    What was said, and who says the rest.

    Args:
        base: makes the speaker of the base model; None if there is nothing to compare with.
    """

    def __init__(
        self, speaker: Speaker, settings: Settings, base: Callable[[], Speaker] | None = None
    ) -> None:
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.system = ""
        self._speaker = speaker
        self._make_base = base
        self._base: Speaker | None = None

    @property
    def has_template(self) -> bool:
        return self._speaker.has_template

    def set_system(self, text: str) -> None:
        self.system = text
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> Iterator[str]:
        """
        The answer to *text*, piece by piece. It is remembered, also if it is stopped half-way.

        Raises:
            ValueError, TinkexError: If the model does not take the conversation. *text* is
                forgotten then.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            yield from self._speaker.pieces(asked, self.settings)
        finally:
            if self._speaker.message is not None:
                self.messages = [*asked, self._speaker.message]

    def compare(self, text: str) -> tuple[str, str]:
        """
        The answers of the base model and of this one to *text*, here in the conversation.

        Raises:
            ValueError: If there is nothing to compare or to answer.
        """
        if self._make_base is None:
            raise ValueError("there is no base model to compare with.")
        before = self.messages
        if not text:
            asked = [i for i, message in enumerate(before) if message["role"] == "user"]
            if not asked:
                raise ValueError("nothing was asked yet; write /compare TEXT.")
            text, before = str(before[asked[-1]]["content"]), before[: asked[-1]]
        if self._base is None:
            self._base = self._make_base()
        messages = [*before, {"role": "user", "content": text}]
        theirs, ours = (
            "".join(speaker.pieces(messages, self.settings))
            for speaker in (self._base, self._speaker)
        )
        return theirs, ours
