"""One sample request as text that arrives in pieces, with stop strings applied.

Does not know about the form of any API.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Literal

import attrs

from tinkex import types, wire
from tinkex.server.http_errors import Refusal
from tinkex.server.openai.names import Model
from tinkex.server.request_context import Call
from tinkex.server.results import answer
from tinkex.text.streaming import HALF, StopStrings, TokenText

Finish = Literal["stop", "length"]

#: Seconds between two checks whether the client has disconnected or the server is stopping.
_LOOK_SECONDS = 0.5


@attrs.frozen(eq=False)
class Piece:
    """New text and tokens of one sequence.

    Attributes:
        index: of the sequence.
        text: may be "" while a character or a stop string is incomplete.
        tokens, logprobs: the new ones; their text may not be complete in *text* yet.
        finish: in the last piece, why the sequence has ended.
        stop_string: the stop string that ended it, if one did.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish: Finish | None = None
    stop_string: str | None = None


@attrs.define(eq=False)
class _Sequence:
    text: TokenText
    stops: StopStrings
    finished: bool = False


class Generation:
    """
    The sequences of one request.

    Args:
        stops: strings that end a sequence; unlike `SamplingParams.stop`, they do not replace the
            model's end tokens.
        needs_response: run to the end even if stop strings have ended every sequence, because
            `response` is needed.

    Attributes:
        response: of the engine, once `pieces` has ended; None if it was not waited for.
        completion_tokens: how many tokens were sampled.
    """

    def __init__(
        self,
        call: Call,
        model: Model,
        request: types.SampleRequest,
        stops: Sequence[str] = (),
        *,
        needs_response: bool = False,
    ) -> None:
        self._call = call
        self._model = model
        self._request = request
        self._needs_response = needs_response
        stop = request.sampling_params.stop
        self._ends = {i for i in stop if isinstance(i, int)} if isinstance(stop, list) else set()
        decode = partial(_decode, model.tokenizer)
        self._sequences = [
            _Sequence(TokenText(decode), StopStrings(stops)) for _ in range(request.num_samples)
        ]
        self.response: types.SampleResponse | None = None
        self.completion_tokens = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text as it arrives; the request is cancelled when the caller stops reading.

        Raises:
            Refusal: If the request is not valid for the model, or the server stops.
        """
        events: asyncio.Queue[Any] = asyncio.Queue()
        cancel = self._call.site.ledger.samplers.stream(
            self._model.place,
            self._request,
            lambda index, token, logprob: events.put_nowait((index, token, logprob)),
            events.put_nowait,
        )
        try:
            async for event in self._events(events):
                if isinstance(event, tuple):
                    piece = self._take(*event)
                    if piece is not None:
                        yield piece
                    if self._is_over and not self._needs_response:
                        return
                    continue
                self.response = _whole(event)
                for piece in self._ends_of(self.response):
                    yield piece
                return
        finally:
            cancel()

    async def _events(self, events: asyncio.Queue[Any]) -> AsyncIterator[Any]:
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                yield await asyncio.wait_for(events.get(), _LOOK_SECONDS)
                continue
            if self._call.site.ledger.shared.stopping:
                raise Refusal(503, "the server stops; send the request again later.")
            if await self._call.request.is_disconnected():
                raise Refusal(408, "the client has gone.")

    @property
    def _is_over(self) -> bool:
        return all(sequence.finished for sequence in self._sequences)

    def _take(self, index: int, token: int, logprob: float) -> Piece | None:
        sequence = self._sequences[index]
        if sequence.finished:
            return None
        self.completion_tokens += 1
        text = "" if token in self._ends else sequence.stops.push(sequence.text.push(token))
        return self._piece(index, text, (token,), (logprob,))

    def _piece(
        self, index: int, text: str, tokens: tuple[int, ...], logprobs: tuple[float, ...]
    ) -> Piece:
        sequence = self._sequences[index]
        found = sequence.stops.found
        sequence.finished = found is not None
        return Piece(index, text, tokens, logprobs, "stop" if sequence.finished else None, found)

    def _ends_of(self, response: types.SampleResponse) -> list[Piece]:
        """The last piece of each sequence that no stop string has ended."""
        pieces = []
        for index, sequence in enumerate(self._sequences):
            if sequence.finished:
                continue
            text = sequence.stops.push(sequence.text.finish())
            found = sequence.stops.found
            text += sequence.stops.finish()
            sequence.finished = True
            reason = "stop" if found else response.sequences[index].stop_reason
            pieces.append(Piece(index, text, finish=reason, stop_string=found))
        return pieces


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token; "token_id:N", as in vLLM, for a part of a character."""
    text: str = tokenizer.decode([token])
    return text if HALF not in text else f"token_id:{token}"


def _whole(outcome: Any) -> types.SampleResponse:
    """Raises Refusal with the reason if the request has failed."""
    if isinstance(outcome, types.SampleResponse):
        return outcome
    failure = wire.loads(answer(outcome, "Sample").body)
    status = 400 if failure.get("category") == "user" else 500
    raise Refusal(status, str(failure["error"]))


@attrs.define(eq=False)
class Collected:
    """One whole sequence, collected from its pieces."""

    text: str = ""
    tokens: list[int] = attrs.field(factory=list)
    logprobs: list[float] = attrs.field(factory=list)
    finish: Finish = "length"
    stop_string: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        if piece.finish is not None:
            self.finish, self.stop_string = piece.finish, piece.stop_string


async def collect(generation: Generation, count: int) -> list[Collected]:
    """Every sequence of *generation*, whole."""
    sequences = [Collected() for _ in range(count)]
    async for piece in generation.pieces():
        sequences[piece.index].add(piece)
    return sequences
