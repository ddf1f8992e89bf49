"""Statuses of our server beside those of TuFT: the same requests, and why an answer differs.

TuFT's are read from its published package, `tuft` 0.2.2 (server.py, compat.py, exceptions.py;
bodies are checked by FastAPI); those of ours come from requests that test_statuses.py sends.
`python -m tests.official_sdk.statuses` writes the table into docs/compatibility.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import zstandard

from tests.official_sdk import page
from tests.support.wire_client import WireClient, batch
from tinkex import wire

TUFT = "0.2.2"

_BODY = "a bad body, see above"
_HIDDEN = "another user's things look like things that do not exist"
_AGAIN = "a resend has the same number: it gets the promise of the first one, and runs once"
_BOTH = "both dialects are offered"
_FAILED = "the form of the official service: 200 with `error` and `category`, raised by every SDK"
_TOLERANT = "fields of newer SDKs are ignored where they ask for nothing"


@attrs.frozen
class World:
    """What the requests are sent to.

    Attributes:
        client: with a good key; `model` (next number 1) and `sampler` are its own.
        theirs: of another user.
        stranger: with an unknown key; `keyless` has none.
        decoded_bytes: limit of a body after decompression.
    """

    client: WireClient
    theirs: WireClient
    stranger: WireClient
    keyless: WireClient
    session: str
    model: str
    decoded_bytes: int


Send = Callable[[World], Any]


@attrs.frozen
class Row:
    """One request. ours and tuft: statuses; *why* says why they differ, "" where they do not."""

    what: str
    tuft: int
    ours: int
    why: str
    send: Send = attrs.field(eq=False)


def post(path: str, json: Any = None, **kwargs: Any) -> Send:
    """A POST by the client with a good key; texts that begin with "@" are fields of the world."""

    def send(world: World) -> Any:
        given = {k: getattr(world, v[1:]) if _is_name(v) else v for k, v in (json or {}).items()}
        return world.client.send("POST", path, given if json is not None else None, **kwargs)

    return send


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.startswith("@")


def raw(path: str, body: Callable[[World], bytes], kind: str, encoding: str | None = None) -> Send:
    headers = {"Content-Type": kind, **({"Content-Encoding": encoding} if encoding else {})}
    return lambda world: world.client.send("POST", path, data=body(world), headers=headers)


def result_of(send: Send) -> Send:
    """The answer to the poll for what was promised."""

    def poll(world: World) -> Any:
        promise = send(world).json()
        return world.client.send("POST", "retrieve_future", {"request_id": promise["request_id"]})

    return poll


def _trained(
    loss_fn: str = "cross_entropy", targets: tuple[int, ...] = (1, 2)
) -> Callable[[World], bytes]:
    def body(world: World) -> bytes:
        request = batch(world.model, 1, targets)
        return wire.encode_request(attrs.evolve(request, loss_fn=loss_fn), protobuf=True)[-1]

    return body


_STEP = {"model_id": "@model", "seq_id": 1, "adam_params": {"learning_rate": 0.1}}


def _twice(world: World) -> Any:
    post("optim_step", _STEP)(world)
    return post("optim_step", _STEP)(world)


ROWS = (
    Row("no API key", 401, 401, "", lambda w: w.keyless.send("POST", "create_session", {})),
    Row(
        "an unknown API key",
        403,
        401,
        "AuthenticationError, as of the official service; 403 is for a key that is known",
        lambda w: w.stranger.send("POST", "create_session", {}),
    ),
    Row(
        "a body that is no JSON",
        422,
        400,
        _BODY,
        raw("optim_step", lambda w: b'{"model_id": ', wire.JSON),
    ),
    Row("a field is missing", 422, 400, _BODY, post("optim_step", {"seq_id": 1})),
    Row(
        "a field has a wrong type",
        422,
        400,
        _BODY,
        post("optim_step", {**_STEP, "seq_id": "one"}),
    ),
    Row("a field is unknown", 422, 200, _TOLERANT, post("optim_step", {**_STEP, "flux": None})),
    Row(
        "forward_backward as JSON",
        415,
        200,
        _BOTH,
        raw(
            "forward_backward",
            lambda w: wire.encode_request(batch(w.model, 1, [1, 2]), protobuf=False)[-1],
            wire.JSON,
        ),
    ),
    Row(
        "forward_backward as text/plain",
        415,
        415,
        "",
        raw("forward_backward", lambda w: b"hello", "text/plain"),
    ),
    Row(
        "protobuf that cannot be parsed",
        422,
        400,
        _BODY,
        raw("forward_backward", lambda w: b"\xff\xff\xff", wire.PROTOBUF),
    ),
    Row(
        "a loss function that is unknown",
        422,
        200,
        "the operation takes its number and fails; on TuFT the numbers of all later ones are wrong",
        raw("forward_backward", _trained("no_such_loss"), wire.PROTOBUF),
    ),
    Row(
        "zstd that cannot be decompressed",
        422,
        400,
        _BODY,
        raw("forward_backward", lambda w: b"no zstd", wire.PROTOBUF, "zstd"),
    ),
    Row(
        "a Content-Encoding that is unknown",
        422,
        415,
        "the status that HTTP has for it (RFC 9110, 15.5.16)",
        raw("forward_backward", _trained(), wire.PROTOBUF, "br"),
    ),
    Row(
        "a body that is too large once it is decompressed",
        413,
        413,
        "",
        raw(
            "forward_backward",
            lambda w: zstandard.compress(bytes(w.decoded_bytes + 1)),
            wire.PROTOBUF,
            "zstd",
        ),
    ),
    Row(
        "a model that is unknown",
        404,
        404,
        "",
        post("optim_step", {**_STEP, "model_id": "none:train:0"}),
    ),
    Row(
        "a model of another user",
        403,
        404,
        _HIDDEN,
        lambda w: w.theirs.send("POST", "optim_step", {**_STEP, "model_id": w.model}),
    ),
    Row(
        "a session that is unknown",
        404,
        404,
        "",
        post("session_heartbeat", {"session_id": "none"}),
    ),
    Row("a number that was used already", 409, 200, _AGAIN, _twice),
    Row(
        "a number that leaves some out",
        409,
        200,
        "it waits for them: requests may overtake one another on their way",
        post("optim_step", {**_STEP, "seq_id": 9}),
    ),
    Row(
        "the result of loading a checkpoint that does not exist",
        404,
        200,
        _FAILED,
        result_of(
            post(
                "load_weights", {"model_id": "@model", "seq_id": 1, "path": "tinker://r/weights/n"}
            )
        ),
    ),
    Row(
        "the result of an operation that raised in the server",
        422,
        200,
        _FAILED,
        result_of(raw("forward_backward", _trained(targets=(666,)), wire.PROTOBUF)),
    ),
    Row(
        "a result that is unknown",
        404,
        410,
        "the official service's status for a promise that is gone; SDKs name it",
        post("retrieve_future", {"request_id": "none"}),
    ),
    Row(
        "a base model that is unknown",
        404,
        200,
        "models are loaded as an operation, whose result has the reason",
        post(
            "create_model",
            {
                "session_id": "@session",
                "model_seq_id": 7,
                "base_model": "none/none",
                "lora_config": {"rank": 4},
            },
        ),
    ),
    Row("an endpoint that is not there", 404, 404, "", post("no_such_endpoint", {})),
)

HEAD = """
## Statuses beside those of TuFT

The same requests to our server (a test sends them) and to TuFT {version}, the other server of this
API for one's own machines (from its published package). SDKs of every version repeat a request
after 408, 409, 429 and 5xx, and raise after any other status; so no request that cannot succeed
gets one of these from us. Whatever is wrong with a body is a 400 here, with one sentence:
BadRequestError in every SDK. TuFT's 422 has FastAPI's list of errors, which SDKs print as it is.

"""


def section() -> str:
    """The part of docs/compatibility.md."""
    rows = [[row.what, str(row.tuft), str(row.ours), row.why] for row in ROWS]
    return HEAD.format(version=TUFT) + page.table(["Request", "TuFT", "Here", "Why"], rows)


if __name__ == "__main__":
    page.write("statuses", section())
