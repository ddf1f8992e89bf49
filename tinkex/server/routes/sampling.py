"""Sampling sessions and sample requests, with a single result or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response, StreamingResponse

from tinkex import types, wire
from tinkex.server.http_errors import Refusal
from tinkex.server.ledger import SamplerPlace
from tinkex.server.request_context import Call, reply
from tinkex.server.results import answer
from tinkex.server.routes.training import promise
from tinkex.server.sampling_source import sampler_of


async def create_sampling_session(call: Call) -> Response:
    request, _ = await call.read(types.CreateSamplingSessionRequest)
    sampler_id = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
    known = call.site.ledger.samplers.get(sampler_id)
    if known is not None and known.live.owner == call.owner:
        live = known.live  # a repeat; the checkpoint may have been deleted
    else:
        live = await sampler_of(
            call, sampler_id, request.session_id, request.base_model, request.model_path
        )
    await call.site.ledger.samplers.create(request, live)
    return reply(types.CreateSamplingSessionResponse(sampler_id))


async def get_sampler(call: Call) -> Response:
    live = call.site.ledger.samplers.of_owner(call.parameter("sampler_id"), call.owner).live
    return reply(types.GetSamplerResponse(live.sampler_id, live.base_model, live.model_path))


async def join(call: Call) -> Response:
    request, _ = await call.read(types.JoinSamplingSessionRequest)
    number = await call.site.ledger.samplers.join(call.owner, request.sampling_session_id)
    return reply(types.JoinSamplingSessionResponse(number))


async def asample(call: Call) -> Response:
    request, body = await call.read(types.SampleRequest, data=True)
    place = await _place(call, request)
    return promise(await call.site.ledger.samplers.sample(place, request, body))


async def _place(call: Call, request: types.SampleRequest) -> SamplerPlace:
    """The sampling session of a request. Raises Refusal: 400 for unsupported options, 404."""
    limits = call.site.limits
    if request.num_samples > limits.num_samples:
        raise Refusal(
            400,
            f"num_samples must be at most {limits.num_samples} on this server, got "
            f"{request.num_samples}; send several requests.",
        )
    max_tokens = request.sampling_params.max_tokens
    if max_tokens is not None and max_tokens > limits.max_tokens:
        raise Refusal(
            400, f"max_tokens must be at most {limits.max_tokens} on this server, got {max_tokens}."
        )
    if request.prompt_alt_tokens_k > limits.num_samples:
        raise Refusal(
            400,
            f"prompt_alt_tokens_k must be at most {limits.num_samples} on this server, got "
            f"{request.prompt_alt_tokens_k}.",
        )
    if request.sampling_session_id is not None:
        return call.site.ledger.samplers.of_owner(request.sampling_session_id, call.owner)
    once = f"none:sample:{uuid.uuid4()}"
    return SamplerPlace(await sampler_of(call, once, "", request.base_model, request.model_path))


async def stream_sample(call: Call) -> Response:
    """Server-sent events: one per token as {"index", "token", "logprob"}, one per finished
    sequence as {"index", "stop_reason"}, then [DONE]; or an event named "error"."""
    request, _ = await call.read(types.SampleRequest, data=True)
    place = await _place(call, request)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(
        _events(call, place, request), media_type="text/event-stream", headers=headers
    )


async def _events(
    call: Call, place: SamplerPlace, request: types.SampleRequest
) -> AsyncIterator[bytes]:
    events: asyncio.Queue[bytes | None] = asyncio.Queue()

    def on_token(index: int, token: int, logprob: float) -> None:
        events.put_nowait(_event({"index": index, "token": token, "logprob": logprob}))

    def on_end(outcome: Any) -> None:
        if isinstance(outcome, types.SampleResponse):
            for index, sequence in enumerate(outcome.sequences):
                events.put_nowait(_event({"index": index, "stop_reason": sequence.stop_reason}))
            events.put_nowait(b"data: [DONE]\n\n")
        else:
            events.put_nowait(b"event: error\ndata: " + answer(outcome, "Sample").body + b"\n\n")
        events.put_nowait(None)

    cancel = call.site.ledger.samplers.stream(place, request, on_token, on_end)
    try:
        while not call.site.ledger.shared.stopping:
            # The timeout lets a stream notice that the server is stopping.
            with contextlib.suppress(asyncio.TimeoutError):
                event = await asyncio.wait_for(events.get(), 0.5)
                if event is None:
                    return
                yield event
    finally:
        cancel()


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + wire.dumps(payload) + b"\n\n"


ENDPOINTS: list[tuple[str, str, Any]] = [
    ("POST", "asample", asample),
    ("POST", "create_sampling_session", create_sampling_session),
    ("POST", "join_sampling_session", join),
    ("POST", "stream_sample", stream_sample),
    ("GET", "samplers/{sampler_id}", get_sampler),
]
