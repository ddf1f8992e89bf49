"""Models and samplers on the server, and the context that creates and removes them for the checks.

Does not know the rules that the checks test.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import attrs
import numpy as np

from tinkex import config, errors, types, wire
from tinkex.conformance.client import (
    Broken,
    Client,
    NotOffered,
    as_object,
    request_id_of,
    said,
    zstd_frame,
)
from tinkex.runtime.responses import Answer

#: Rank of the created adapters.
RANK = 8


class Model:
    """A model on the server; `number` is the seq_id of its last operation.

    The methods that return an `Answer` send one request; the others wait for its result. Checks may
    pass other numbers.
    """

    def __init__(self, client: Client, model_id: str, session_id: str) -> None:
        self.client = client
        self.model_id = model_id
        self.session_id = session_id
        self.number = 0

    def next(self, count: int = 1) -> int:
        """Reserve *count* numbers; returns the first."""
        self.number += count
        return self.number - count + 1

    def post(self, endpoint: str, number: int | None = None, /, **fields: Any) -> Answer:
        """Send one numbered request in JSON."""
        number = self.next() if number is None else number
        payload = {"model_id": self.model_id, "seq_id": number, **fields, "type": endpoint}
        return self.client.post(endpoint, payload)

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
        """Send one batch, in the dialect that the server accepts."""
        number = self.next() if number is None else number
        request = types.ForwardBackwardRequest(
            self.model_id, number, list(data), loss_fn, forward_only=forward_only
        )
        client = self.client
        if protobuf is not None:
            return self._send(request, protobuf, compress)
        if client.protobuf is None:
            answer = self._send(request, True)
            client.protobuf = answer.status not in (400, 415, 422, 500)
            if client.protobuf:
                return answer
        return self._send(request, client.protobuf)

    def _send(
        self, request: types.ForwardBackwardRequest, protobuf: bool, compress: bool = False
    ) -> Answer:
        path, content_type, _, body = wire.encode_request(request, protobuf)
        headers = {"Content-Type": content_type}
        if compress:
            body, headers["Content-Encoding"] = zstd_frame(body), "zstd"
        return self.client.send("POST", path, body, headers)

    def step(self, number: int | None = None, /, **params: float) -> Answer:
        """Send one optimizer step; *params* are those of AdamW."""
        adam = attrs.asdict(types.AdamParams(**params))
        return self.post("optim_step", number, adam_params=adam)

    # With their result.

    def run(self, answer: Answer, what: str) -> Any:
        """The JSON result of an operation that must succeed."""
        ended = self.client.end(answer)
        if ended.failure is not None:
            ended.value(dict, what)  # raises
        return ended.payload

    def output(self, answer: Answer, what: str = "forward_backward") -> types.ForwardBackwardOutput:
        return self.client.end(answer).value(types.ForwardBackwardOutput, what)

    def forward(self, data: Sequence[types.Datum]) -> types.ForwardBackwardOutput:
        return self.output(self.batch(data, forward_only=True), "forward")

    def train(
        self, data: Sequence[types.Datum], learning_rate: float = 0.01, **params: float
    ) -> None:
        """Run forward_backward and a step."""
        self.output(self.batch(data))
        self.run(self.step(learning_rate=learning_rate, **params), "optim_step")

    def logprobs(self, data: Sequence[types.Datum]) -> np.ndarray:
        """Log-probabilities of the targets of *data*, concatenated, under the current weights."""
        return logprobs_of(self.forward(data), data)

    def save(self, name: str, **fields: Any) -> str:
        """Save a checkpoint; returns its path."""
        return self._saved("save_weights", name, **fields)

    def save_for_sampler(self, name: str) -> str:
        """Save weights for samplers; returns their path."""
        return self._saved("save_weights_for_sampler", name)

    def _saved(self, endpoint: str, name: str, **fields: Any) -> str:
        ended = self.client.end(self.post(endpoint, path=name, **fields))
        path = ended.value(types.SaveWeightsForSamplerResponse, endpoint).path
        if not path:
            raise Broken(f"{endpoint} of {name!r} returned no path")
        self.client.saved.append(path)
        return path


class Sampler:
    """A sampling session on the server."""

    def __init__(self, client: Client, sampler_id: str) -> None:
        self.client = client
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
        """Send one request for samples; *params* override the defaults, *fields* go beside the
        prompt."""
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
        return self.client.post("asample", payload)

    def sample(
        self, prompt: Sequence[int], num_samples: int = 1, **options: Any
    ) -> types.SampleResponse:
        answer = self.post(prompt, num_samples, **options)
        return self.client.end(answer).value(types.SampleResponse, "asample")

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """(N - 1,): log-probability of each token but the first, for either alignment."""
        response = self.sample(tokens, params={"max_tokens": 1}, prompt_logprobs=True)
        if response.prompt_logprobs_np is None:
            raise NotOffered("no prompt log-probabilities, which this check needs")
        return response.prompt_logprobs_np[-(len(tokens) - 1) :]


def logprobs_of(output: types.ForwardBackwardOutput, data: Sequence[types.Datum]) -> np.ndarray:
    """The log-probabilities in *output*, concatenated; for each datum as many as targets."""
    if len(output.loss_fn_outputs) != len(data):
        raise Broken(f"{len(output.loss_fn_outputs)} outputs for {len(data)} datums")
    parts = []
    for datum, one in zip(data, output.loss_fn_outputs):
        if "logprobs" not in one:
            raise Broken(f"an output holds {sorted(one)}, but no logprobs")
        values, wanted = one["logprobs"].to_numpy().ravel(), datum.model_input.length
        if values.size < wanted:
            raise Broken(f"{values.size} logprobs for {wanted} targets")
        parts.append(values[:wanted].astype(np.float64))
    return np.concatenate(parts)


class Context:
    """What the checks share: the server, its keys, a session, and unique names.

    Attributes:
        client: sends with the first key.
        other: sends with the second key, or None.
        restart: a shell command that restarts the server, or None.
    """

    def __init__(
        self,
        client: Client,
        *,
        other: Client | None = None,
        base_model: str | None = None,
        restart: str | None = None,
    ) -> None:
        self.client = client
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
        """The given base model, or the first one that the server lists as trainable."""
        if self._base_model is None:
            answer = self.client.get("get_server_capabilities")
            if answer.status != 200:
                raise Broken(f"get_server_capabilities returned {said(answer)}; give --base-model")
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

    def new_session(self, client: Client | None = None) -> str:
        payload = {
            "tags": ["tinkex-conformance"],
            "user_metadata": {},
            "sdk_version": config.PROTOCOL_VERSION,
            "type": "create_session",
        }
        answer = (client or self.client).post("create_session", payload)
        if answer.status >= 300 or "session_id" not in as_object(answer):
            raise Broken(f"create_session returned {said(answer)}")
        return str(as_object(answer)["session_id"])

    def name(self) -> str:
        """A new name for a checkpoint."""
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
        """Send one create_model request, with further *fields*."""
        return self.client.post(
            "create_model",
            {
                "session_id": session_id or self.session_id,
                "model_seq_id": self.model_number() if number is None else number,
                "base_model": self.base_model,
                # Our type refuses ranks that the server should refuse.
                "lora_config": {**wire.to_json(types.LoraConfig(RANK, seed=11)), "rank": rank},
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
        """Create a model, and unload it at the end."""
        made = self.client.end(self.create()).value(types.CreateModelResponse, "create_model")
        with self.unloading(Model(self.client, made.model_id, self.session_id)) as model:
            yield model

    @contextmanager
    def unloading(self, model: Model) -> Iterator[Model]:
        """Unload *model* at the end: some servers have room for few adapters."""
        try:
            yield model
        finally:
            try:
                answer = self.client.post(
                    "unload_model", {"model_id": model.model_id, "type": "unload_model"}
                )
                if request_id := request_id_of(answer):
                    self.client.is_done(request_id, 10.0)
            except errors.TinkexError:
                pass  # cleaning up; the result of the check counts

    def restored(self, path: str, *, optimizer: bool) -> Model:
        """A new model from a checkpoint: with one request, or with two on older servers."""
        answer = self.client.post(
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
            loaded = self.client.end(answer).value(types.LoadWeightsResponse, "load_weights")
            model_id = loaded.model_id or f"{self.session_id}:train:{self._model_numbers - 1}"
            return Model(self.client, model_id, self.session_id)
        made = self.client.end(self.create()).value(types.CreateModelResponse, "create_model")
        model = Model(self.client, made.model_id, self.session_id)
        model.run(model.post("load_weights", path=path, optimizer=optimizer), "load_weights")
        return model

    # Samplers.

    def sampler_of(
        self, *, client: Client | None = None, session_id: str = "", number: int | None = None,
        **source: str,
    ) -> Answer:  # fmt: skip
        """Send one create_sampling_session request; *source* is model_path or base_model."""
        payload = {
            "session_id": session_id or self.session_id,
            "sampling_session_seq_id": self.sampler_number() if number is None else number,
            **source,
            "type": "create_sampling_session",
        }
        return (client or self.client).post("create_sampling_session", payload)

    def open_sampler(self, path: str) -> Sampler:
        """A sampler of saved weights."""
        return self._opened(self.sampler_of(model_path=path))

    @property
    def sampler(self) -> Sampler:
        """A sampler of the base model; of a fresh adapter if the server does not offer that."""
        if self._sampler is None:
            answer = self.sampler_of(base_model=self.base_model)
            if answer.status < 300:
                self._sampler = self._opened(answer)
            else:
                made = self.client.end(self.create()).value(
                    types.CreateModelResponse, "create_model"
                )
                model = Model(self.client, made.model_id, self.session_id)
                self._sampler = self.open_sampler(model.save_for_sampler(self.name()))
        return self._sampler

    def _opened(self, answer: Answer) -> Sampler:
        sampler_id = as_object(answer).get("sampling_session_id")
        if answer.status >= 300 or not isinstance(sampler_id, str):
            raise Broken(f"create_sampling_session returned {said(answer)}")
        return Sampler(self.client, sampler_id)

    def close(self) -> None:
        """Delete the created checkpoints, finish the session, close the connections."""
        for path in self.client.saved:
            run, _, checkpoint = path.removeprefix("tinker://").partition("/")
            try:
                self.client.send("DELETE", f"training_runs/{run}/checkpoints/{checkpoint}")
            except errors.TinkexError:
                break
        if self._session_id:
            path = f"sessions/{quote(self._session_id, safe='')}/finish"
            try:
                self.client.post(path, {"reason": {"type": "success"}, "detail": None}, timeout=10)
            except errors.TinkexError:
                pass  # the checks are finished
        for client in (self.client, self.other):
            if client is not None:
                client.connection.close()
