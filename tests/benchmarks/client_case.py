"""One case of the client benchmark: `PYTHON client_case.py SDK CASE URL`, prints one JSON object.

Runs in a separate process, in the environment of the SDK it measures ("tinkex", "tinker", or
"floor": bare http.client). Both SDKs run the same code here; a few adapters handle different names.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

STARTED = time.perf_counter()
SDK, CASE, URL = sys.argv[1:4]
ROUNDS = 300

warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
os.environ["TINKER_API_KEY"] = "tml-null"
os.environ["TINKER_TELEMETRY"] = "0"


def peak_bytes() -> int:
    """Peak resident bytes of this process. Not getrusage's, which are its parent's at first."""
    with open("/proc/self/status") as status:
        [peak] = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    return 1024 * int(peak)


def server(**settings: Any) -> dict[str, int]:
    """Configure the null server (and reset its counters), or read its counters."""
    body = json.dumps(settings).encode() if settings else None
    with urllib.request.urlopen(URL + "/null", body) as answer:
        counted: dict[str, int] = json.loads(answer.read())
    return counted


class Measured:
    """Wall and processor time of a block, and the server's counters for it."""

    def __enter__(self) -> Measured:
        self.before = server()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.wall = time.perf_counter() - self.wall
        self.cpu = time.process_time() - self.cpu
        after = server()
        self.requests = after["requests"] - self.before["requests"]
        self.bytes_in = after["bytes_in"] - self.before["bytes_in"]


def sdk() -> Any:
    if SDK == "tinkex":
        import tinkex

        return tinkex
    import tinker

    return tinker


def service() -> Any:
    return sdk().ServiceClient(base_url=URL)


def training(client: Any) -> Any:
    made = client.create_lora_training_client("null")
    return made.result() if hasattr(made, "result") else made


def datums(count: int, length: int) -> list[Any]:
    import numpy as np

    types = sdk().types
    tokens = np.arange(length, dtype=np.int32) % 500
    made = []
    for _ in range(count):
        if SDK == "tinkex":
            model_input = types.ModelInput.from_ints(tokens)
        else:
            model_input = types.ModelInput.from_ints(tokens.tolist())
        inputs = {
            "target_tokens": types.TensorData.from_numpy(tokens.astype(np.int64)),
            "weights": types.TensorData.from_numpy(np.ones(length, np.float32)),
        }
        made.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return made


def optim_step(client: Any) -> Any:
    return client.optim_step(sdk().types.AdamParams(learning_rate=1e-4))


def cold_start() -> dict[str, float]:
    client = training(service())
    optim_step(client).result()
    return {"wall": time.perf_counter() - STARTED}


def small_operation() -> dict[str, float]:
    client = training(service())
    for _ in range(20):
        optim_step(client).result()
    walls = []
    with Measured() as measured:
        for _ in range(ROUNDS):
            started = time.perf_counter()
            optim_step(client).result()
            walls.append(time.perf_counter() - started)
    return {
        "p50": statistics.median(walls),
        "cpu": measured.cpu / ROUNDS,
        "requests": measured.requests / ROUNDS,
    }


def pipelined(steps: int = 200) -> dict[str, float]:
    client = training(service())
    data = datums(8, 128)
    optim_step(client).result()
    with Measured() as measured:
        futures = []
        for _ in range(steps):
            futures.append(client.forward_backward(data, "cross_entropy"))
            futures.append(optim_step(client))
        for future in futures:
            future.result()
    return {"wall": measured.wall / steps, "cpu": measured.cpu / steps}


def large_batch() -> dict[str, float]:
    client = training(service())
    data = datums(2048, 2048)
    client.forward_backward(data[:1], "cross_entropy").result()
    before = peak_bytes()
    with Measured() as measured:
        client.forward_backward(data, "cross_entropy").result()
    return {
        "wall": measured.wall,
        "memory": peak_bytes() - before,
        "bytes": measured.bytes_in,
    }


def sampler() -> Any:
    made = service().create_sampling_client(base_model="null")
    if SDK == "tinker" and hasattr(made, "result") and not hasattr(made, "sample"):
        made = made.result()
    return made


def samples(count: int, latency: float, retrieve_futures: bool = True) -> dict[str, float]:
    server(latency=0.0, retrieve_futures=retrieve_futures)
    client = sampler()
    types = sdk().types
    prompt = types.ModelInput.from_ints(list(range(64)))
    params = types.SamplingParams(max_tokens=8)
    client.sample(prompt, 1, params).result()
    server(latency=latency, retrieve_futures=retrieve_futures)
    before = peak_bytes()
    with Measured() as measured:
        futures = [client.sample(prompt, 1, params) for _ in range(count)]
        for future in futures:
            future.result()
    return {
        "wall": measured.wall,
        "wall beyond the latency": measured.wall - latency,
        "cpu": measured.cpu,
        "memory": peak_bytes() - before,
        "requests": measured.requests,
        "threads": threading.active_count(),
    }


def session_price() -> dict[str, float]:
    """Processor time of one exchange, normally and with the adapter called without the Session."""
    import requests

    from tinkex import config, types, wire
    from tinkex.runtime.transport import Transport

    def adapter_alone(
        self: requests.Session, request: Any, *, allow_redirects: bool, **options: Any
    ) -> requests.Response:
        return self.get_adapter(request.url).send(request, **options)

    transport = Transport(config.load(URL, "tml-null"))
    request = types.SessionHeartbeatRequest("null-session")
    ways: dict[str, Callable[..., Any]] = {"with": requests.Session.send, "without": adapter_alone}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(30):
        for name, way in ways.items():
            requests.Session.send = way  # type: ignore[method-assign]
            started = time.process_time()
            for _ in range(50):
                transport.call(wire.SESSION_HEARTBEAT, request)
            spent[name].append((time.process_time() - started) / 50)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def closed_port() -> dict[str, float]:
    started = time.perf_counter()

    def contact() -> None:
        try:
            client = sdk().ServiceClient(base_url="http://127.0.0.1:9")
            if SDK == "tinker":
                training(client)
        except Exception as exc:
            print(json.dumps({"wall": time.perf_counter() - started, "said": str(exc)[:200]}))
        sys.stdout.flush()
        os._exit(0)

    threading.Thread(target=contact).start()
    time.sleep(30)
    print(json.dumps({"wall": 30.0, "said": ""}), flush=True)
    os._exit(0)


def floor_small_operation() -> dict[str, float]:
    post = floor_post()
    for _ in range(20):
        post("/api/v1/optim_step", {"seq_id": 1})
    walls, cpu = [], time.process_time()
    for i in range(ROUNDS):
        started = time.perf_counter()
        promise = post("/api/v1/optim_step", {"model_id": "m", "seq_id": i})
        post("/api/v1/retrieve_future", {"request_id": promise["request_id"]})
        walls.append(time.perf_counter() - started)
    return {"p50": statistics.median(walls), "cpu": (time.process_time() - cpu) / ROUNDS}


def floor_pipelined(steps: int = 200) -> dict[str, float]:
    post = floor_post()
    body = b"\0" * (8 * (128 * 16 + 40))
    wall, cpu = time.perf_counter(), time.process_time()
    ids = []
    for i in range(steps):
        ids.append(post("/api/v1/forward_backward", body)["request_id"])
        ids.append(post("/api/v1/optim_step", {"model_id": "m", "seq_id": i})["request_id"])
    for request_id in ids:
        post("/api/v1/retrieve_future", {"request_id": request_id})
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall / steps, "cpu": cpu / steps}


def floor_post() -> Callable[[str, Any], Any]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", int(URL.rsplit(":", 1)[1]))

    def post(path: str, payload: Any) -> Any:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        connection.request("POST", path, body)
        answer = connection.getresponse()
        content = answer.read()
        return json.loads(content) if "json" in answer.headers["Content-Type"] else content

    return post


def floor_cold_start() -> dict[str, float]:
    post = floor_post()
    promise = post("/api/v1/optim_step", {"seq_id": 1})
    post("/api/v1/retrieve_future", {"request_id": promise["request_id"]})
    return {"wall": time.perf_counter() - STARTED}


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "cold_start": cold_start,
    "small_operation": small_operation,
    "pipelined": pipelined,
    "large_batch": large_batch,
    "samples_2000": lambda: samples(2000, 0.05),
    "samples_2000_polled": lambda: samples(2000, 0.05, retrieve_futures=False),
    "samples_200": lambda: samples(200, 1.0),
    "samples_200_polled": lambda: samples(200, 1.0, retrieve_futures=False),
    "session_price": session_price,
    "closed_port": closed_port,
    "floor_cold_start": floor_cold_start,
    "floor_small_operation": floor_small_operation,
    "floor_pipelined": floor_pipelined,
}
for _n in (10, 100, 1000, 10_000):
    CASES[f"pipelined_{_n}"] = lambda n=_n: pipelined(max(n // 2, 1))  # type: ignore[misc]
    CASES[f"in_flight_{_n}"] = lambda n=_n: samples(n, 0.05)  # type: ignore[misc]


if __name__ == "__main__":
    if CASE != "closed_port":
        server(latency=0.0, retrieve_futures=False)
    result = CASES[CASE]()
    print(json.dumps(result), flush=True)
    os._exit(0)
