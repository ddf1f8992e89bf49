"""A training server that computes nothing: `PYTHON null_server.py`, prints its port.

Serves both SDKs in the client benchmark, in a separate process, at the least possible cost for
Python: asyncio and hand-written HTTP/1.1. Every result is the same few bytes, ready `latency`
seconds after its submit. POST /null {"latency": seconds, "retrieve_futures": bool} configures it,
and GET /null returns the number of requests and bytes since then.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

# ForwardBackwardOutput{loss_fn_output_type "Null", metrics {"loss:sum": 1.0}}
BATCH_RESULT = bytes.fromhex("0a044e756c6c1a130a086c6f73733a73756d11000000000000f03f")
# SampleResponse{sequences [{stop_reason length, tokens [7, 8], logprobs [-0.5, -0.25]}]}
SAMPLE_RESULT = bytes.fromhex("0a160801120807000000080000001a08000000bf000080be")
PROTOBUF, JSON = b"application/x-protobuf", b"application/json"

SESSION = "null-session"
MODEL = f"{SESSION}:train:0"
SAMPLER = f"{SESSION}:sample:0"


class State:
    """Counters of received requests, and pending results."""

    def __init__(self) -> None:
        self.latency = 0.0
        self.retrieve_futures = False
        self.requests = 0
        self.bytes_in = 0
        self.serial = 0
        self.ready_at: dict[str, float] = {}
        self.finished: list[str] = []
        self.changed = asyncio.Event()
        self.tasks: set[asyncio.Future[None]] = set()  # asyncio holds only weak references

    def promise(self, kind: str) -> str:
        loop = asyncio.get_running_loop()
        self.serial += 1
        request_id = f"{kind}-{self.serial}"
        self.ready_at[request_id] = loop.time() + self.latency
        if kind == "sample" and self.retrieve_futures:
            loop.call_later(self.latency, self._finish, request_id)
        return request_id

    def _finish(self, request_id: str) -> None:
        self.finished.append(request_id)
        self.changed.set()
        self.changed = asyncio.Event()


class Connection(asyncio.Protocol):
    """One client connection: splits the stream into requests, and answers them in order."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.head: bytes | None = None
        self.parts: list[bytes] = []
        self.have = 0
        self.need = -1

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.have += len(data)
        if self.need >= 0 and self.have < self.need:
            return
        buffer = b"".join(self.parts)
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                break
            head = buffer[:end]
            length = 0
            for line in head.split(b"\r\n")[1:]:
                if line[:15].lower() == b"content-length:":
                    length = int(line[15:])
            self.need = end + 4 + length
            if len(buffer) < self.need:
                break
            self._request(head, buffer[end + 4 : self.need])
            buffer, self.need = buffer[self.need :], -1
        self.parts, self.have = [buffer], len(buffer)

    def _request(self, head: bytes, body: bytes) -> None:
        _, target, _ = head.split(b"\r\n", 1)[0].split(b" ", 2)
        path = target.split(b"?")[0].decode().removeprefix("/api/v1/")
        state = self.state
        if path == "/null":
            self._null(body)
            return
        state.requests += 1
        state.bytes_in += len(body)
        if path in ("forward_backward", "optim_step", "create_model"):
            self._json({"request_id": state.promise(path)})
        elif path == "asample":
            samples = json.loads(body).get("num_samples", 1)
            request_id = state.promise("sample")
            ids = [f"{request_id}:{i}" for i in range(samples)]
            self._json({"request_id": request_id, "sample_sequence_ids": ids})
        elif path == "retrieve_future":
            self._retrieve(json.loads(body)["request_id"])
        elif path == "retrieve_futures":
            task = asyncio.ensure_future(self._retrieve_many(json.loads(body)))
            state.tasks.add(task)
            task.add_done_callback(state.tasks.discard)
        else:
            self._fixed(path)

    def _retrieve(self, request_id: str) -> None:
        loop = asyncio.get_running_loop()
        wait = self.state.ready_at.get(request_id, 0.0) - loop.time()
        if wait > 0:
            loop.call_later(wait, self._result, request_id)
        else:
            self._result(request_id)

    def _result(self, request_id: str) -> None:
        kind = request_id.split("-")[0]
        if kind == "sample":
            self._send(b"200 OK", PROTOBUF, SAMPLE_RESULT)
        elif kind == "forward_backward":
            self._send(b"200 OK", PROTOBUF, BATCH_RESULT)
        elif kind == "create_model":
            self._json({"model_id": MODEL, "type": "create_model"})
        else:
            self._json({"metrics": {}})

    async def _retrieve_many(self, request: dict[str, Any]) -> None:
        state, cursor = self.state, request.get("prev_cursor", 0)
        if len(state.finished) <= cursor and request.get("timeout") != 0:
            try:
                await asyncio.wait_for(state.changed.wait(), 30)
            except asyncio.TimeoutError:
                pass
        done = [{"state": "finished", "request_id": r} for r in state.finished[cursor:]]
        self._json({"completions": done, "cursor": len(state.finished)})

    def _fixed(self, path: str) -> None:
        if path == "client/config":
            self._json({"sample_use_retrieve_futures": self.state.retrieve_futures})
        elif path == "create_session":
            self._json({"session_id": SESSION, "type": "create_session"})
        elif path == "get_info":
            data = {"model_name": "null", "arch": "null"}
            self._json({"model_id": MODEL, "model_data": data, "model_name": "null"})
        elif path == "create_sampling_session":
            self._json({"sampling_session_id": SAMPLER, "type": "create_sampling_session"})
        elif path.startswith("samplers/"):
            self._json({"sampler_id": SAMPLER, "base_model": "null"})
        elif path == "telemetry":
            self._json({"status": "accepted"})
        elif path == "session_heartbeat" or path.endswith("/finish"):
            self._json({})
        else:
            self._send(b"404 Not Found", JSON, b'{"detail":"Not Found"}')

    def _null(self, body: bytes) -> None:
        state = self.state
        if body:
            settings = json.loads(body)
            state.latency = settings.get("latency", 0.0)
            state.retrieve_futures = settings.get("retrieve_futures", False)
            state.requests = state.bytes_in = 0
        self._json({"requests": state.requests, "bytes_in": state.bytes_in})

    def _json(self, payload: object) -> None:
        self._send(b"200 OK", JSON, json.dumps(payload).encode())

    def _send(self, status: bytes, kind: bytes, body: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
            % (status, kind, len(body), body)
        )


async def main() -> None:
    state = State()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(state), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
