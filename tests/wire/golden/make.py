"""Records what the official SDK sends for the calls below: `PYTHON make.py FILE.json`.

Run it with a Python that has a version of `tinker` installed (and no tinkex); the recordings beside
this file say which version they are of. The SDK talks to a fake server, which answers
everything at once, with as little as the SDK takes.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

recorded = []

RESULTS = {
    "CreateModel": {"model_id": "s:train:0", "type": "create_model"},
    "OptimStep": {"metrics": {}},
    "SaveWeights": {"path": "tinker://s:train:0/weights/a"},
    "SaveWeightsForSampler": {
        "path": "tinker://s:train:0/sampler_weights/a",
        "sampling_session_id": "s:sample:0",
    },
    "LoadWeights": {"path": "tinker://s:train:0/weights/a", "model_id": "s:train:1"},
    "Sample": {"sequences": [{"stop_reason": "stop", "tokens": [1], "logprobs": [-1.0]}] * 2},
    "ForwardBackward": {
        "loss_fn_output_type": "CrossEntropyLossReturn",
        "loss_fn_outputs": [{"logprobs": {"data": [-1.0], "dtype": "float32", "shape": [1]}}],
        "metrics": {"loss:sum": 1.0},
    },
}
ANSWERS = {
    "client/config": {},
    "client/dynamic_config": {},
    "create_session": {"session_id": "s"},
    "get_info": {"model_id": "s:train:0", "model_data": {"model_name": "tiny"}},
    "weights_info": {"base_model": "tiny", "is_lora": True, "lora_rank": 8},
    "create_sampling_session": {"sampling_session_id": "s:sample:0"},
    "telemetry": {"status": "accepted"},
}
SAMPLER = {"sampler_id": "s:sample:0", "base_model": "tiny"}
PROMISE = {"request_id": "r", "sample_sequence_ids": ["a", "b"]}


def in_protobuf(kind: str) -> bytes:
    from tinker.proto import tinker_public_pb2 as pb

    if kind == "Sample":
        sequence = pb.SampledSequence(tokens=b"\1\0\0\0", logprobs=b"\0\0\x80\xbf")
        return pb.SampleResponse(
            sequences=[sequence] * 2, prompt_logprobs=b"\0\0\xc0\x7f" * 3
        ).SerializeToString()
    record = pb.ArrayRecord(num_datums=1)
    record.fields["logprobs"].data = b"\0\0\x80\xbf"
    record.fields["logprobs"].offsets = b"\0" * 8 + b"\4" + b"\0" * 7
    record.fields["logprobs"].dtype = 1
    return pb.ForwardBackwardOutput(
        loss_fn_outputs=[record], metrics={"loss:sum": 1.0}
    ).SerializeToString()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        path = self.path.split("/api/v1/", 1)[1]
        kind = self.headers.get("content-type", "")
        if path != "telemetry":
            record(self.command, path, kind, body)
        if path == "retrieve_future":
            what = self.headers["x-tinker-request-type"].replace("Forward", "ForwardBackward", 1)
            what = what.replace("BackwardBackward", "Backward")
            protobuf = "x-protobuf" in self.headers["accept"] and what in (
                "Sample",
                "ForwardBackward",
            )
            if protobuf:
                return self.answer(in_protobuf(what), "application/x-protobuf")
            return self.answer(json.dumps(RESULTS[what]).encode(), "application/json")
        default = SAMPLER if path.startswith("samplers/") else PROMISE
        return self.answer(json.dumps(ANSWERS.get(path, default)).encode(), "application/json")

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def answer(self, body: bytes, content_type: str) -> None:
        self.send_response(200)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def record(method: str, path: str, content_type: str, body: bytes) -> None:
    entry = {"method": method, "path": path}
    if content_type == "application/x-protobuf":
        entry["protobuf"] = base64.b64encode(body).decode()
    elif body:
        entry["json"] = json.loads(body)
    recorded.append(entry)


def done(value: object) -> object:
    """Newer SDKs give futures where older ones give the thing itself."""
    return value.result() if hasattr(value, "result") else value


def calls(url: str) -> None:
    """The recorded calls; test_golden.py makes the same ones with tinkex."""
    import numpy as np
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=url, api_key="tml-golden", user_metadata={"who": "me"})
    training = done(service.create_lora_training_client("tiny", rank=8, seed=7))
    prompt = types.ModelInput.from_ints([19, 261, 273])

    def datum(**inputs: object) -> types.Datum:
        return types.Datum(model_input=prompt, loss_fn_inputs=inputs)

    targets = np.array([261, 273, 2])
    weights = np.array([0.0, 1.0, 0.5], np.float32)
    policy = {
        "target_tokens": targets,
        "logprobs": np.array([-1.0, -2.0, -0.25], np.float32),
        "advantages": np.array([1.0, -1.0, 0.5], np.float32),
    }
    done(
        training.forward_backward([datum(target_tokens=targets, weights=weights)], "cross_entropy")
    )
    done(
        training.forward([datum(target_tokens=[5, 6, 7], weights=[1.0, 1.0, 0.0])], "cross_entropy")
    )
    clip = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    done(training.forward_backward([datum(**policy)], "ppo", loss_fn_config=clip))
    wide = {
        "target_tokens": np.array([[1, 2], [3, 4], [5, 6]]),
        "weights": np.array([[1, 0], [0.5, 0.5], [0, 1]], np.float32),
    }
    done(training.forward_backward([datum(**wide)], "cross_entropy"))
    done(training.optim_step(types.AdamParams(learning_rate=0.01, weight_decay=0.1)))
    done(training.save_state("a"))
    done(training.save_weights_for_sampler("a", ttl_seconds=3600))
    done(training.load_state("tinker://s:train:0/weights/a"))
    done(training.load_state_with_optimizer("tinker://s:train:0/weights/a"))
    done(training.save_weights_and_get_sampling_client())

    sampling = done(service.create_sampling_client(base_model="tiny"))
    params = types.SamplingParams(
        max_tokens=8, seed=3, stop=["9"], temperature=0.7, top_k=50, top_p=0.95
    )
    done(sampling.sample(prompt, 2, params))
    done(sampling.sample(prompt, 2, types.SamplingParams(stop=[2]), True, 5))
    done(sampling.compute_logprobs(prompt))
    done(service.create_training_client_from_state("tinker://s:train:0/weights/a"))

    rest = service.create_rest_client()
    path = "tinker://s:train:0/weights/a"
    done(rest.set_checkpoint_ttl_from_tinker_path(path, 3600))
    done(rest.set_checkpoint_ttl_from_tinker_path(path, None))
    done(rest.delete_checkpoint_from_tinker_path(path))
    done(rest.publish_checkpoint_from_tinker_path(path))
    done(rest.unpublish_checkpoint_from_tinker_path(path))
    if hasattr(service, "close"):
        done(service.close("success"))


def main(out: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    calls(f"http://127.0.0.1:{server.server_port}")
    version = importlib.metadata.version("tinker")
    with open(out, "w") as file:
        json.dump({"sdk_version": version, "requests": recorded}, file, indent=1)
        file.write("\n")
    print(f"{out}: {len(recorded)} requests of tinker {version}")


if __name__ == "__main__":
    main(sys.argv[1])
