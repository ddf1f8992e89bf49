"""The cost of one batch on the wire: `python tests/benchmarks/wire.py`.

1,024 datums of 1,024 tokens with targets and weights, in each dialect: bytes, and milliseconds of
the client (encoding) and of the server (decoding); best of five.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np

from tinkex import types, wire

N, T = 1024, 1024


def batch() -> types.ForwardBackwardRequest:
    rng = np.random.default_rng(0)
    data = []
    for _ in range(N):
        tokens = rng.integers(0, 150_000, T + 1)
        weights = (np.arange(T) > T // 4).astype(np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(types.Datum(types.ModelInput.from_ints(tokens[:-1]), inputs))
    return types.ForwardBackwardRequest("session:train:0", 1, data, "cross_entropy")


def milliseconds(work, times: int = 5) -> float:
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)
    return 1000 * min(spans)


def main() -> None:
    request = batch()
    print(f"{N} datums of {T} tokens, {3 * N * T:,} numbers")
    print(f"{'':16} {'bytes':>12} {'encode':>10} {'decode':>10} {'peak':>9}")
    for name, protobuf, compress in (
        ("JSON", False, False),
        ("protobuf", True, False),
        ("protobuf + zstd", True, True),
    ):
        _, content_type, _, body = wire.encode_request(request, protobuf, compress)
        encode = milliseconds(lambda p=protobuf, c=compress: wire.encode_request(request, p, c))
        plain = wire.encode_request(request, protobuf)[3]
        decode = milliseconds(lambda t=content_type, b=plain: wire.decode_request(t, b))
        tracemalloc.start()
        wire.encode_request(request, protobuf, compress)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{name:16} {len(body):12,} {encode:7.1f} ms {decode:7.1f} ms {peak / 1e6:6.1f} MB")


if __name__ == "__main__":
    main()
