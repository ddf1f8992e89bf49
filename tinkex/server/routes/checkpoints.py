"""Training runs and checkpoints: listing, publishing, expiry, copies, deletion."""

from __future__ import annotations

import uuid
from typing import Any

import attrs
from starlette.responses import Response

from tinkex import types, wire
from tinkex.server.request_context import Call, reply
from tinkex.server.routes.training import check_ttl


async def list_runs(call: Call) -> Response:
    limit, offset = call.number("limit", 20, 1000), call.number("offset", 0, 10**12)
    pool, store = call.site.in_pool, call.site.store
    project_id = call.request.query_params.get("project_id")
    rows, total = await pool(store.runs, call.owner, limit, offset, project_id)
    runs = [await pool(store.training_run, row) for row in rows]
    return reply(types.TrainingRunsResponse(runs, types.Cursor(offset, limit, total)))


async def get_run(call: Call) -> Response:
    pool, store = call.site.in_pool, call.site.store
    row = await pool(store.run, call.parameter("run_id"), call.owner)
    return reply(await pool(store.training_run, row))


async def run_checkpoints(call: Call) -> Response:
    rows = await call.site.in_pool(
        call.site.store.checkpoints.of_run, call.parameter("run_id"), call.owner
    )
    return reply(types.CheckpointsListResponse([row.public_form() for row in rows]))


async def list_checkpoints(call: Call) -> Response:
    limit, offset = call.number("limit", 100, 1000), call.number("offset", 0, 10**12)
    rows, total = await call.site.in_pool(
        call.site.store.checkpoints.of_owner, call.owner, limit, offset
    )
    listed = [row.public_form() for row in rows]
    return reply(types.CheckpointsListResponse(listed, types.Cursor(offset, limit, total)))


def checkpoint_path(call: Call) -> str:
    """The tinker path of the checkpoint in the URL."""
    run_id, checkpoint_id = call.parameter("run_id"), call.parameter("checkpoint_id")
    return f"tinker://{run_id}/{checkpoint_id}"


async def delete_checkpoint(call: Call) -> Response:
    await call.site.in_pool(call.site.store.checkpoints.delete, checkpoint_path(call), call.owner)
    return reply({})


async def publish(call: Call) -> Response:
    await call.site.in_pool(
        call.site.store.checkpoints.publish, checkpoint_path(call), call.owner, True
    )
    return reply({})


async def unpublish(call: Call) -> Response:
    await call.site.in_pool(
        call.site.store.checkpoints.publish, checkpoint_path(call), call.owner, False
    )
    return reply({})


async def set_ttl(call: Call) -> Response:
    request, _ = await call.read(types.SetTtlRequest)
    check_ttl(request.ttl_seconds)
    await call.site.in_pool(
        call.site.store.checkpoints.set_ttl, checkpoint_path(call), call.owner, request.ttl_seconds
    )
    return reply({})


async def weights_info(call: Call) -> Response:
    request, _ = await call.read(types.WeightsInfoRequest)
    row = await call.site.in_pool(call.site.store.checkpoints.find, request.tinker_path, call.owner)
    return reply(
        types.WeightsInfoResponse(
            base_model=row.base_model,
            lora_rank=row.rank,
            train_unembed=row.train_unembed,
            train_mlp=row.train_mlp,
            train_attn=row.train_attn,
            optimizer_config={"type": "adamw"},
        )
    )


@attrs.frozen
class CopyRequest:
    """Copy a checkpoint into a run of the caller, in a session or outside a session."""

    source_path: str
    session_id: str | None = None
    model_seq_id: int | None = None
    destination_project_id: str | None = None
    ttl_seconds: int | None = None
    weights_access_token: str | None = attrs.field(default=None, repr=False)


async def copy_weights(call: Call) -> Response:
    """Copy a checkpoint. A repeat with the same session and number does not copy again."""
    request, _ = await call.read(CopyRequest)
    check_ttl(request.ttl_seconds)
    ledger, store = call.site.ledger, call.site.store
    token = call.request.headers.get(wire.WEIGHTS_ACCESS_TOKEN, request.weights_access_token)
    reader = None if token is None else call.site.keys.reader(token)
    if request.session_id is None or request.model_seq_id is None:
        # Clients repeat the key only when they resend the same request.
        key = call.request.headers.get("x-idempotency-key") or str(uuid.uuid4())
        run = uuid.uuid5(uuid.NAMESPACE_OID, f"{call.owner} {key}")
        run_id, session_id = f"copy-{run}:train:0", ""
    else:
        session = await ledger.sessions.live(request.session_id, call.owner)
        session_id = session.session_id
        run_id = f"{session_id}:train:{request.model_seq_id}"
        session.claim_model(request.model_seq_id, f"copy:{request.source_path}")
    path = await call.site.in_pool(
        store.checkpoints.copy,
        request.source_path,
        call.owner,
        run_id,
        session_id,
        request.ttl_seconds,
        reader,
    )
    return reply({"tinker_path": path})


_RUN = "training_runs/{run_id}"
#: A checkpoint id contains a slash.
CHECKPOINT = f"{_RUN}/checkpoints/{{checkpoint_id:path}}"

ENDPOINTS: list[tuple[str, str, Any]] = [
    ("GET", "training_runs", list_runs),
    ("GET", f"{_RUN}/checkpoints", run_checkpoints),
    ("POST", f"{CHECKPOINT}/publish", publish),
    ("DELETE", f"{CHECKPOINT}/publish", unpublish),
    ("PUT", f"{CHECKPOINT}/ttl", set_ttl),
    ("DELETE", CHECKPOINT, delete_checkpoint),
    ("GET", _RUN, get_run),
    ("GET", "checkpoints", list_checkpoints),
    ("POST", "weights_info", weights_info),
    ("POST", "copy_weights", copy_weights),
]
