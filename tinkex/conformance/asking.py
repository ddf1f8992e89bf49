"""How a check asks a server: bare requests, answers with their status, results waited for.

Unlike the SDK it numbers nothing by itself, sends nothing again and hides no status: order, repeats
and refusals are what the checks are about. Knows nothing of what a right answer is.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import attrs
import numpy as np
import requests

from .. import config, errors, types, wire
from ..answers import Answer, error_detail
from ..retry import ONCE
from ..session import Connection
from ..transport import Transport

T = TypeVar("T")

#: Every status is an answer to look at.
_ANY_STATUS = frozenset(range(300, 600))

#: Seconds that one poll may take; the protocol's clients give up here.
POLL_SECONDS = 45.0

#: Of the adapters that are made.
RANK = 8

#: How an unknown endpoint is told from an unknown thing.
_MISSING = (404, 405, 501)


class Broken(Exception):
    """The server does not keep the rule; says how."""


class NotOffered(Exception):
    """The rule does not apply: the server has no such feature, or it was not asked for."""


@attrs.frozen
class Ended:
    """How an operation ended.

    Attributes:
        answer: the last answer of the server about it.
        request_id: its handle; "" if it was refused at once, or answered without one.
        refused: whether it was refused when it was sent.
        failure: the server's sentence, if it was refused or failed; else None.
        payload: the decoded JSON; None for a protobuf result.
    """

    answer: Answer
    request_id: str
    refused: bool
    failure: str | None
    payload: Any

    def value(self, result: type[T], what: str) -> T:
        """The result. Raises Broken if there is none, or it does not fit."""
        if self.failure is not None:
            when = "was refused" if self.refused else "failed"
            raise Broken(f"{what} {when} ({self.answer.status}): {self.failure}")
        try:
            if self.payload is None:
                decoded: T = wire.decode_result(result, self.answer.content)  # type: ignore[type-var]
                return decoded
            payload = self.payload
            if payload.get("status") == "completed" and "result" in payload:
                payload = payload["result"]
            return wire.from_json(result, payload)
        except ValueError as exc:
            raise Broken(f"the result of {what} cannot be read: {exc}") from exc


class _FreshConnections(requests.adapters.HTTPAdapter):
    """A connection for each request: one that the server has closed meanwhile would look like its
    failure, and must not be asked twice."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            return super().send(*args, **kwargs)
        finally:
            self.poolmanager.clear()


class Asker:
    """One key's way to a server.

    Args:
        patience: seconds to wait for the result of one operation.
    """

    def __init__(self, settings: config.Config, patience: float) -> None:
        transport = Transport(settings, adapter=_FreshConnections())
        self.connection = Connection(settings, transport=transport)
        self.patience = patience
        self._transport = self.connection.transport
        #: Whether batches go as protobuf; found out with the first.
        self.protobuf = self.connection.features.proto_write_fwdbwd
        #: Checkpoints that were made, to be removed at the end.
        self.saved: list[str] = []

    def with_key(self, key: str) -> Transport:
        """Another key on the same server, for requests that should be refused."""
        settings = attrs.evolve(self.connection.config, api_key=key)
        transport = Transport(settings, adapter=_FreshConnections())
        transport.established = True
        return transport

    def send(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float = 60.0,
        transport: Transport | None = None,
    ) -> Answer:
        """One request under /api/v1/, once, whatever its answer; *path* goes as it is.

        Raises:
            TinkexError: If no answer comes.
        """
        transport = transport or self._transport
        return transport.send(
            method,
            transport.config.base_url + wire.PREFIX + path,
            body,
            headers=headers,
            timeout=timeout,
            retry=ONCE,
            accept=_ANY_STATUS,
            parse=lambda answer: answer,
        )

    def post(self, path: str, payload: Any = None, **options: Any) -> Answer:
        return self.send("POST", path, wire.dumps({} if payload is None else payload), **options)

    def get(self, path: str, **options: Any) -> Answer:
        return self.send("GET", path, **options)

    def endpoint(self, method: str, path: str, payload: Any = None) -> Answer:
        """The success of an endpoint that not every server has.

        Raises:
            NotOffered: If this one does not.
            Broken: If it refuses.
        """
        body = b"" if payload is None else wire.dumps(payload)
        answer = self.send(method, path, body)
        if is_missing(answer):
            raise NotOffered(f"{answer.status} on {method} {path.split('?')[0]}")
        if answer.status >= 300:
            raise Broken(f"{method} {path.split('?')[0]} gave {said(answer)}")
        return answer

    # Promises.

    def poll(self, request_id: str, timeout: float = POLL_SECONDS, **more: Any) -> Answer:
        """Ask once for a result."""
        return self.post(
            wire.RETRIEVE_FUTURE.path,
            {"request_id": request_id, **more},
            headers={"Accept": f"{wire.PROTOBUF}, {wire.JSON}"},
            timeout=timeout,
        )

    def wait(self, request_id: str, seconds: float | None = None) -> Answer:
        """Poll until there is an answer other than "not yet".

        Raises:
            Broken: If there is none within *seconds*.
        """
        limit = self.patience if seconds is None else seconds
        deadline = time.monotonic() + limit
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = self.poll(request_id, min(left, POLL_SECONDS))
            except errors.APITimeoutError:
                continue
            if not is_not_yet(answer):
                return answer
            time.sleep(0.02)
        raise Broken(f"no result of {request_id} within {limit:.0f} s")

    def is_done(self, request_id: str, within: float = 1.0) -> bool:
        """Whether there is a result by now, or soon."""
        try:
            return not is_not_yet(self.poll(request_id, within))
        except errors.APITimeoutError:
            return False

    def end(self, answer: Answer, seconds: float | None = None) -> Ended:
        """How the operation ends whose sending gave *answer*."""
        if answer.status >= 300:
            return Ended(answer, "", True, said(answer), {})
        request_id = request_id_of(answer)
        if not request_id:
            return Ended(answer, "", False, _failure(answer), answer.json())
        last = self.wait(request_id, seconds)
        return Ended(
            last, request_id, False, _failure(last), None if last.is_protobuf else as_object(last)
        )


def request_id_of(answer: Answer) -> str:
    """The handle in a promise; "" where the answer is none."""
    if answer.status >= 300:
        return ""
    value = as_object(answer).get("request_id")
    return "" if value is None else str(value)


def is_not_yet(answer: Answer) -> bool:
    """Whether a poll says that there is no result yet, in any of the ways in use."""
    if answer.status in (408, 429):
        return True
    if answer.status != 200 or answer.is_protobuf:
        return False
    payload = as_object(answer)
    return payload.get("type") == "try_again" or payload.get("status") == "pending"


def is_missing(answer: Answer) -> bool:
    """Whether the server does not have the endpoint, rather than the thing."""
    if answer.status not in _MISSING:
        return False
    sentence = sentence_of(answer).lower()
    return (
        not sentence
        or sentence.rstrip(".") in ("not found", "method not allowed")
        or "does not offer" in sentence
    )


def as_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in *answer*; {} where it holds something else."""
    try:
        payload = answer.json()
    except errors.APIResponseValidationError:
        return {}
    return payload if isinstance(payload, dict) else {}


def sentence_of(answer: Answer) -> str:
    """What the server says in an error body."""
    if answer.is_protobuf:
        return ""
    payload = as_object(answer)
    return error_detail(payload or answer.content[:300].decode("utf-8", "replace"))


def said(answer: Answer) -> str:
    """Status and sentence, for a reason."""
    sentence = sentence_of(answer)
    sentence = sentence if len(sentence) <= 160 else sentence[:157] + "..."
    return f"{answer.status}{f' ({sentence})' if sentence else ' without a word'}"


def _failure(answer: Answer) -> str | None:
    if answer.status >= 300:
        return said(answer)
    if answer.is_protobuf:
        return None
    payload = as_object(answer)
    if payload.get("error") is None and payload.get("status") != "failed":
        return None
    return sentence_of(answer) or "no reason given"


# --- models and samplers ------------------------------------------------------------------------


class Model:
    """A model on the server. `number` is the number of its last operation; checks may give others.

    The methods that return an `Answer` send one request; the others wait for its result.
    """

    def __init__(self, asker: Asker, model_id: str, session_id: str) -> None:
        self.asker = asker
        self.model_id = model_id
        self.session_id = session_id
        self.number = 0

    def next(self, count: int = 1) -> int:
        """Take *count* numbers; the first of them."""
        self.number += count
        return self.number - count + 1

    def post(self, endpoint: str, number: int | None = None, /, **fields: Any) -> Answer:
        """One numbered request in JSON."""
        number = self.next() if number is None else number
        payload = {"model_id": self.model_id, "seq_id": number, **fields, "type": endpoint}
        return self.asker.post(endpoint, payload)

    def batch(
        self,
        data: Sequence[types.Datum],
        number: int | None = None,
        *,
        forward_only: bool = False,
        loss_fn: str = "cross_entropy",
        protobuf: bool | None = None,
        compress: bool = False,
    ) -> Answer:
        """One batch, in the dialect that the server takes."""
        number = self.next() if number is None else number
        request = types.ForwardBackwardRequest(
            self.model_id, number, list(data), loss_fn, forward_only=forward_only
        )
        asker = self.asker
        if protobuf is not None:
            return self._send(request, protobuf, compress)
        if asker.protobuf is None:
            answer = self._send(request, True)
            asker.protobuf = answer.status not in (400, 415, 422, 500)
            if asker.protobuf:
                return answer
        return self._send(request, asker.protobuf)

    def _send(
        self, request: types.ForwardBackwardRequest, protobuf: bool, compress: bool = False
    ) -> Answer:
        path, content_type, _, body = wire.encode_request(request, protobuf)
        headers = {"Content-Type": content_type}
        if compress:
            body, headers["Content-Encoding"] = zstd_frame(body), "zstd"
        return self.asker.send("POST", path, body, headers)

    def step(self, number: int | None = None, /, **params: float) -> Answer:
        """One optimizer step; *params* are AdamW's."""
        adam = attrs.asdict(types.AdamParams(**params))
        return self.post("optim_step", number, adam_params=adam)

    # The same, to their end.

    def run(self, answer: Answer, what: str) -> Any:
        """The JSON of an operation that must work."""
        ended = self.asker.end(answer)
        if ended.failure is not None:
            ended.value(dict, what)  # raises
        return ended.payload

    def output(self, answer: Answer, what: str = "forward_backward") -> types.ForwardBackwardOutput:
        return self.asker.end(answer).value(types.ForwardBackwardOutput, what)

    def forward(self, data: Sequence[types.Datum]) -> types.ForwardBackwardOutput:
        return self.output(self.batch(data, forward_only=True), "forward")

    def train(
        self, data: Sequence[types.Datum], learning_rate: float = 0.01, **params: float
    ) -> None:
        """forward_backward and a step."""
        self.output(self.batch(data))
        self.run(self.step(learning_rate=learning_rate, **params), "optim_step")

    def logprobs(self, data: Sequence[types.Datum]) -> np.ndarray:
        """Of the targets of *data*, one after another, under the current weights."""
        return logprobs_of(self.forward(data), data)

    def save(self, name: str, **fields: Any) -> str:
        """The path of a checkpoint."""
        return self._saved("save_weights", name, **fields)

    def save_for_sampler(self, name: str) -> str:
        """The path of weights for samplers."""
        return self._saved("save_weights_for_sampler", name)

    def _saved(self, endpoint: str, name: str, **fields: Any) -> str:
        ended = self.asker.end(self.post(endpoint, path=name, **fields))
        path = ended.value(types.SaveWeightsForSamplerResponse, endpoint).path
        if not path:
            raise Broken(f"{endpoint} of {name!r} gave no path")
        self.asker.saved.append(path)
        return path


class Sampler:
    """A sampling session on the server."""

    def __init__(self, asker: Asker, sampler_id: str) -> None:
        self.asker = asker
        self.sampler_id = sampler_id
        self._number = -1

    def post(
        self,
        prompt: Sequence[int],
        num_samples: int = 1,
        number: int | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> Answer:
        """One request for samples; *params* over max_tokens 8, *fields* beside the prompt."""
        if number is None:
            self._number += 1
            number = self._number
        sampling = {"max_tokens": 8, "temperature": 1.0, "top_k": -1, "top_p": 1.0}
        payload = {
            "sampling_session_id": self.sampler_id,
            "seq_id": number,
            "num_samples": num_samples,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            "sampling_params": {**sampling, **(params or {})},
            "prompt_logprobs": False,
            "topk_prompt_logprobs": 0,
            **fields,
            "type": "sample",
        }
        return self.asker.post("asample", payload)

    def sample(
        self, prompt: Sequence[int], num_samples: int = 1, **options: Any
    ) -> types.SampleResponse:
        answer = self.post(prompt, num_samples, **options)
        return self.asker.end(answer).value(types.SampleResponse, "asample")

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """(N - 1,): log-probability of each token but the first, however the server aligns them."""
        response = self.sample(tokens, params={"max_tokens": 1}, prompt_logprobs=True)
        if response.prompt_logprobs_np is None:
            raise NotOffered("no prompt log-probabilities, by which this is seen")
        return response.prompt_logprobs_np[-(len(tokens) - 1) :]


def logprobs_of(output: types.ForwardBackwardOutput, data: Sequence[types.Datum]) -> np.ndarray:
    """The log-probabilities in *output*, one after another; of each datum as many as targets."""
    if len(output.loss_fn_outputs) != len(data):
        raise Broken(f"{len(output.loss_fn_outputs)} outputs came for {len(data)} datums")
    parts = []
    for datum, one in zip(data, output.loss_fn_outputs):
        if "logprobs" not in one:
            raise Broken(f"an output holds {sorted(one)}, but no logprobs")
        values, wanted = one["logprobs"].to_numpy().ravel(), datum.model_input.length
        if values.size < wanted:
            raise Broken(f"{values.size} logprobs came for {wanted} targets")
        parts.append(values[:wanted].astype(np.float64))
    return np.concatenate(parts)


def zstd_frame(body: bytes) -> bytes:
    """*body* as a zstd frame, uncompressed: it needs no library."""
    parts = [body[i : i + (1 << 17)] for i in range(0, len(body), 1 << 17)] or [b""]
    return _frame([(0, len(part), part) for part in parts])


def zstd_bomb(mebibytes: int) -> bytes:
    """A zstd frame of so many MiB of zeros, in 32 bytes each."""
    return _frame([(1, 1 << 17, b"\0")] * (8 * mebibytes))


def _frame(blocks: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Blocks of (kind: 0 as it is, 1 one byte repeated; size; content) as RFC 8878 has them."""
    out = [b"\x28\xb5\x2f\xfd\x00\x58"]  # magic; no content size, no checksum; a 2 MiB window
    for i, (kind, size, content) in enumerate(blocks):
        is_last = i == len(blocks) - 1
        out.append((is_last | kind << 1 | size << 3).to_bytes(3, "little") + content)
    return b"".join(out)


class Lab:
    """What the checks share: the server, its keys, a session, and names that nobody else uses.

    Attributes:
        asker: asks with the first key; other: with the second, or None.
        restart: a shell command that restarts the server, or None.
    """

    def __init__(
        self,
        asker: Asker,
        *,
        other: Asker | None = None,
        base_model: str | None = None,
        restart: str | None = None,
    ) -> None:
        self.asker = asker
        self.other = other
        self.restart = restart
        self._base_model = base_model
        self._run = uuid.uuid4().hex[:8]
        self._names = 0
        self._session_id = ""
        self._model_numbers = 0
        self._sampler_numbers = 0
        self._sampler: Sampler | None = None

    @property
    def base_model(self) -> str:
        """The given one, or the first that the server says can be trained."""
        if self._base_model is None:
            answer = self.asker.get("get_server_capabilities")
            if answer.status != 200:
                raise Broken(f"get_server_capabilities gave {said(answer)}; give --base-model")
            found = wire.from_json(types.GetServerCapabilitiesResponse, answer.json())
            names = [m.model_name for m in found.supported_models if m.model_name and m.trainable]
            if not names:
                raise Broken("get_server_capabilities names no model; give --base-model")
            self._base_model = names[0]
        return self._base_model

    @property
    def session_id(self) -> str:
        if not self._session_id:
            self._session_id = self.new_session()
        return self._session_id

    def new_session(self, asker: Asker | None = None) -> str:
        payload = {
            "tags": ["tinkex-conformance"],
            "user_metadata": {},
            "sdk_version": config.PROTOCOL_VERSION,
            "type": "create_session",
        }
        answer = (asker or self.asker).post("create_session", payload)
        if answer.status != 200 or "session_id" not in as_object(answer):
            raise Broken(f"create_session gave {said(answer)}")
        return str(as_object(answer)["session_id"])

    def name(self) -> str:
        """A name for a checkpoint."""
        self._names += 1
        return f"conformance-{self._run}-{self._names}"

    # Models.

    def create(
        self,
        number: int | None = None,
        session_id: str | None = None,
        rank: int = RANK,
        **fields: Any,
    ) -> Answer:
        """Send one create_model, with further *fields*."""
        return self.asker.post(
            "create_model",
            {
                "session_id": session_id or self.session_id,
                "model_seq_id": self.model_number() if number is None else number,
                "base_model": self.base_model,
                "lora_config": {**attrs.asdict(types.LoraConfig(seed=11)), "rank": rank},
                "type": "create_model",
                **fields,
            },
        )

    def model_number(self) -> int:
        self._model_numbers += 1
        return self._model_numbers - 1

    def sampler_number(self) -> int:
        self._sampler_numbers += 1
        return self._sampler_numbers - 1

    @contextmanager
    def model(self) -> Iterator[Model]:
        """A new model, which is unloaded at the end."""
        made = self.asker.end(self.create()).value(types.CreateModelResponse, "create_model")
        with self.unloading(Model(self.asker, made.model_id, self.session_id)) as model:
            yield model

    @contextmanager
    def unloading(self, model: Model) -> Iterator[Model]:
        """Take *model* from the server at the end: some have few places for adapters."""
        try:
            yield model
        finally:
            try:
                answer = self.asker.post(
                    "unload_model", {"model_id": model.model_id, "type": "unload_model"}
                )
                if request_id := request_id_of(answer):
                    self.asker.is_done(request_id, 10.0)
            except errors.TinkexError:
                pass  # it is tidiness; what the check found counts

    def restored(self, path: str, *, optimizer: bool) -> Model:
        """A new model from a checkpoint: by one request, or by the older three."""
        answer = self.asker.post(
            "load_weights",
            {
                "session_id": self.session_id,
                "model_seq_id": self.model_number(),
                "path": path,
                "optimizer": optimizer,
                "type": "load_weights",
            },
        )
        if answer.status < 300:
            loaded = self.asker.end(answer).value(types.LoadWeightsResponse, "load_weights")
            model_id = loaded.model_id or f"{self.session_id}:train:{self._model_numbers - 1}"
            return Model(self.asker, model_id, self.session_id)
        made = self.asker.end(self.create()).value(types.CreateModelResponse, "create_model")
        model = Model(self.asker, made.model_id, self.session_id)
        model.run(model.post("load_weights", path=path, optimizer=optimizer), "load_weights")
        return model

    # Samplers.

    def sampler_of(
        self, *, asker: Asker | None = None, session_id: str = "", number: int | None = None,
        **source: str,
    ) -> Answer:  # fmt: skip
        """Send one create_sampling_session; *source* is model_path or base_model."""
        payload = {
            "session_id": session_id or self.session_id,
            "sampling_session_seq_id": self.sampler_number() if number is None else number,
            **source,
            "type": "create_sampling_session",
        }
        return (asker or self.asker).post("create_sampling_session", payload)

    def open_sampler(self, path: str) -> Sampler:
        """A sampler of saved weights."""
        return self._opened(self.sampler_of(model_path=path))

    @property
    def sampler(self) -> Sampler:
        """A sampler of the base model; where that cannot be had, of a fresh adapter."""
        if self._sampler is None:
            answer = self.sampler_of(base_model=self.base_model)
            if answer.status == 200:
                self._sampler = self._opened(answer)
            else:
                made = self.asker.end(self.create()).value(
                    types.CreateModelResponse, "create_model"
                )
                model = Model(self.asker, made.model_id, self.session_id)
                self._sampler = self.open_sampler(model.save_for_sampler(self.name()))
        return self._sampler

    def _opened(self, answer: Answer) -> Sampler:
        sampler_id = as_object(answer).get("sampling_session_id")
        if answer.status != 200 or not isinstance(sampler_id, str):
            raise Broken(f"create_sampling_session gave {said(answer)}")
        return Sampler(self.asker, sampler_id)

    def close(self) -> None:
        """Remove the checkpoints that were made, and end the session."""
        for path in self.asker.saved:
            run, _, checkpoint = path.removeprefix("tinker://").partition("/")
            try:
                self.asker.send("DELETE", f"training_runs/{run}/checkpoints/{checkpoint}")
            except errors.TinkexError:
                break
        if self._session_id:
            path = f"sessions/{quote(self._session_id, safe='')}/finish"
            try:
                self.asker.post(path, {"reason": {"type": "success"}, "detail": None}, timeout=10)
            except errors.TinkexError:
                pass  # the checks are done
        for asker in (self.asker, self.other):
            if asker is not None:
                asker.connection.close()
