"""
Servers that deviate from the API in known ways, over real HTTP: `with OddServer(Quirks()) as odd`.

All of them train the same unigram model, so the same script must give the same numbers on all of
them. Operations run in order of arrival, unless the quirks order them by number. `KNOWN` are the
observed quirks of existing servers.
"""

from __future__ import annotations

import base64
import itertools
import json
import threading
import time
from collections import Counter
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import attrs
import numpy as np

from tinkex import types, wire

VOCABULARY = 128


@attrs.frozen
class Quirks:
    """
    Deviations of a server; the defaults follow the protocol.

    Attributes:
        lacks: missing endpoints; lacking: their status.
        protobuf: None if it is accepted; else the status for a protobuf body.
        only_protobuf: JSON batches get 415.
        results_in_json: results are JSON even if the client accepts protobuf.
        numbered: numbers must arrive in order, and a repeat is a 409 (else they are ignored).
        immediate: endpoints that answer with the result instead of a promise.
        request_ids: str or int.
        create_names_model: create_model answers with the model's id beside the promise.
        model_ids: "session" for <session>:train:<n>, "hex" for its own names.
        sequence_ids: whether the promise of samples names them.
        sampler_segment: whether paths of sampler weights have the segment sampler_weights.
        failures: how a failed operation is reported: 200 with error and category, or 400, or 500.
        metrics: "sum" for loss:sum, "none" for {}, "odd" for a name without a reduction.
        optim_metrics: metrics of optim_step.
        wrapped: results come as {"status": "completed", "result": ...}.
        not_yet: the responses to the first polls, before a result.
        hold: seconds that a poll is held when there is no result yet; work: seconds till there is.
        restores_at_once: whether load_weights makes a model.
        gradients: "sum", "mean" over the weights, "last" batch only, or "always", in a forward
            pass, too.
        samplers: "frozen", "live" (they follow the training), or "one slot": a sample sets the
            model to the sampler's weights.
        optimizer: restored as "asked", "always" or "never".
        same_name: "refused" or "overwritten".
        lost: the status of an unknown promise; once: results are given once.
        prompt_logprobs: "aligned", or "short" by the first.
        strict: unknown fields in requests are a 422.
        pause: seconds of every response.
        tokens: requests need a token of this server's, which it gives for the credential in
            `credentials`.
        flags: content of client/config.
    """

    lacks: frozenset[str] = attrs.field(default=frozenset(), converter=frozenset)
    lacking: int = 404
    protobuf: int | None = None
    only_protobuf: bool = False
    results_in_json: bool = False
    numbered: bool = False
    immediate: frozenset[str] = attrs.field(default=frozenset(), converter=frozenset)
    request_ids: type = str
    create_names_model: bool = False
    model_ids: str = "session"
    sequence_ids: bool = True
    sampler_segment: bool = True
    failures: int = 200
    metrics: str = "sum"
    optim_metrics: object = attrs.field(factory=dict)
    wrapped: bool = False
    not_yet: tuple = ()
    hold: float = 0.0
    work: float = 0.0
    restores_at_once: bool = True
    gradients: str = "sum"
    samplers: str = "frozen"
    optimizer: str = "asked"
    same_name: str = "refused"
    lost: int = 410
    once: bool = False
    prompt_logprobs: str = "aligned"
    strict: bool = False
    pause: float = 0.0
    tokens: bool = False
    flags: dict = attrs.field(factory=dict)


TRY_AGAIN = (200, {"type": "try_again", "request_id": "r", "queue_state": "active"})
PENDING = (200, {"status": "pending"})
TIMEOUT = (408, {"detail": "Timeout waiting for result"})
EMPTY = (408, None)

MANAGEMENT = frozenset(
    {"training_runs", "checkpoints", "sessions", "weights_info", "archive", "publish", "ttl"}
)
NEWER = frozenset({"finish", "retrieve_futures", "cancel_future", "join_sampling_session"})

#: Existing servers, as far as their behaviour is known.
KNOWN = {
    "the protocol itself": Quirks(),
    "SkyRL 0.3.0": Quirks(
        lacks=NEWER | {"checkpoints", "sessions", "ttl", "publish"},
        protobuf=500,
        results_in_json=True,
        create_names_model=True,
        model_ids="hex",
        sequence_ids=False,
        sampler_segment=False,
        failures=400,
        metrics="none",
        optim_metrics={"skyrl.ai/grad_norm": 1.0},
        hold=10.0,
        work=0.02,
        restores_at_once=False,
        prompt_logprobs="short",
    ),
    "SkyRL of today": Quirks(
        lacks=NEWER | {"checkpoints", "sessions", "ttl", "publish"},
        model_ids="hex",
        create_names_model=True,
        sequence_ids=False,
        sampler_segment=False,
        failures=400,
        metrics="none",
        restores_at_once=False,
        prompt_logprobs="short",
    ),
    "TuFT 0.2.2": Quirks(
        lacks=NEWER | {"forward", "ttl"},
        only_protobuf=True,
        numbered=True,
        optim_metrics=None,
        restores_at_once=False,
        strict=True,
    ),
    "Twinkle": Quirks(
        lacks=NEWER | {"client/config", "samplers", "weights_info", "sessions", "ttl"},
        protobuf=422,
        results_in_json=True,
        restores_at_once=False,
    ),
    "tinker-cloud": Quirks(
        lacks=NEWER | {"client/config", "healthz", "training_runs", "ttl", "publish"},
        protobuf=415,
        results_in_json=True,
        failures=500,
        restores_at_once=False,
        not_yet=(PENDING, TRY_AGAIN),
    ),
    "open-rl": Quirks(
        lacks=NEWER | MANAGEMENT | {"samplers", "forward", "unload_model"},
        protobuf=422,
        results_in_json=True,
        request_ids=int,
        restores_at_once=False,
    ),
}

#: One oddity at a time.
SINGLE = {
    "no client/config": Quirks(lacks={"client/config"}),
    "no heartbeats": Quirks(lacks={"session_heartbeat"}),
    "no samplers/{id}": Quirks(lacks={"samplers"}),
    "no unload_model": Quirks(lacks={"unload_model"}),
    "no finish": Quirks(lacks={"finish"}),
    "everything at once, without promises": Quirks(
        immediate={
            "create_model",
            "forward",
            "forward_backward",
            "optim_step",
            "save_weights",
            "save_weights_for_sampler",
            "load_weights",
            "asample",
            "unload_model",
        }
    ),
    "polls held longer than the client waits": Quirks(hold=10.0, work=0.25),
    "failures as HTTP 400": Quirks(failures=400),
    "failures as HTTP 500": Quirks(failures=500),
    "protobuf is 415": Quirks(protobuf=415, results_in_json=True),
    "protobuf is 422": Quirks(protobuf=422, results_in_json=True),
    "protobuf is 500": Quirks(protobuf=500, results_in_json=True),
    "protobuf is 400": Quirks(protobuf=400, results_in_json=True),
    "protobuf in, JSON out": Quirks(results_in_json=True),
    "protobuf alone": Quirks(only_protobuf=True),
    "samples without names": Quirks(sequence_ids=False),
    "sampler paths without segment": Quirks(sampler_segment=False),
    "metrics {}": Quirks(metrics="none"),
    "metrics without reduction": Quirks(metrics="odd"),
    "optimizer metrics of any name": Quirks(optim_metrics={"a": 1, "b:c:d": 2.5, "skyrl.ai/x": 3}),
    "optimizer metrics null": Quirks(optim_metrics=None),
    "numbers counted, repeats refused": Quirks(numbered=True),
    "request ids that are numbers": Quirks(request_ids=int),
    "create_model names the model": Quirks(create_names_model=True),
    "its own model ids": Quirks(model_ids="hex", restores_at_once=False),
    "every kind of not yet": Quirks(not_yet=(TRY_AGAIN, PENDING, TIMEOUT, EMPTY)),
    "results in a wrapper": Quirks(wrapped=True, results_in_json=True),
    "load_weights into a model only": Quirks(restores_at_once=False),
    "prompt logprobs without the first": Quirks(prompt_logprobs="short"),
    "unknown fields are a 422": Quirks(strict=True),
}


class Refused(Exception):
    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


@attrs.define
class Weights:
    """Logits of each token, the gradient that is accumulated, and Adam's two moments."""

    logits: np.ndarray = attrs.field(factory=lambda: np.linspace(0, 1, VOCABULARY))
    moments: np.ndarray = attrs.field(factory=lambda: np.zeros((2, VOCABULARY)))
    steps: int = 0
    gradient: np.ndarray = attrs.field(factory=lambda: np.zeros(VOCABULARY))
    expected: int = 1

    def logprobs(self):
        return self.logits - np.log(np.exp(self.logits).sum())

    def copy(self, optimizer):
        if not optimizer:
            return Weights(self.logits.copy())
        return Weights(self.logits.copy(), self.moments.copy(), self.steps)

    def step(self, learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, **_):
        self.steps += 1
        m, v = self.moments
        m += (1 - beta1) * (self.gradient - m)
        v += (1 - beta2) * (self.gradient**2 - v)
        m_hat, v_hat = m / (1 - beta1**self.steps), v / (1 - beta2**self.steps)
        self.logits = self.logits - learning_rate * m_hat / (np.sqrt(v_hat) + eps)
        self.gradient = np.zeros(VOCABULARY)


@attrs.define
class Done:
    """An operation that has run; polls get its result from `at` on."""

    result: object
    failure: str | None
    at: float
    polls: int = 0


class OddServer:
    """Use it as a context manager; `seen` counts requests by endpoint, `bodies` keeps them."""

    def __init__(self, quirks=None):
        self.quirks = quirks or Quirks()
        self.seen = Counter()
        self.bodies = []
        self.headers = []
        #: By endpoint: the most requests in progress at a time.
        self.at_once = Counter()
        self.credentials = set()
        self.tokens = []
        self._under_way = Counter()
        self._lock = threading.RLock()
        self._models, self._samplers, self._saved, self._origins = {}, {}, {}, {}
        self._done = {}
        self._ids = itertools.count(1)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._closing = threading.Event()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self):
        serve = lambda: self._http.serve_forever(0.02)  # noqa: E731
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _handler(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16
            disable_nagle_algorithm = True

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                status, body, kind = outer.answer(
                    self.command, self.path, self.rfile.read(length), self.headers
                )
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    if status == 401 and b"invalid_token" in body:
                        self.send_header("WWW-Authenticate", 'Bearer error="invalid_token"')
                    self.end_headers()
                    self.wfile.write(body)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True  # the client has given this poll up

            do_GET = do_DELETE = do_PUT = do_POST

            def log_message(self, *args):
                pass

        return Handler

    # One request.

    def answer(self, method, path, body, headers):
        path = unquote(path.removeprefix("/api/v1/").split("?")[0])
        name = self._endpoint(path)
        with self._lock:
            self.seen[name] += 1
            self.headers.append((name, headers))
            self._under_way[name] += 1
            self.at_once[name] = max(self.at_once[name], self._under_way[name])
        if self.quirks.pause:
            self._closing.wait(self.quirks.pause)
        try:
            reply = self._reply(method, name, path, body, headers)
        except Refused as refused:
            reply = refused.status, {"detail": str(refused)}
        except (ValueError, KeyError, AttributeError, TypeError) as exc:
            reply = 400, {"detail": f"{type(exc).__name__}: {exc}"}
        with self._lock:
            self._under_way[name] -= 1
        status, payload = reply
        if isinstance(payload, bytes):
            return status, payload, wire.PROTOBUF
        content = b"" if payload is None else json.dumps(payload).encode()
        return status, content, wire.JSON

    def _endpoint(self, path):
        parts = path.split("/")
        if parts[0] in ("client", "auth"):
            return path
        for last in ("finish", "archive", "publish", "ttl"):
            if parts[-1] == last:
                return last
        return parts[0]

    def _reply(self, method, name, path, body, headers):
        if name in self.quirks.lacks:
            return self.quirks.lacking, {"detail": HTTPStatus(self.quirks.lacking).phrase}
        self._check_key(name, headers.get("X-API-Key"))
        if name in ("forward", "forward_backward"):
            request = self._batch(name, body, headers)
        else:
            request = json.loads(body) if body else {}
        with self._lock:
            self.bodies.append((name, request))
        if name == "retrieve_future":
            return self._retrieve(request, headers)
        handler = getattr(self, "_on_" + name.replace("/", "_"), None)
        if handler is None:
            return 404, {"detail": "Not Found"}
        with self._lock:
            return 200, handler(request, path)

    def _check_key(self, name, key):
        if not self.quirks.tokens or name == "client/config":
            return
        if name == "auth/token":
            if key not in self.credentials:
                raise Refused(401, "this credential is not known")
        elif key not in self.tokens[-1:]:
            raise Refused(401, "invalid_token")

    def _on_auth_token(self, request, path):
        """A token for a minute."""
        now = int(time.time())
        claims = json.dumps({"iat": now, "exp": now + 60, "n": len(self.tokens)}).encode()
        self.tokens.append(f"eyJh.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.sig")
        return {"jwt": self.tokens[-1]}

    def _batch(self, name, body, headers):
        kind = headers.get("Content-Type", "")
        quirks = self.quirks
        if wire.PROTOBUF in kind and quirks.protobuf is not None:
            if quirks.protobuf == 500:
                raise Refused(500, "Internal Server Error")
            raise Refused(quirks.protobuf, "Input should be a valid dictionary")
        if wire.PROTOBUF not in kind and quirks.only_protobuf:
            raise Refused(415, "send application/x-protobuf")
        return wire.decode_request(kind, body)

    # Sessions and lookups.

    def _on_client_config(self, request, path):
        return self.quirks.flags

    def _on_healthz(self, request, path):
        return {"status": "ok"}

    def _on_get_server_capabilities(self, request, path):
        return {"supported_models": [{"model_name": "tiny"}]}

    def _on_create_session(self, request, path):
        known = {"tags", "user_metadata", "sdk_version", "project_id", "display_name", "type"}
        self._check_fields(request, known)
        return {"session_id": f"session-{next(self._ids)}", "type": "create_session"}

    def _check_fields(self, request, known):
        extra = set(request) - known
        if self.quirks.strict and extra:
            raise Refused(422, f"extra fields are not permitted: {', '.join(sorted(extra))}")

    def _on_session_heartbeat(self, request, path):
        return {}

    def _on_finish(self, request, path):
        return {}

    def _on_telemetry(self, request, path):
        return {"status": "accepted"}

    def _on_get_info(self, request, path):
        self._model(request["model_id"])
        data = {"model_name": "tiny", "tokenizer_id": None}
        return {"model_id": request["model_id"], "model_data": data}

    def _on_weights_info(self, request, path):
        self._checkpoint(request["tinker_path"])
        return {"base_model": "tiny", "is_lora": True, "lora_rank": 4}

    def _on_training_runs(self, request, path):
        runs = [
            {"training_run_id": i, "base_model": "tiny", "model_owner": "default", "is_lora": True,
             "last_request_time": "2026-01-01T00:00:00Z"}
            for i in self._models
        ]  # fmt: skip
        return {
            "training_runs": runs,
            "cursor": {"offset": 0, "limit": 20, "total_count": len(runs)},
        }

    def _on_archive(self, request, path):
        _, run, _, *checkpoint, _ = path.split("/")
        if len(checkpoint) != 1 + self.quirks.sampler_segment:
            raise Refused(404, "Not Found")
        return {"url": f"http://files.test/{run}/{checkpoint[-1]}.tar"}

    def _on_checkpoints(self, request, path):
        return {"checkpoints": [], "cursor": {"offset": 0, "limit": 20, "total_count": 0}}

    def _on_sessions(self, request, path):
        return {"sessions": []}

    def _on_samplers(self, request, path):
        sampler_id = path.split("/", 1)[1]
        if sampler_id not in self._samplers:
            raise Refused(404, "Sampler not found")
        return {"sampler_id": sampler_id, "base_model": "tiny"}

    # Models.

    def _model(self, model_id):
        if model_id not in self._models:
            raise Refused(404, "Model not found")
        return self._models[model_id]

    def _checkpoint(self, path):
        if path not in self._saved:
            raise Refused(404, f"Checkpoint not found: {path}")
        return self._saved[path]

    def _on_create_model(self, request, path):
        known = {"session_id", "model_seq_id", "base_model", "user_metadata", "lora_config", "type"}
        self._check_fields(request, known)
        model_id = f"{request['session_id']}:train:{request['model_seq_id']}"
        if self.quirks.model_ids == "hex":
            model_id = f"model_{next(self._ids):08x}"
        self._models[model_id] = Weights()
        more = {"model_id": model_id, "status": "created"} if self.quirks.create_names_model else {}
        return self._promise("create_model", {"model_id": model_id}, **more)

    def _on_unload_model(self, request, path):
        self._model(request["model_id"])
        return self._promise("unload_model", {"model_id": request["model_id"]})

    def _turn(self, request):
        """The model of a numbered request, whose turn it is."""
        get = request.get if isinstance(request, dict) else lambda key: getattr(request, key)
        model, number = self._model(get("model_id")), get("seq_id")
        if self.quirks.numbered:
            if number != model.expected:
                raise Refused(409, f"sequence conflict: expected {model.expected}, got {number}")
            model.expected += 1
        return model

    def _on_forward(self, request, path):
        return self._on_forward_backward(request, path)

    def _on_forward_backward(self, request, path):
        model = self._turn(request)
        if request.loss_fn != "cross_entropy":
            return self._promise("forward_backward", None, failure="there is no such loss")
        targets = [datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in request.data]
        if max(int(one.max()) for one in targets) >= VOCABULARY:
            return self._promise("forward_backward", None, failure="a token is out of range")
        logprobs = model.logprobs()
        outputs, loss = [], 0.0
        for datum in request.data:
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
            weights = datum.loss_fn_inputs["weights"].to_numpy().astype(float)
            loss -= float((weights * logprobs[targets]).sum())
            outputs.append({"logprobs": types.TensorData(logprobs[targets].astype(np.float32))})
            if not request.forward_only or self.quirks.gradients == "always":
                gradient = weights.sum() * np.exp(logprobs)
                np.subtract.at(gradient, targets, weights)
                if self.quirks.gradients == "mean":
                    gradient /= max(abs(weights.sum()), 1e-9)
                kept = 0.0 if self.quirks.gradients == "last" else model.gradient
                model.gradient = kept + gradient
        metrics = {"sum": {"loss:sum": loss}, "none": {}, "odd": {"loss:sum": loss, "time": 1.0}}
        result = types.ForwardBackwardOutput(outputs, metrics[self.quirks.metrics])
        return self._promise("forward_backward", result)

    def _on_optim_step(self, request, path):
        self._turn(request).step(**request["adam_params"])
        return self._promise("optim_step", {"metrics": self.quirks.optim_metrics})

    def _on_save_weights(self, request, path):
        model = self._turn(request)
        saved = f"tinker://{request['model_id']}/weights/{request['path']}"
        if saved in self._saved and self.quirks.same_name == "refused":
            if self.quirks.numbered:
                raise Refused(409, f"Checkpoint {request['path']!r} already exists")
            return self._promise("save_weights", None, failure="the name is taken")
        self._saved[saved] = model.copy(optimizer=True)
        return self._promise("save_weights", {"path": saved, "type": "save_weights"})

    def _on_save_weights_for_sampler(self, request, path):
        known = {"model_id", "path", "seq_id", "sampling_session_seq_id", "ttl_seconds",
                 "user_metadata", "type"}  # fmt: skip
        self._check_fields(request, known)
        model = self._turn(request)
        if request.get("path") is None:
            sampler_id = f"sampling_{next(self._ids)}"
            self._samplers[sampler_id] = self._sampler_of(model)
            return self._promise("save_weights_for_sampler", {"sampling_session_id": sampler_id})
        segment = "sampler_weights/" if self.quirks.sampler_segment else ""
        saved = f"tinker://{request['model_id']}/{segment}{request['path']}"
        self._saved[saved] = self._sampler_of(model)
        return self._promise("save_weights_for_sampler", {"path": saved})

    def _sampler_of(self, model):
        if self.quirks.samplers == "live":
            return model
        frozen = model.copy(optimizer=False)
        self._origins[id(frozen)] = model, frozen
        return frozen

    def _on_load_weights(self, request, path):
        if "model_id" not in request:
            if not self.quirks.restores_at_once:
                raise Refused(422, "model_id: Field required")
            model_id = f"{request['session_id']}:train:{request['model_seq_id']}"
            self._models[model_id] = self._loaded(request)
            return self._promise("load_weights", {"model_id": model_id, "path": request["path"]})
        model = self._turn(request)
        if request["path"] not in self._saved:
            failure = f"there is no checkpoint {request['path']}"
            return self._promise("load_weights", None, failure=failure)
        saved = self._loaded(request)
        model.logits, model.moments, model.steps = saved.logits, saved.moments, saved.steps
        return self._promise("load_weights", {"type": "load_weights"})

    def _loaded(self, request):
        wanted = {"asked": request["optimizer"], "always": True, "never": False}
        return self._checkpoint(request["path"]).copy(wanted[self.quirks.optimizer])

    # Samples.

    def _on_create_sampling_session(self, request, path):
        sampler_id = f"sampling_{next(self._ids)}"
        source = request.get("model_path")
        weights = Weights() if source is None else self._checkpoint(source)
        self._samplers[sampler_id] = weights
        return {"sampling_session_id": sampler_id}

    def _on_asample(self, request, path):
        known = {"sampling_session_id", "seq_id", "num_samples", "prompt", "sampling_params",
                 "prompt_logprobs", "topk_prompt_logprobs", "type"}  # fmt: skip
        self._check_fields(request, known)
        if request["sampling_session_id"] not in self._samplers:
            raise Refused(404, "Sampling session not found")
        weights = self._samplers[request["sampling_session_id"]]
        if self.quirks.samplers == "one slot" and id(weights) in self._origins:
            self._origins[id(weights)][0].logits = weights.logits.copy()
        logprobs = weights.logprobs()
        count = request["sampling_params"].get("max_tokens", 4)
        best = int(logprobs.argmax())
        sequence = types.SampledSequence([best] * count, [float(logprobs[best])] * count)
        prompt = None
        if request["prompt_logprobs"]:
            tokens = [t for chunk in request["prompt"]["chunks"] for t in chunk["tokens"]]
            prompt = [None, *(float(logprobs[t]) for t in tokens[1:])]
            prompt = prompt[1:] if self.quirks.prompt_logprobs == "short" else prompt
        result = types.SampleResponse([sequence] * request["num_samples"], prompt)
        names = [f"s{i}" for i in range(request["num_samples"])]
        more = {"sample_sequence_ids": names} if self.quirks.sequence_ids else {}
        return self._promise("asample", result, **more)

    # Promises.

    def _promise(self, name, result, failure=None, **more):
        if name in self.quirks.immediate and failure is None:
            return result if isinstance(result, dict) else wire.to_json(result)
        request_id = self.quirks.request_ids(next(self._ids))
        self._done[str(request_id)] = Done(result, failure, time.monotonic() + self.quirks.work)
        return {"request_id": request_id, **more}

    def _retrieve(self, request, headers):
        with self._lock:
            done = self._done.get(str(request["request_id"]))
            if done is None:
                return self.quirks.lost, {"detail": "the promise is gone"}
            done.polls += 1
            if self.quirks.once:
                del self._done[str(request["request_id"])]
            polls = done.polls
        if polls <= len(self.quirks.not_yet):
            return self.quirks.not_yet[polls - 1]
        held_until = time.monotonic() + self.quirks.hold
        if done.at > time.monotonic():
            # A server that holds polls checks for results periodically, and only the last poll sees
            # them.
            self._closing.wait(min(done.at, held_until) - time.monotonic())
            if self.quirks.hold and done.at > time.monotonic():
                return TIMEOUT
        if done.failure is not None:
            if self.quirks.failures == 200:
                return 200, {"error": done.failure, "category": "user"}
            return self.quirks.failures, {"detail": done.failure}
        return 200, self._shown(done.result, headers)

    def _shown(self, result, headers):
        if isinstance(result, dict):
            payload = result
        elif wire.PROTOBUF in headers.get("Accept", "") and not self.quirks.results_in_json:
            return wire.encode_result(result)
        else:
            payload = wire.to_json(result)
        return {"status": "completed", "result": payload} if self.quirks.wrapped else payload
