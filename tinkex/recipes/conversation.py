"""Conversations with a model: what was said, and the answers, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

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


class Conversation:
    """
    What was said, and the model that says the rest.

    Args:
        base: makes the sampler of the base model; None if the model is a base model itself.
    """

    def __init__(
        self, sampler: Any, tokenizer: Any, settings: Settings, base: Callable[[], Any] | None
    ) -> None:
        self.settings = settings
        self.messages: list[dict[str, Any]] = []
        self.system = ""
        self._sampler = sampler
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer)
        self._make_base = base
        self._base: Any = None

    @property
    def has_template(self) -> bool:
        return self._renderer.template is not None

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
        tokens: list[int] = []
        try:
            yield from self._answer(self._sampler, asked, tokens)
        finally:
            if tokens:
                answer = parse_response(tokens, self._tokenizer)
                self.messages = [*asked, answer]

    def compare(self, text: str) -> tuple[str, str]:
        """
        The answers of the base model and of this one to *text*, here in the conversation.

        Raises:
            ValueError: If there is nothing to compare or to answer.
        """
        if self._make_base is None:
            raise ValueError("this is the base model; there is nothing to compare it with.")
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
            "".join(self._answer(sampler, messages, [])) for sampler in (self._base, self._sampler)
        )
        return theirs, ours

    def _answer(
        self, sampler: Any, messages: list[dict[str, Any]], tokens: list[int]
    ) -> Iterator[str]:
        prompt = self._renderer.prompt(messages)
        params = types.SamplingParams(
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            stop=prompt.stop or None,
        )
        return answers.pieces(sampler, prompt.model_input, params, self._tokenizer, tokens)
