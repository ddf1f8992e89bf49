"""Renderers: messages to tokens and weights, and a model's tokens back to a message.

The text is exactly the output of the model's chat template, and is encoded as a whole. The weights
of tokens follow from the characters that they cover. The rules are in docs/data.md. Does not know
about files, servers or models.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from datetime import date as Date
from functools import cached_property
from itertools import pairwise
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.text.chunks import Chunk, ChunkEncoder, EncodedText
from tinkex.text.drafts import Draft, Drafter, completion_draft, refuse_surrogates
from tinkex.text.messages import Conversation, TrainOn
from tinkex.text.tokenizer import Tokenizer

#: Tokens that end an assistant's turn besides the template's.
OTHER_STOPS = ("<|eom_id|>", "<|call|>")
#: The beginning of the user's next message, for models without a chat template.
PLAIN_STOP = "\nUser:"


@attrs.frozen
class Span:
    """Tokens *start* to *stop* (exclusive): the part of message number *message* in the loss."""

    message: int
    start: int
    stop: int


@attrs.frozen(eq=False)
class Rendered:
    """
    A conversation, a completion or a text as tokens.

    Attributes:
        tokens: (T,) int64.
        weights: (T,) float32; 1 for tokens in the loss, else 0. The first is 0, since no token
            precedes it.
        spans: positions of the messages in the loss.
        left_out: numbers of messages that should be in the loss but are not, because the template
            renders them differently once later messages follow. `render_turns` renders these
            separately.
        text: the encoded text.
    """

    tokens: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    spans: tuple[Span, ...] = ()
    left_out: tuple[int, ...] = ()
    text: str = attrs.field(default="", repr=False)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the last span, at least 1."""
        return max(1, self.spans[-1].start if self.spans else 1)

    def datum(self) -> types.Datum:
        """The tokens without the last as input; targets and weights shifted by one.

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
    A conversation up to the generation prompt.

    Attributes:
        tokens: the prompt to sample from.
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


# Public functions


def render(
    messages: Any,
    tokenizer: Any,
    tools: Sequence[Mapping[str, Any]] | None = None,
    train_on: TrainOn = "assistant",
    *,
    date: Date | None = None,
) -> Rendered:
    """
    One conversation as tokens with weights.

    Args:
        messages: a list of {"role", "content"} dicts, or rows of a DataFrame or a
            `datasets.Dataset` with these columns. "weight" (0 or 1) and "trainable" (a bool) of
            a message decide whether it is in the loss; "reasoning_content" or "thinking",
            "tool_calls" and "tool_call_id" are passed to the template.
        tokenizer: from `get_tokenizer()`, or a fast tokenizer of transformers.
        tools: JSON schemas of the functions that the assistant may call.
        train_on: what is in the loss: each message of the assistant, only the last one, or every
            token.
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
    The same, but every message that should be in the loss is in the loss of one of the renderings.

    Some templates render a turn differently once others follow: they drop its reasoning. Such a
    turn is rendered separately, with the conversation up to it. Most conversations have one
    rendering.
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
    A conversation as a prompt for the assistant's next message, with the stop tokens or strings.

    Raises:
        ValueError, TypeError: As `render`.
    """
    return Renderer(tokenizer, date=date).prompt(messages, tools)


def render_completion(prompt: str, completion: str, tokenizer: Any) -> Rendered:
    """
    A prompt and its completion, encoded as one text; the completion is in the loss.

    A token that straddles the border is in the loss. The tokenizer's begin-of-text and end-of-text
    tokens are added; the end is in the loss.
    """
    return Renderer(tokenizer).completion(prompt, completion)


def render_text(text: str, tokenizer: Any) -> Rendered:
    """Plain text between the tokenizer's begin and end of text; all of it is in the loss."""
    return Renderer(tokenizer).completion("", text)


# Implementation


class Renderer:
    """
    Renders for one tokenizer, and caches what all conversations share.

    Args:
        date: today, for templates that write it; None is the real date.
    """

    def __init__(self, tokenizer: Any, *, date: Date | None = None) -> None:
        self.tokenizer = _as_tokenizer(tokenizer)
        self.template: str | None = getattr(self.tokenizer, "chat_template", None)
        self._drafter = Drafter(
            self.template,
            getattr(self.tokenizer, "control_tokens", {}),
            getattr(self.tokenizer, "special_texts", {}),
            date,
        )

    # The public functions above, for many conversations

    def render(self, messages: Any, tools: Any = None, train_on: TrainOn = "assistant") -> Rendered:
        return self.finish([self._drafter.draft(Conversation.of(messages, tools, train_on))])[0]

    def render_turns(
        self, messages: Any, tools: Any = None, train_on: TrainOn = "assistant"
    ) -> list[Rendered]:
        return self.finish(self.drafts(messages, tools, train_on))

    def prompt(self, messages: Any, tools: Any = None) -> Prompt:
        text = self._drafter.prompt(Conversation.of(messages, tools, "assistant"))
        opening = self.opening if self.template is None else []
        return Prompt([*opening, *self._encode(text)], text, self.stop)

    def completion(self, prompt: str, completion: str) -> Rendered:
        return self.finish([completion_draft(prompt, completion)])[0]

    def drafts(
        self, messages: Any, tools: Any = None, train_on: TrainOn = "assistant"
    ) -> list[Draft]:
        """Drafts in which every message that should be in the loss is; see `finish`."""
        return self._drafter.drafts(Conversation.of(messages, tools, train_on))

    def finish(self, drafts: Sequence[Draft]) -> list[Rendered]:
        """Encode the texts (together, which is faster) and set the weights of their tokens."""
        if isinstance(self.tokenizer, Tokenizer):
            encoded = self._encoder.encode([draft.text for draft in drafts])
        else:
            encoded = [self._encode_in_pieces(draft) for draft in drafts]
        return [self._weighed(draft, one) for draft, one in zip(drafts, encoded)]

    @cached_property
    def stop(self) -> list[int] | list[str]:
        """Stop tokens of the assistant's turn, or stop strings if the template has no token for it.

        The first special token that the template writes after the assistant's text, or at the
        beginning of the user's next message.
        """
        if self.template is None:
            return [PLAIN_STOP]
        tail, following = self._drafter.tails
        ends_in = self._drafter.control_tokens_in
        eos = getattr(self.tokenizer, "eos_token_id", None)
        known: dict[str, int] = getattr(self.tokenizer, "control_tokens", {})
        ends = ends_in(tail)[:1] or ends_in(following)[:1]
        if ends:
            found = [known[text] for text in (*ends, *OTHER_STOPS) if text in known]
            return [*dict.fromkeys([*found, *([eos] if eos is not None else [])])]
        return [tail.strip()] if tail.strip() else [eos] if eos is not None else []

    # Tokens

    @cached_property
    def _encoder(self) -> ChunkEncoder:
        return ChunkEncoder(self.tokenizer)

    @cached_property
    def opening(self) -> list[int]:
        """The begin-of-text token, if the tokenizer adds it to every text by default."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        return [begin] if begin is not None and self.tokenizer.encode("")[:1] == [begin] else []

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a plain prompt, as in training."""
        refuse_surrogates(text)
        return [*self.opening, *self._encode(text)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _encode_in_pieces(self, draft: Draft) -> EncodedText:
        """For tokenizers without offsets: encode each part between two borders separately."""
        places = [place for turn in draft.turns for place in (turn.start, turn.stop)]
        borders = sorted({0, len(draft.text), *places})
        pieces = [draft.text[start:stop] for start, stop in pairwise(borders)]
        chunks = [Chunk(_WithoutOffsets(self._encode(piece))) for piece in pieces]
        return EncodedText(chunks, [*map(len, pieces)])

    def _weighed(self, draft: Draft, encoded: EncodedText) -> Rendered:
        tokens = encoded.ids
        weights = np.zeros(len(tokens), np.float32)
        spans = [Span(t.message, *encoded.tokens_of(t.start, t.stop)) for t in draft.turns]
        for span in spans:
            weights[span.start : span.stop] = 1
        if not draft.is_template:
            ends_counted = bool(draft.turns) and draft.turns[-1].stop == len(draft.text)
            tokens, weights, spans = self._between_ends(tokens, weights, spans, ends_counted)
        weights[:1] = 0  # no token precedes the first one, so it cannot be predicted
        return Rendered(tokens, weights, tuple(spans), draft.left_out, draft.text)

    def _between_ends(
        self,
        tokens: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        spans: list[Span],
        ends_counted: bool,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], list[Span]]:
        """Add the tokens that begin and end a text; the end is in the loss if requested."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        ending = [] if eos is None else [eos]
        opening = self.opening
        shift = len(opening)
        tokens = np.concatenate([opening, tokens, ending]).astype(np.int64)
        weights = np.concatenate([[0] * shift, weights, [ends_counted] * len(ending)])
        spans = [Span(s.message, s.start + shift, s.stop + shift) for s in spans]
        if ending and ends_counted:
            spans[-1] = attrs.evolve(spans[-1], stop=len(tokens))
        return tokens, weights.astype(np.float32), spans


# Tokenizers


@attrs.frozen
class _WithoutOffsets:
    """Tokens of a piece of text, weighted as a whole."""

    ids: list[int]
    offsets: tuple[tuple[int, int], ...] = ()


_converted: weakref.WeakKeyDictionary[Any, tuple[Any, Tokenizer]] = weakref.WeakKeyDictionary()


def _as_tokenizer(tokenizer: Any) -> Any:
    """A fast tokenizer of transformers as ours; any other unchanged."""
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
