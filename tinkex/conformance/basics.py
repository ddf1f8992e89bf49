"""Checks that change nothing on the server: basic endpoints, refusals, keys, lists."""

from __future__ import annotations

import time
from urllib.parse import quote

from tinkex import config, wire
from tinkex.conformance.client import Broken, NotOffered, as_object, is_missing, said
from tinkex.conformance.context import Context
from tinkex.conformance.runner import Checks
from tinkex.runtime.responses import Answer

CHECKS = Checks()

#: Endpoints that require the key, each with a body (None: a GET).
_GUARDED: tuple[tuple[str, dict[str, str] | None], ...] = (
    ("get_server_capabilities", None),
    ("training_runs", None),
    ("get_info", {"model_id": "no-such-model", "type": "get_info"}),
    ("retrieve_future", {"request_id": "no-such-request"}),
)
_PATIENCE = 20.0  # seconds for a request without computation


def _refusal(answer: Answer, what: str, *statuses: int) -> None:
    """Raise Broken unless *answer* has one of *statuses*, a body and a Content-Length."""
    if answer.status not in statuses:
        wanted = " or ".join(map(str, statuses))
        raise Broken(f"{what} returned {said(answer)}, not {wanted}")
    if not answer.content:
        raise Broken(f"the {answer.status} on {what} has no body")
    if not answer.headers.get("Content-Length", "").isdigit():
        raise Broken(f"the {answer.status} on {what} has no Content-Length")


@CHECKS.rule("healthz", writes=False)
def healthz(ctx: Context) -> None:
    """GET healthz returns {"status": "ok"} as JSON."""
    answer = ctx.client.endpoint("GET", "healthz")
    if as_object(answer).get("status") != "ok":
        raise Broken(f"the body is {answer.content[:80]!r}")
    if "json" not in answer.headers.get("Content-Type", ""):
        raise Broken(f"Content-Type is {answer.headers.get('Content-Type')!r}")


@CHECKS.rule("client/config", writes=False)
def client_config(ctx: Context) -> str:
    """client/config returns an object of flags. Without it the official SDK (0.18 and later) does
    not start; older servers lack it (Twinkle, tinker-cloud)."""
    payload = {"sdk_version": config.PROTOCOL_VERSION}
    answer = ctx.client.endpoint("POST", "client/config", payload)
    if not isinstance(answer.json(), dict):
        raise Broken(f"the body is {answer.content[:80]!r}")
    return "protobuf" if as_object(answer).get("proto_write_fwdbwd") else ""


@CHECKS.rule("get_server_capabilities", writes=False)
def capabilities(ctx: Context) -> str:
    """The server names the models that can be trained."""
    answer = ctx.client.endpoint("GET", "get_server_capabilities")
    models = as_object(answer).get("supported_models")
    if not isinstance(models, list) or not models:
        raise Broken(f"supported_models is {str(models)[:80]}")
    names = [model.get("model_name") if isinstance(model, dict) else model for model in models]
    if not all(isinstance(name, str) and name for name in names):
        raise Broken(f"a model has no model_name: {str(models)[:120]}")
    return ", ".join(map(str, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


@CHECKS.rule("client/dynamic_config", writes=False)
def dynamic_config(ctx: Context) -> None:
    """client/dynamic_config returns an object, or 404."""
    payload = {"sdk_version": config.PROTOCOL_VERSION}
    answer = ctx.client.endpoint("POST", "client/dynamic_config", payload)
    if not isinstance(answer.json(), dict):
        raise Broken(f"the body is {answer.content[:80]!r}")


@CHECKS.rule("an unknown endpoint is a 404 with a body", writes=False)
def unknown_endpoint(ctx: Context) -> None:
    """Clients learn from the 404 what a server does not offer, so it must arrive, and soon."""
    started = time.monotonic()
    for method, path in (("POST", "no_such_endpoint"), ("GET", "no/such/endpoint")):
        answer = ctx.client.send(
            method, path, b"{}" if method == "POST" else b"", timeout=_PATIENCE
        )
        _refusal(answer, f"{method} {path}", 404)
    if time.monotonic() - started > _PATIENCE:
        raise Broken(f"it took {time.monotonic() - started:.0f} s")


@CHECKS.rule("requests without the right key are refused", writes=False)
def keys(ctx: Context) -> str:
    """Without a key, and with a wrong one, every endpoint returns 401 (or 403). TuFT 0.2.2 serves
    get_server_capabilities without a key."""
    asked, open_to_all = [], []
    for key in ("", "tml-conformance-is-not-a-key"):
        transport = ctx.client.with_key(key)
        for path, body in _GUARDED:
            answer = ctx.client.send(
                "GET" if body is None else "POST",
                path,
                b"" if body is None else wire.dumps(body),
                transport=transport,
            )
            if is_missing(answer):
                continue
            asked.append(path)
            if answer.status not in (401, 403):
                open_to_all.append(f"{path} with {'a wrong' if key else 'no'} key: {answer.status}")
            elif not answer.content:
                raise Broken(f"the {answer.status} on {path} has no body")
    if len(open_to_all) == len(asked):
        raise NotOffered("this server needs no key")
    if open_to_all:
        raise Broken("; ".join(open_to_all))
    return f"{len(asked)} requests"


@CHECKS.rule("a bad body is refused with 400 or 422", writes=False)
def bad_bodies(ctx: Context) -> None:
    """A body that cannot be read is an error of the client, reported with a body and a
    Content-Length (the official SDK takes a 400 without one for a proxy's). Clients would retry a
    5xx for minutes: SkyRL 0.3.0 returns 500 for protobuf that it cannot read."""
    for body in (b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model_id": 5}', b""):
        headers = {"Content-Type": wire.JSON}
        answer = ctx.client.send("POST", "get_info", body, headers, timeout=_PATIENCE)
        _refusal(answer, f"get_info of {body!r}", 400, 422)
    for content_type in (wire.PROTOBUF, wire.JSON):
        headers = {"Content-Type": content_type}
        answer = ctx.client.send("POST", "forward_backward", b"\x0a\xff\xff\xff\xff\x7f", headers)
        _refusal(answer, f"forward_backward of garbage as {content_type}", 400, 404, 415, 422)


@CHECKS.rule("an unknown promise is a 410", writes=False)
def unknown_promise(ctx: Context) -> None:
    """The status of a result that the server does not have, or no longer has, is 410: clients then
    sample again, and training reports what was lost. SkyRL returns 404 or 500, which end a run."""
    for request_id in ("no-such-session:train:0:7", "999999999"):
        answer = ctx.client.poll(request_id, _PATIENCE)
        if answer.status != 410:
            raise Broken(f"{request_id!r} returned {said(answer)}")


@CHECKS.rule("unknown things are 404 with a sentence", writes=False)
def unknown_things(ctx: Context) -> None:
    """An object that does not exist differs from an endpoint that does not exist, and is not a
    server error. TuFT 0.2.2 returns 500 for another user's run."""
    asked = 0
    run = quote("no-such-session:train:0", safe=":")
    for method, path, body in (
        ("POST", "get_info", {"model_id": "no-such-session:train:0", "type": "get_info"}),
        ("POST", "session_heartbeat", {"session_id": "no-such", "type": "session_heartbeat"}),
        ("GET", "samplers/no-such-session:sample:0", None),
        ("GET", f"training_runs/{run}", None),
        ("GET", f"training_runs/{run}/checkpoints/weights/none/archive", None),
        ("POST", "weights_info", {"tinker_path": f"tinker://{run}/weights/none"}),
    ):
        answer = ctx.client.send(method, path, b"" if body is None else wire.dumps(body))
        if is_missing(answer):
            continue
        asked += 1
        _refusal(answer, f"{method} {path}", 404, 410)
    if not asked:
        raise NotOffered("none of the endpoints that read an object")


@CHECKS.rule("stored things are listed", writes=False)
def lists(ctx: Context) -> str:
    """training_runs, checkpoints and sessions are listed in pages of the requested size."""
    offered = []
    for path, field in (
        ("training_runs", "training_runs"),
        ("checkpoints", "checkpoints"),
        ("sessions", "sessions"),
    ):
        answer = ctx.client.get(f"{path}?limit=2&offset=0")
        if is_missing(answer):
            continue
        if answer.status != 200:
            raise Broken(f"GET {path} returned {said(answer)}")
        listed = as_object(answer).get(field)
        if not isinstance(listed, list) or len(listed) > 2:
            raise Broken(f"{path} returned {str(listed)[:80]} for a page of 2")
        offered.append(path)
    if not offered:
        raise NotOffered("none of training_runs, checkpoints, sessions")
    return ", ".join(offered)
