"""Results: polling for one, for all of a sampling session, and cancelling."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from starlette.responses import Response

from tinkex import types, wire
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.ledger import Entry
from tinkex.server.request_context import Call, reply
from tinkex.server.results import Answer


async def retrieve_future(call: Call) -> Response:
    """Long poll for a result. 408 if it is not ready, with its queue state."""
    request, _ = await call.read(types.RetrieveFutureRequest)
    ledger = call.site.ledger
    entry = ledger.entries.of_owner(request.request_id, call.owner)
    ledger.sessions.heard_of(entry.session_id)
    if entry.answer is None:
        ledger.shared.check_running()
    result = await ledger.entries.wait(entry, call.site.limits.poll_seconds)
    if result is None:
        return _not_yet(call, entry)
    if request.allow_metadata_only and len(result.body) > call.site.limits.metadata_bytes:
        size = len(result.body)
        return reply({"status": "complete_metadata", "response_payload_size": size})
    response = await _result(call, result)
    ledger.entries.fetched(entry)
    return response


async def _result(call: Call, result: Answer) -> Response:
    if not result.has_protobuf:
        return reply(result.body)
    if call.wants_protobuf:
        # A truncated protobuf can look complete; the client checks this digest.
        digest = await call.decoded(lambda: hashlib.sha256(result.body).digest(), result.body)
        headers = {"Content-Digest": f"sha-256=:{base64.b64encode(digest).decode()}:"}
        return Response(result.body, headers=headers, media_type=wire.PROTOBUF)
    return reply(await call.decoded(result.as_json, result.body))


def _not_yet(call: Call, entry: Entry) -> Response:
    ledger = call.site.ledger
    ledger.shared.check_running()
    payload: dict[str, Any] = {"request_id": entry.request_id, "queue_state": "active"}
    if entry.name == "Sample":
        payload["queue_state_reason"] = ledger.shared.scheduler.sample_place(entry.request_id)
    else:
        position, reason = ledger.shared.scheduler.place(entry.target, entry.seq)
        payload |= {"queue_position": position, "queue_state_reason": reason}
    return reply(payload, 408)


async def retrieve_futures(call: Call) -> Response:
    """Long poll for all sample requests of one clone of a sampling client."""
    request, _ = await call.read(types.RetrieveFuturesRequest)
    target = request.target
    sampler_id, clone = target.get("sampling_session_id"), target.get("cloned_sampler_id", 0)
    if target.get("type") != "sampling_session" or not isinstance(sampler_id, str):
        raise Refusal(
            400,
            'target must be {"type": "sampling_session", "sampling_session_id": ...}, got '
            f"{shown(target)}.",
        )
    if not isinstance(clone, int) or isinstance(clone, bool):
        raise Refusal(400, f"cloned_sampler_id must be an integer, got {shown(clone)}.")
    ledger = call.site.ledger
    place = ledger.samplers.of_owner(sampler_id, call.owner)
    ledger.samplers.acknowledge(place, request.retrieved_request_ids)
    longest = call.site.limits.poll_seconds
    seconds = longest if request.timeout is None else min(max(request.timeout, 0.0), longest)
    found = await ledger.samplers.completions(place, clone, request.prev_cursor, seconds)
    cursor = found[-1].cursor if found else request.prev_cursor
    return reply(types.RetrieveFuturesResponse([_completion(entry) for entry in found], cursor))


def _completion(entry: Entry) -> types.Completion:
    if entry.answer is None or entry.answer.failed:
        return types.Completion("failed", entry.request_id)
    return types.Completion("finished", entry.request_id, len(entry.answer.body))


async def cancel_future(call: Call) -> Response:
    request, _ = await call.read(types.CancelFutureRequest)
    call.site.ledger.cancel(call.owner, request.request_id)
    return reply({})


ENDPOINTS: list[tuple[str, str, Any]] = [
    ("POST", "retrieve_future", retrieve_future),
    ("POST", "retrieve_futures", retrieve_futures),
    ("POST", "cancel_future", cancel_future),
]
