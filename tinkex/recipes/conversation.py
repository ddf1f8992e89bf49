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
    """Answers a conversation: by sampling from a model, or through the API of another server."""

    @property
    def has_template(self) -> bool:
        """False if conversations are rendered as plain text, which a model may not understand."""

    @property
    def message(self) -> dict[str, Any] | None:
        """The last answer, as far as it was read; None if it is empty."""

    def pieces(self, messages: list[dict[str, Any]], settings: Settings) -> Iterator[str]:
        """Yield the answer to *messages* in pieces. Raises ValueError, TinkexError."""


class Sampled:
    """
    A speaker that samples from a model.

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
    The history of a conversation, and the speaker that continues it.

    Args:
        base: creates the speaker of the base model; None if there is no model to compare with.
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
        Yield the answer to *text* in pieces. It is added to the history, even if it is interrupted.

        Raises:
            ValueError, TinkexError: If the model cannot answer. *text* is then removed from the
                history.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            yield from self._speaker.pieces(asked, self.settings)
        finally:
            if self._speaker.message is not None:
                self.messages = [*asked, self._speaker.message]

    def compare(self, text: str) -> tuple[str, str]:
        """
        The answers of the base model and of this model to *text*, at this point of the
        conversation.

        Raises:
            ValueError: If there is no base model to compare with, or no question to answer.
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
