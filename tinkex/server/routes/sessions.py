"""Sessions, configuration and health."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import attrs
from starlette.responses import Response

from tinkex import types, wire
from tinkex.server.database import SessionRow, iso
from tinkex.server.http_errors import Refusal, not_offered, shown
from tinkex.server.monitor import CONTENT_TYPE
from tinkex.server.request_context import Call, header_key, reply

#: Allowed reasons for finishing a session.
_REASONS = ("success", "errored", "interrupted")


async def about(call: Call) -> Response:
    """Name and version, for a browser."""
    return reply({"name": "tinkex", "version": call.site.version, "api": wire.PREFIX})


async def healthz(call: Call) -> Response:
    """200 as long as operations run, or will run once the engine has started."""
    scheduler = call.site.ledger.shared.scheduler
    engine = "ready" if scheduler.ready.is_set() else "starting"
    headers = {"X-Tinkex-Version": call.site.version, "X-Tinkex-Engine": engine}
    problem = call.site.ledger.shared.home_problem
    if not scheduler.alive:
        problem = f"the engine is not running: {scheduler.failure}"
    if problem is not None:
        return reply({"error": problem, "category": "server"}, 503, headers)
    return reply({"status": "ok"}, headers=headers)


async def readyz(call: Call) -> Response:
    """200 if operations run now and their results can be stored; else 503 with the reason."""
    shared = call.site.ledger.shared
    shared.check_accepting()
    problem = call.site.store.problem()
    if problem is None and not shared.scheduler.ready.is_set():
        problem = "the engine is starting."
    if problem is not None:
        raise Refusal(503, problem, {"Retry-After": "5"})
    return reply({"status": "ready"})


async def numbers(call: Call) -> Response:
    """Metrics for Prometheus."""
    report = await call.site.in_pool(call.site.ledger.workshop.monitor.report)
    return Response(report, media_type=CONTENT_TYPE)


async def client_config(call: Call) -> Response:
    """Protocol flags, with values for a server with low latency."""
    protobuf = call.site.takes_protobuf
    config = types.ClientConfig(
        proto_compress_fwdbwd=protobuf,
        sample_use_retrieve_futures=True,
        sample_join_sampling_session=True,
        proto_write_fwdbwd=protobuf,
    )
    flags = {name: getattr(config, name) for name in attrs.fields_dict(types.ClientConfig)}
    return reply(
        flags
        | {
            "parallel_fwdbwd_chunks": True,
            "fwd_via_fwdbwd": protobuf,
            "create_model_via_load_weights": True,
            "custom_loss_server_side": False,
        }
    )


async def dynamic_config(call: Call) -> Response:
    return reply(
        {
            "refresh_interval_sec": 300,
            "sample_cancel_enabled": True,
            "sample_cancel_max_batch_size": 64,
        }
    )


async def auth_token(call: Call) -> Response:
    raise not_offered("JWT exchange", "Send the API key itself as X-API-Key.")


async def create_session(call: Call) -> Response:
    request, _ = await call.read(types.CreateSessionRequest)
    key = call.request.headers.get("x-idempotency-key")
    return reply(await call.site.ledger.sessions.create(call.owner, request, key))


async def heartbeat(call: Call) -> Response:
    request, _ = await call.read(types.SessionHeartbeatRequest)
    await call.site.ledger.sessions.live(request.session_id, call.owner)
    return reply({})


async def finish(call: Call) -> Response:
    request, _ = await call.read(types.FinishSessionRequest)
    reason = request.reason.get("type", "success")
    if reason not in _REASONS:
        raise Refusal(
            400, f"reason.type must be one of {', '.join(_REASONS)}, got {shown(reason)}."
        )
    session = await call.site.ledger.sessions.live(call.parameter("session_id"), call.owner)
    await call.site.ledger.end_session(session, f"finished:{reason}", request.detail)
    return reply({})


async def telemetry(call: Call) -> Response:
    """Accept telemetry and discard it."""
    await call.body()
    return reply({"status": "accepted"})


async def list_sessions(call: Call) -> Response:
    limit, offset = call.number("limit", 20, 1000), call.number("offset", 0, 10**12)
    rows, total = await call.site.in_pool(call.site.store.sessions, call.owner, limit, offset)
    ids = [row.session_id for row in rows]
    return reply(types.ListSessionsResponse(ids, types.Cursor(offset, limit, total)))


async def get_session(call: Call) -> Response:
    session_id = call.parameter("session_id")
    pool, store = call.site.in_pool, call.site.store
    row = await pool(store.session, session_id, call.owner)
    runs, samplers = await pool(store.session_members, session_id)
    return reply(
        types.GetSessionResponse(runs, samplers, row.user_metadata or None, row.display_name)
    )


async def set_project(call: Call) -> Response:
    payload = wire.loads(await call.json_body())
    project_id = payload.get("project_id") if isinstance(payload, dict) else None
    if project_id is not None and not isinstance(project_id, str):
        raise Refusal(400, f"project_id must be a string or null, got {shown(project_id)}.")
    await call.site.in_pool(
        call.site.store.set_project, call.parameter("session_id"), call.owner, project_id
    )
    return reply({})


@attrs.frozen
class SearchRequest:
    """Filters for sessions; all given conditions must match."""

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    statuses: list[dict[str, Any]] | None = None
    limit: int = 50
    cursor: dict[str, Any] | None = None


async def search_sessions(call: Call) -> Response:
    request, _ = await call.read(SearchRequest)
    if not 1 <= request.limit <= 1000:
        raise Refusal(400, f"limit must be from 1 to 1000, got {request.limit}.")
    summaries, cursor = await call.site.in_pool(_search, call, request)
    return reply({"sessions": summaries, "next_cursor": cursor})


def _search(
    call: Call, request: SearchRequest
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    rows = _after_cursor(call, request.cursor)
    fitting = [row for row in rows if _fits(row, request)]
    page = fitting[: request.limit]
    following = None
    if len(fitting) > len(page):
        last = page[-1]
        following = {"last_created_at": iso(last.created_at), "last_session_id": last.session_id}
    return [_summary(call, row) for row in page], following


def _after_cursor(call: Call, cursor: dict[str, Any] | None) -> list[SessionRow]:
    """The caller's sessions, newest first, after the last one of the previous page."""
    if cursor is None:
        return call.site.store.sessions_before(call.owner, 2.0**53, "")
    created_at, session_id = cursor.get("last_created_at"), cursor.get("last_session_id")
    try:
        moment = datetime.fromisoformat(str(created_at).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        moment = None
    if moment is None or not isinstance(session_id, str):
        raise Refusal(400, f"cursor must be one that this server returned, got {shown(cursor)}.")
    # The text is rounded to microseconds, so these include the last session itself.
    rows = call.site.store.sessions_before(call.owner, moment + 2e-6, "")
    seen = next((i + 1 for i, row in enumerate(rows) if row.session_id == session_id), 0)
    return rows[seen:]


def _fits(row: SessionRow, request: SearchRequest) -> bool:
    wanted = request.user_metadata or {}
    named = (request.display_name or "").lower().split()
    statuses = [status.get("type") for status in request.statuses or []]
    return (
        request.session_id in (None, row.session_id)
        and all(word in (row.display_name or "").lower() for word in named)
        and (not request.project_ids or row.project_id in request.project_ids)
        and all(row.user_metadata.get(key) == value for key, value in wanted.items())
        and (not statuses or _status(row)["type"] in statuses)
    )


def _status(row: SessionRow) -> dict[str, Any]:
    if row.status == "active":
        return {"type": "active"}
    if row.status.startswith("finished:"):
        reason = row.status.split(":", 1)[1]
        return {"type": "client_finished", "reason": {"type": reason}, "detail": row.detail}
    return {"type": "failed", "category": "server", "reason": row.status, "message": row.detail}


def _summary(call: Call, row: SessionRow) -> dict[str, Any]:
    count, size = call.site.store.checkpoints.session_totals(row.session_id)
    return {
        "session_id": row.session_id,
        "created_at": iso(row.created_at),
        "owner": row.owner,
        "project_id": row.project_id or "",
        "checkpoints_count": count,
        "checkpoint_storage_bytes": size,
        "status": _status(row),
        "display_name": row.display_name,
        "user_metadata": row.user_metadata or None,
    }


async def capabilities(call: Call) -> Response:
    """The base models; their context length is known once they are loaded."""
    bases = call.site.ledger.workshop.loader.bases
    names = dict.fromkeys([*call.site.base_models, *bases])
    models = [
        types.SupportedModel(name, bases[name].max_context_length if name in bases else None)
        for name in names
    ]
    return reply(types.GetServerCapabilitiesResponse(models))


async def me(call: Call) -> Response:
    """The owner of the key."""
    return reply({"user_details": {"email": call.owner}, "org_details": {"name": "tinkex"}})


async def revoke_key(call: Call) -> Response:
    """Revoke the key of the request."""
    await call.site.in_pool(call.site.keys.revoke, header_key(call.request) or "")
    return reply({})


ENDPOINTS: list[tuple[str, str, Any]] = [
    ("POST", "session_heartbeat", heartbeat),
    ("POST", "create_session", create_session),
    ("POST", "client/config", client_config),
    ("POST", "client/dynamic_config", dynamic_config),
    ("POST", "auth/token", auth_token),
    ("GET", "auth/apikey/me", me),
    ("DELETE", "auth/apikey/me", revoke_key),
    ("GET", "get_server_capabilities", capabilities),
    ("POST", "telemetry", telemetry),
    ("POST", "sessions/search", search_sessions),
    ("POST", "sessions/{session_id}/finish", finish),
    ("PUT", "sessions/{session_id}/project", set_project),
    ("GET", "sessions", list_sessions),
    ("GET", "sessions/{session_id}", get_session),
]
PUBLIC: list[tuple[str, str, Any]] = [("GET", "healthz", healthz), ("GET", "readyz", readyz)]
