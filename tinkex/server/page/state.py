"""The data of the page for one user: their runs and sessions, and the server's health."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import attrs

from tinkex.server.database import CheckpointRow, RunRow, SessionRow, iso
from tinkex.server.openai.events import event
from tinkex.server.request_context import Call
from tinkex.server.run_metrics import Point

#: How many of the newest of each are shown.
_MOST_RUNS, _MOST_SESSIONS, _MOST_SAMPLES = 100, 20, 50

_STARTED = time.monotonic()


@attrs.define(eq=False)
class _Seen:
    """The cached overview of one user: the event, and until when it is valid."""

    payload: dict[str, Any] | None = None
    encoded: bytes = b""
    until: float = 0.0
    lock: asyncio.Lock = attrs.field(factory=asyncio.Lock)


async def overview_event(call: Call) -> bytes:
    """The overview as a "state" event, built at most twice a second for all of a user's pages.

    The same object as before if nothing has changed.
    """
    seen: _Seen = call.site.pages.setdefault(call.owner, _Seen())
    async with seen.lock:
        if time.monotonic() >= seen.until:
            payload = await overview(call)
            if payload != seen.payload:
                seen.payload, seen.encoded = payload, event(payload, "state")
            seen.until = time.monotonic() + call.site.limits.page_seconds / 2
    return seen.encoded


async def overview(call: Call) -> dict[str, Any]:
    """The newest runs and sessions of the caller, current work, usage and health."""
    shared = call.site.ledger.shared
    load = shared.scheduler.load()
    runs, latest, sampled, saved, sessions = await call.site.in_pool(_stored, call)
    own = {row.run_id for row in runs}
    running = load.running
    if running is not None and running not in own:
        running = "another user's model"
    usage = call.site.ledger.workshop.metrics.usage(call.owner)
    return {
        "server": _health(call)
        | {"operations": sum(load.waiting.values()), "samples": load.samples},
        "running": running,
        "owner": call.owner,
        "usage": attrs.asdict(usage),
        "runs": [
            _run(row, load.waiting.get(row.run_id, 0), latest[row.run_id])
            | {"checkpoints": saved.get(row.run_id, 0), "samples": sampled[row.run_id]}
            for row in runs
        ],
        "sessions": [_session(row) for row in sessions],
        "base_models": list(
            dict.fromkeys([*call.site.base_models, *call.site.ledger.workshop.loader.bases])
        ),
    }


def _stored(
    call: Call,
) -> tuple[list[RunRow], dict[str, Point], dict[str, int], dict[str, int], list[SessionRow]]:
    store, metrics = call.site.store, call.site.ledger.workshop.metrics
    runs, _ = store.runs(call.owner, _MOST_RUNS, 0)
    sessions, _ = store.sessions(call.owner, _MOST_SESSIONS, 0)
    latest = {row.run_id: metrics.latest(row.run_id) for row in runs}
    sampled = {row.run_id: metrics.sampled_at(row.run_id) for row in runs}
    return runs, latest, sampled, store.checkpoints.counts(call.owner), sessions


def _run(row: RunRow, waiting: int, latest: Point) -> dict[str, Any]:
    return {
        "id": row.run_id,
        "base_model": row.base_model,
        "rank": row.rank,
        "created": iso(row.created_at),
        "waiting": waiting,
        "latest": latest,
        "metadata": row.user_metadata or {},
    }


def _session(row: SessionRow) -> dict[str, Any]:
    return {
        "id": row.session_id,
        "name": row.display_name or "",
        "created": iso(row.created_at),
        "status": row.status,
    }


async def run_details(call: Call, run_id: str) -> dict[str, Any]:
    """Settings, samples and checkpoints of a run. Raises Refusal (404)."""
    store, metrics = call.site.store, call.site.ledger.workshop.metrics
    row = await call.site.in_pool(store.run, run_id, call.owner)
    checkpoints = await call.site.in_pool(store.checkpoints.of_run, run_id, call.owner)
    trained = [
        name
        for name, is_on in (
            ("attention", row.train_attn),
            ("MLP", row.train_mlp),
            ("lm_head", row.train_unembed),
        )
        if is_on
    ]
    return {
        "settings": {
            "Base model": row.base_model,
            "LoRA rank": row.rank,
            "Trained": ", ".join(trained),
            "Session": row.session_id,
            "Created": iso(row.created_at),
            **{str(name): str(value) for name, value in (row.user_metadata or {}).items()},
        },
        "samples": (await call.site.in_pool(metrics.samples, run_id))[: -_MOST_SAMPLES - 1 : -1],
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in checkpoints],
    }


def _checkpoint(row: CheckpointRow) -> dict[str, Any]:
    return {
        "id": row.checkpoint_id,
        "path": row.path,
        "kind": row.kind,
        "bytes": row.size_bytes,
        "created": iso(row.created_at),
        "expires": None if row.expires_at is None else iso(row.expires_at),
        "public": row.public,
    }


def _health(call: Call) -> dict[str, Any]:
    shared = call.site.ledger.shared
    engine = "running" if shared.scheduler.ready.is_set() else "starting"
    problem = shared.home_problem
    if not shared.scheduler.alive:
        engine, problem = "failed", str(shared.scheduler.failure)
    return {
        "version": call.site.version,
        "engine": engine,
        "problem": problem,
        "memory_bytes": resident_bytes(),
        "threads": threading.active_count(),
        "minutes": int(time.monotonic() - _STARTED) // 60,
    }


def resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
