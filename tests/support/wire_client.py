"""A client of the bare protocol for a real server: it sends exactly the test's requests."""

from __future__ import annotations

import time

import requests

from tinkex import types, wire


class WireClient:
    def __init__(self, url, key=None):
        self.url = url + wire.PREFIX
        self.http = requests.Session()
        self.http.trust_env = False
        if key is not None:
            self.http.headers["X-API-Key"] = key

    def send(self, method, path, json=None, **kwargs):
        return self.http.request(method, self.url + path, json=json, timeout=30, **kwargs)

    def post(self, path, json=None, **kwargs):
        """The JSON of a 200."""
        answer = self.send("POST", path, {} if json is None else json, **kwargs)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def get(self, path, **kwargs):
        answer = self.send("GET", path, **kwargs)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def refused(self, path, json=None, method="POST", **kwargs):
        """Status and message of a refusal, whose form is checked."""
        answer = self.send(method, path, json, **kwargs)
        assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
        assert "content-length" in answer.headers
        payload = answer.json()
        assert payload["category"] in ("user", "server")
        return answer.status_code, payload["error"]

    def result(self, promise, seconds=30, protobuf=None):
        """The result of an operation: its JSON, or with *protobuf* (a class) that decoded."""
        request_id = promise if isinstance(promise, str) else promise["request_id"]
        headers = {"Accept": "application/x-protobuf, application/json"} if protobuf else {}
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.send(
                "POST", "retrieve_future", {"request_id": request_id}, headers=headers
            )
            if answer.status_code == 408:
                continue
            assert answer.status_code == 200, (request_id, answer.status_code, answer.text)
            if protobuf and answer.headers["content-type"] == wire.PROTOBUF:
                return wire.decode_result(protobuf, answer.content)
            return answer.json()
        raise TimeoutError(request_id)

    # The usual steps.

    def session(self, **fields):
        return self.post("create_session", {"sdk_version": "test", **fields})["session_id"]

    def model(self, session=None, number=0, base_model="tiny", rank=4, **fields):
        """A created model's id."""
        session = session or self.session()
        promise = self.post(
            "create_model",
            {
                "session_id": session,
                "model_seq_id": number,
                "base_model": base_model,
                "lora_config": {"rank": rank, "seed": 1},
                **fields,
            },
        )
        return self.result(promise)["model_id"]

    def forward_backward(self, model_id, seq_id, *sequences, loss_fn="cross_entropy", **kwargs):
        """The promise. Each of *sequences* is a datum's target tokens."""
        request = batch(model_id, seq_id, *sequences, loss_fn=loss_fn, **kwargs)
        path, content_type, _, body = wire.encode_request(request, protobuf=False)
        return self.send_batch(path, content_type, body)

    def send_batch(self, path, content_type, body):
        return self.post_raw(path, body, {"Content-Type": content_type})

    def post_raw(self, path, body, headers):
        answer = self.http.post(self.url + path, data=body, headers=headers, timeout=30)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json()

    def optim_step(self, model_id, seq_id, learning_rate=0.1):
        return self.post(
            "optim_step",
            {
                "model_id": model_id,
                "seq_id": seq_id,
                "adam_params": {"learning_rate": learning_rate},
            },
        )

    def save(self, model_id, seq_id, name, **fields):
        return self.post(
            "save_weights", {"model_id": model_id, "seq_id": seq_id, "path": name, **fields}
        )

    def save_for_sampler(self, model_id, seq_id, name, **fields):
        return self.post(
            "save_weights_for_sampler",
            {"model_id": model_id, "seq_id": seq_id, "path": name, **fields},
        )

    def sampler(self, session=None, number=0, **fields):
        fields = fields or {"base_model": "tiny"}
        return self.post(
            "create_sampling_session",
            {
                "session_id": session or self.session(),
                "sampling_session_seq_id": number,
                **fields,
            },
        )["sampling_session_id"]

    def sample(self, sampler_id, seq_id, tokens=(1, 2, 3), num_samples=1, **fields):
        params = {"max_tokens": fields.pop("max_tokens", 4), **fields.pop("params", {})}
        return self.post(
            "asample",
            {
                "sampling_session_id": sampler_id,
                "seq_id": seq_id,
                "num_samples": num_samples,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]},
                "sampling_params": params,
                **fields,
            },
        )


def batch(model_id, seq_id, *sequences, loss_fn="cross_entropy", forward_only=False):
    data = [
        types.Datum(
            types.ModelInput.from_ints([1] * len(targets)),
            {"target_tokens": list(targets), "weights": [1.0] * len(targets)},
        )
        for targets in sequences or ([1, 2, 3],)
    ]
    return types.ForwardBackwardRequest(model_id, seq_id, data, loss_fn, forward_only=forward_only)
