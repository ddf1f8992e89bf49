"""
A training server that lives inside requests: no sockets, no sleeping.

It follows the protocol (numbers in order, each once; a resend gets the first response) and fails
only where a test scripts it. `requests` has the received requests, `executed` the operations in the
order of their execution.

    server = FakeServer()
    server.script("optim_step", status(503), reset())   # the next two go wrong, then all is well
    with session(server) as s: ...
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import ssl
import threading
from collections import defaultdict, deque
from contextlib import closing, contextmanager
from urllib.parse import parse_qsl, unquote, urlsplit

import attrs
import numpy as np
import requests
import urllib3

from tinkex import config, types, wire
from tinkex.runtime.polling import Poller
from tinkex.runtime.session import Session
from tinkex.runtime.transport import Transport
from tinkex.runtime.wait_log import WaitLog
from tinkex.training import TrainingClient

URL = "http://training.test"
MODEL = "s0:train:0"

_HTTPAdapter = requests.adapters.HTTPAdapter  # the real one, even if a test replaces it


class Clock:
    """A clock that advances only by sleeping."""

    def __init__(self):
        self.now = 1000.0
        self.slept = []
        self._lock = threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        with self._lock:
            self.now += seconds
            self.slept.append(seconds)


@attrs.frozen
class Seen:
    """A received request. `body` is decoded: an object for training data, else JSON data."""

    method: str
    path: str
    body: object
    headers: dict
    query: dict
    timeout: object
    raw: bytes
    at: float


# --- what can go wrong --------------------------------------------------------------------------
#
# A fault is called with (server, request, timeout, behave) and answers, or raises what requests
# would raise. `behave()` is what the server would have done.


def status(code, body=None, **headers):
    """An error status; the body is JSON, raw bytes, or empty."""
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}

    def fault(server, request, timeout, behave):
        return server.response(request, code, body, named)

    return fault


def answer(body, **headers):
    """A success with this body."""
    return status(200, body, **headers)


def reset(after_it_ran=False):
    """The connection breaks: before the server has seen the request, or during the response."""

    def fault(server, request, timeout, behave):
        if after_it_ran:
            behave()
        broken = ConnectionResetError(104, "Connection reset by peer")
        raise requests.ConnectionError(
            urllib3.exceptions.ProtocolError("Connection aborted.", broken), request=request
        )

    return fault


def lost():
    """The server executes the request, and the response is lost."""
    return reset(after_it_ran=True)


def _max_retries(request, reason):
    pool = urllib3.HTTPConnectionPool("training.test", 80)
    return urllib3.exceptions.MaxRetryError(pool, request.url, reason)


def refused():
    """The port is closed."""

    def fault(server, request, timeout, behave):
        reason = urllib3.exceptions.NewConnectionError(
            None, "Failed to establish a new connection: [Errno 111] Connection refused"
        )
        raise requests.ConnectionError(_max_retries(request, reason), request=request)

    return fault


def unknown_host():
    def fault(server, request, timeout, behave):
        problem = OSError(-2, "Name or service not known")
        reason = urllib3.exceptions.NameResolutionError("training.test", None, problem)
        raise requests.ConnectionError(_max_retries(request, reason), request=request)

    return fault


def bad_certificate():
    def fault(server, request, timeout, behave):
        problem = ssl.SSLCertVerificationError(
            1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
        )
        reason = urllib3.exceptions.SSLError(problem)
        raise requests.exceptions.SSLError(_max_retries(request, reason), request=request)

    return fault


def no_connection():
    """The host does not answer; the connect timeout passes."""

    def fault(server, request, timeout, behave):
        server.clock.sleep(timeout[0])
        reason = urllib3.exceptions.ConnectTimeoutError(None, "Connection timed out.")
        raise requests.ConnectTimeout(_max_retries(request, reason), request=request)

    return fault


def timeout(after_it_ran=False):
    """The response does not begin in time; the read timeout passes."""

    def fault(server, request, timeout, behave):
        if after_it_ran:
            behave()
        server.clock.sleep(timeout[1])
        raise requests.ReadTimeout(f"Read timed out. (read timeout={timeout[1]})", request=request)

    return fault


def garbage(body=b"<html>Please log in</html>", content_type="text/html"):
    """A success that violates the protocol."""
    return status(200, body, **{"Content-Type": content_type})


def half_protobuf():
    """The first half of the right answer."""

    def fault(server, request, timeout, behave):
        whole = behave().content
        return server.response(
            request, 200, whole[: len(whole) // 2], {"Content-Type": wire.PROTOBUF}
        )

    return fault


def cut(after):
    """A file that is cut off after a number of bytes."""

    def fault(server, request, timeout, behave):
        return server._file(request, server.files[request.url], after)

    return fault


def blocked(entered, released, then=None):
    """The response (*then*, or the normal one) waits until a test sets an Event."""

    def fault(server, request, timeout, behave):
        entered.set()
        if not released.wait(20):
            raise AssertionError("this request was never released")
        return behave() if then is None else then(server, request, timeout, behave)

    return fault


def as_usual():
    return lambda server, request, timeout, behave: behave()


# --- "not yet", in all its forms ----------------------------------------------------------------


def try_again(state="active", reason=None, **more):
    body = {"type": "try_again", "request_id": "r", "queue_state": state, **more}
    if reason is not None:
        body["queue_state_reason"] = reason
    return answer(body)


def pending():
    return answer({"status": "pending"})


def not_yet_408(state=None, reason=None):
    body = None if state is None else {"queue_state": state, "queue_state_reason": reason}
    return status(408, body)


def after(seconds, fault):
    """A long poll: the time passes, then this response."""

    def slow(server, request, timeout, behave):
        server.clock.sleep(seconds)
        return fault(server, request, timeout, behave)

    return slow


def metadata_only(size):
    return answer({"status": "complete_metadata", "response_payload_size": size})


# --- the server ---------------------------------------------------------------------------------


@attrs.define
class _Stored:
    """An operation that was accepted."""

    request_id: str
    path: str
    result: object
    not_yet: int
    turn: tuple | None  # (model id, seq_id) of what must run in order
    what: str


class FakeServer(requests.adapters.BaseAdapter):
    """
    Args:
        features: content of client/config; None: the endpoint does not exist (404).
        protobuf: whether training data and results may be protobuf.
        not_yet: most "not yet" answers before a result; how many is drawn by *seed*.
        lacks: paths that this server does not offer.
        immediate: paths that answer with the result instead of a promise.
    """

    def __init__(
        self, *, features=(), protobuf=True, not_yet=0, seed=0, lacks=(), immediate=(), clock=None
    ):
        super().__init__()
        self.clock = clock or Clock()
        self.features = None if features is None else dict(features)
        self.protobuf = protobuf
        self.lacks = set(lacks)
        self.immediate = set(immediate)
        self.requests = []
        #: (model id, seq_id, path) in the order in which they ran.
        self.executed = []
        #: Results to give instead of the usual ones: path -> a body, or a function of the request.
        self.results = {}
        #: Stored things: (method, path) -> (status, body) or a function of the request.
        self.stored = {}
        #: Archives and other files, at any URL: url -> bytes.
        self.files = {}
        self.not_yet = not_yet
        self._random = random.Random(seed)
        self._scripts = defaultdict(deque)
        self._always = {}
        self._lock = threading.RLock()  # guards all state
        self._operations = {}
        self._by_turn = {}
        self._forms = itertools.cycle(
            [try_again(), not_yet_408(), pending(), not_yet_408("active"), try_again("active")]
        )
        self._sessions = itertools.count()
        self._numbers = itertools.count()
        self._next = defaultdict(lambda: 1)
        self._held = defaultdict(dict)

    # For tests.

    def script(self, path, *faults):
        """The next requests to *path* get these responses."""
        self._scripts[path].extend(faults)

    def always(self, path, fault):
        """All later requests to *path* get this response; None restores the normal behaviour."""
        self._always[path] = fault

    def seen(self, *paths):
        """The requests to *paths*, in order."""
        with self._lock:
            return [seen for seen in self.requests if seen.path in paths]

    def bodies(self, *paths):
        return [seen.body for seen in self.seen(*paths)]

    def seq_ids(self):
        """Of all requests for the model, in order of arrival."""
        return [b["seq_id"] if isinstance(b, dict) else b.seq_id for b in self._numbered()]

    def _numbered(self):
        with self._lock:
            bodies = [seen.body for seen in self.requests if seen.path != "asample"]
        return [b for b in bodies if (b.get("seq_id") if isinstance(b, dict) else b.seq_id)]

    def forget(self, request_id):
        """Lose a promise and its result."""
        with self._lock:
            stored = self._operations.pop(request_id, None)
            if stored is not None:
                self._by_turn = {k: v for k, v in self._by_turn.items() if v is not stored}

    # What requests calls.

    def send(self, request, stream=False, timeout=None, verify=True, cert=None, proxies=None):
        if not isinstance(timeout, tuple):
            timeout = (timeout, timeout)
        seen = self._note(request, timeout)
        with self._lock:
            script = self._scripts.get(seen.path)
            fault = script.popleft() if script else self._always.get(seen.path)
        if fault is not None:
            return fault(self, request, timeout, lambda: self._behave(request, seen))
        return self._behave(request, seen)

    def close(self):
        pass

    def response(self, request, code, body=None, headers=None):
        headers = dict(headers or {})
        if body is None:
            content = b""
        elif isinstance(body, bytes):
            content = body
        else:
            content = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        raw = urllib3.HTTPResponse(
            body=io.BytesIO(content), headers=headers, status=code, preload_content=False
        )
        return _HTTPAdapter.build_response(self, request, raw)

    # Inside.

    def _note(self, request, timeout):
        parts = urlsplit(request.url)
        path = parts.path.removeprefix("/api/v1/")
        if f"{parts.scheme}://{parts.netloc}" != URL:
            path = request.url
        raw = request.body or b""
        seen = Seen(
            request.method,
            unquote(path),
            _decoded(request, raw),
            dict(request.headers),
            dict(parse_qsl(parts.query)),
            timeout,
            raw,
            self.clock(),
        )
        with self._lock:
            self.requests.append(seen)
        return seen

    def _behave(self, request, seen):
        with self._lock:
            if seen.path in self.lacks:
                return self.response(request, 404, {"detail": "Not Found"})
            if seen.path in self.files:
                return self._file(request, self.files[seen.path])
            if (seen.method, seen.path) in self.stored:
                found = self.stored[seen.method, seen.path]
                found = found(seen) if callable(found) else found
                return self.response(request, *found)
            name = seen.path.replace("/", "_")
            if seen.path.startswith("sessions/") and seen.path.endswith("/finish"):
                return self.response(request, 200, {})
            handler = getattr(self, f"_on_{name}", None)
            if handler is None:
                return self.response(request, 404, {"detail": "Not Found"})
            reply = handler(seen)
            if isinstance(reply, tuple):
                return self.response(request, *reply)
            if callable(reply):
                return reply(self, request, None, None)
            return self.response(request, 200, reply)

    def _file(self, request, content, cut=None):
        """The file, or the requested range; *cut* is the number of bytes that are really sent."""
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"Content-Length": str(len(content) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] if cut is None else content[start : start + cut]
        return self.response(request, 206 if start else 200, body, headers)

    # Sessions.

    def _on_client_config(self, seen):
        return (404, {"detail": "Not Found"}) if self.features is None else self.features

    def _on_create_session(self, seen):
        return {"session_id": f"s{next(self._sessions)}"}

    def _on_session_heartbeat(self, seen):
        return {}

    def _on_telemetry(self, seen):
        return {"status": "accepted"}

    def _on_healthz(self, seen):
        return {"status": "ok"}

    def _on_get_server_capabilities(self, seen):
        return {"supported_models": [{"model_name": "tiny"}]}

    def _on_auth_token(self, seen):
        return {"jwt": "eyJ.e30.x"}

    # Models.

    def _on_create_model(self, seen):
        body = seen.body
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        return self._promise(seen, {"model_id": model_id}, key=("model", model_id))

    def _on_get_info(self, seen):
        data = {"model_name": "tinkex/tiny", "tokenizer_id": None}
        return {"model_id": seen.body["model_id"], "model_data": data, "lora_rank": 32}

    def _on_weights_info(self, seen):
        return {"base_model": "tiny", "is_lora": True, "lora_rank": 8, "train_mlp": False}

    def _on_unload_model(self, seen):
        return self._promise(seen, {"model_id": seen.body["model_id"]})

    # Training.

    def _on_forward(self, seen):
        return self._batch(seen)

    def _on_forward_backward(self, seen):
        if not self.protobuf and wire.PROTOBUF in seen.headers.get("Content-Type", ""):
            return 415, {"detail": "Unsupported media type"}
        return self._batch(seen)

    def _batch(self, seen):
        batch = seen.body
        if not self.protobuf and not isinstance(batch, types.ForwardBackwardRequest):
            return 422, {"detail": "this is not a batch"}
        what = "forward" if batch.forward_only else "forward_backward"
        turn = (batch.model_id, batch.seq_id)
        return self._promise(seen, lambda: loss_of(batch), key=turn, turn=turn, what=what)

    def _on_optim_step(self, seen):
        return self._in_order(seen, {"metrics": {}, "field_from_the_future": 1})

    def _on_save_weights(self, seen):
        model, name = seen.body["model_id"], seen.body["path"]
        return self._in_order(seen, {"path": f"tinker://{model}/weights/{name}"})

    def _on_load_weights(self, seen):
        body = seen.body
        if "model_id" in body:
            return self._in_order(seen, {"path": body["path"], "model_id": body["model_id"]})
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        result = {"path": body["path"], "model_id": model_id}
        return self._promise(seen, result, key=("model", model_id))

    def _on_save_weights_for_sampler(self, seen):
        body = seen.body
        if "path" in body:
            path = f"tinker://{body['model_id']}/sampler_weights/{body['path']}"
            return self._in_order(seen, {"path": path})
        number = body["sampling_session_seq_id"]
        return self._in_order(seen, {"sampling_session_id": f"sampler-{number}"})

    def _in_order(self, seen, result):
        turn = (seen.body["model_id"], seen.body["seq_id"])
        return self._promise(seen, result, key=turn, turn=turn)

    # Sampling.

    def _on_create_sampling_session(self, seen):
        return {"sampling_session_id": f"sampler-{seen.body['sampling_session_seq_id']}"}

    def _on_join_sampling_session(self, seen):
        return {"client_counter": 7}

    def _on_asample(self, seen):
        body = seen.body
        key = ("sample", body["sampling_session_id"], body["seq_id"])
        return self._promise(seen, lambda: samples_of(body), key=key)

    # Promises.

    def _promise(self, seen, result, *, key=None, turn=None, what=None):
        stored = self._by_turn.get(key) if key is not None else None
        if stored is None:
            result = self.results.get(seen.path, result)
            result = result(seen) if callable(result) and seen.path in self.results else result
            request_id = f"{seen.path}-{next(self._numbers)}"
            stored = _Stored(
                request_id,
                seen.path,
                result,
                self._random.randint(0, self.not_yet),
                turn,
                what or seen.path,
            )
            self._operations[request_id] = stored
            if key is not None:
                self._by_turn[key] = stored
            if turn is not None:
                self._run_in_order(*turn, stored)
        if seen.path in self.immediate:
            return _value(stored)
        return {"request_id": stored.request_id}

    def _run_in_order(self, model_id, seq_id, stored):
        """Execute strictly by number; early operations are held."""
        held = self._held[model_id]
        held[seq_id] = stored
        while self._next[model_id] in held:
            number = self._next[model_id]
            self.executed.append((model_id, number, held.pop(number).what))
            self._next[model_id] += 1

    def _on_retrieve_future(self, seen):
        stored = self._operations.get(seen.body["request_id"])
        if stored is None:
            return 410, {"detail": "the promise is gone"}
        model_id, seq_id = stored.turn or (None, 0)
        if stored.not_yet or (stored.turn and self._next[model_id] <= seq_id):
            stored.not_yet = max(0, stored.not_yet - 1)
            return next(self._forms)
        value = _value(stored)
        binary = isinstance(value, (types.ForwardBackwardOutput, types.SampleResponse))
        if binary and self.protobuf and wire.PROTOBUF in seen.headers.get("Accept", ""):
            return 200, wire.encode_result(value), {"Content-Type": wire.PROTOBUF}
        return wire.to_json(value) if binary else value

    def _on_retrieve_futures(self, seen):
        """Everything finished and not yet acknowledged, whatever the cursor."""
        for request_id in seen.body["retrieved_request_ids"]:
            self._operations.pop(request_id, None)
        done = [
            {"state": "finished", "request_id": stored.request_id}
            for stored in self._operations.values()
            if stored.path == "asample"
        ]
        return {"completions": done, "cursor": seen.body["prev_cursor"] + len(done)}

    def _on_cancel_future(self, seen):
        return {}


def _value(stored):
    return stored.result() if callable(stored.result) else stored.result


def _decoded(request, raw):
    if not raw:
        return None
    kind = request.headers.get("Content-Type", "")
    try:
        if wire.PROTOBUF in kind:
            return wire.decode_request(kind, raw)
        body = json.loads(raw)
    except ValueError:
        return raw
    if "forward_input" in body or "forward_backward_input" in body:
        return wire.decode_request(wire.JSON, raw)
    return body


def logprobs_of(datum):
    """The log-probabilities of a datum's targets: -1/16 for token 0, -2/16 for 1, ..."""
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    return (-(1.0 + targets % 16) / 16).astype(np.float32)


def loss_of(batch):
    """-sum(w lp), whatever the loss function."""
    outputs, total = [], 0.0
    for datum in batch.data:
        logprobs = logprobs_of(datum)
        weights = datum.loss_fn_inputs.get("weights")
        weights = np.ones_like(logprobs) if weights is None else weights.to_numpy()
        total -= float((weights * logprobs).sum())
        outputs.append({"logprobs": types.TensorData(logprobs)})
    return types.ForwardBackwardOutput(
        outputs, {"loss:sum": total, "datums:sum": float(len(batch.data))}, "ArrayRecord"
    )


def samples_of(body):
    """The reversed prompt, for each sample."""
    tokens = [t for chunk in body["prompt"]["chunks"] for t in chunk["tokens"]]
    most = body["sampling_params"].get("max_tokens") or len(tokens)
    sequence = types.SampledSequence(tokens[::-1][:most], [-0.5] * len(tokens[::-1][:most]))
    prompt = [None, *[-0.25] * (len(tokens) - 1)] if body.get("prompt_logprobs") else None
    return types.SampleResponse([sequence] * body["num_samples"], prompt)


# --- clients of it ------------------------------------------------------------------------------


def settings(**options):
    options.setdefault("base_url", URL)
    return config.Config(**options)


def transport(server, **options):
    """A Transport to *server* on the server's clock."""
    own = settings(**options)
    waits = WaitLog(own.patience.report_after, own.patience.report_every, clock=server.clock)
    return Transport(own, adapter=server, waits=waits, sleep=server.clock.sleep, clock=server.clock)


@contextmanager
def session(server, heartbeat=False, **options):
    """A Session on *server*, with its clock, which advances only by sleeping."""
    way = transport(server, **options)
    made = Session(
        way.config,
        transport=way,
        poller=Poller(way, sleep=server.clock.sleep, clock=server.clock),
        heartbeat=heartbeat,
    )
    with closing(made):
        yield made


@contextmanager
def training(server, **options):
    """A TrainingClient of an existing model; it has sent nothing yet."""
    client = {k: options.pop(k) for k in ("queue_state_observer", "base_model") if k in options}
    with session(server, **options) as s, TrainingClient(s, MODEL, **client) as made:
        yield made


def plugged_in(monkeypatch, server):
    """Redirect all HTTP through requests, and all sleeping, to *server*."""
    monkeypatch.setattr("tinkex.runtime.http_session.KeptConnections", lambda **_: server)
    for name in [name for name in os.environ if name.startswith("TINKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TINKER_BASE_URL", URL)


def datum(*tokens, weights=None):
    """Tokens to read and to predict."""
    tokens = tokens or (1, 2, 3)
    given = [1.0] * len(tokens) if weights is None else weights
    return types.Datum(
        types.ModelInput.from_ints(list(tokens)),
        {"target_tokens": [t + 1 for t in tokens], "weights": given},
    )
