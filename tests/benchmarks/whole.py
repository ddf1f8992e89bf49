"""The whole way, SDK and HTTP and scheduler, against the engine alone in this process.

Both train the same model on the same data in turns. Also how long it takes from nothing to a
server, a model and a first sample.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import tinkex
from tests.benchmarks import engine
from tests.benchmarks.rows import Row
from tinkex import types

LEARN = types.AdamParams(learning_rate=1e-4)


def rows(rounds: int = 5) -> list[Row]:
    """All figures of the whole way."""
    folder = Path(tempfile.mkdtemp(prefix="tinkex-bench-"))
    os.environ["TINKEX_HOME"] = str(folder / "home")
    try:
        started = time.perf_counter()
        with tinkex.ServiceClient() as service:
            ready = time.perf_counter() - started
            return [*_first_times(service, ready), *_overhead(service, folder, rounds)]
    finally:
        del os.environ["TINKEX_HOME"]
        shutil.rmtree(folder, ignore_errors=True)


def _first_times(service: tinkex.ServiceClient, ready: float) -> list[Row]:
    started = time.perf_counter()
    service.create_lora_training_client("tiny", rank=engine.RANK).close()
    whole = ready + time.perf_counter() - started
    creates, samples = [], []
    for _ in range(5):
        started = time.perf_counter()
        client = service.create_lora_training_client("tiny", rank=engine.RANK)
        creates.append(time.perf_counter() - started)
    sampler = client.save_weights_and_get_sampling_client_sync()
    params = types.SamplingParams(max_tokens=8, stop=[])
    for _ in range(20):
        started = time.perf_counter()
        sampler.sample(list(range(65, 81)), sampling_params=params).result()
        samples.append(time.perf_counter() - started)
    create, sample = statistics.median(creates), statistics.median(samples)
    return [
        Row("from nothing to a first model, torch imported: s", "s", whole, 8.0, whole / 8, 1.0),
        Row("create_lora_training_client (tiny)", "ms", create * 1e3, 300, create / 0.3, 1.0),
        Row("one 8-token sample alone (tiny)", "ms", sample * 1e3, 40, sample / 0.04, 1.0),
    ]


def _overhead(service: tinkex.ServiceClient, folder: Path, rounds: int) -> list[Row]:
    bench = engine.Bench("small", folder)
    data = engine.data_of(engine.chats(32, bench.vocab))
    client = service.create_lora_training_client(
        str(bench.base), rank=engine.RANK, adapter=str(bench.adapter), **engine.FLAGS
    )

    def through_the_sdk() -> None:
        client.forward_backward(data, "cross_entropy")
        client.optim_step(LEARN).result()

    def alone() -> None:
        engine.drive(bench.engine.forward_backward("m", data, "cross_entropy", None))
        bench.engine.optim_step("m", LEARN)

    ours, engines = engine.in_turns(through_the_sdk, alone, rounds)
    return [
        Row(
            "one training step of small, SDK + HTTP + scheduler + engine, against the engine alone",
            "ms",
            ours * 1e3,
            engines * 1e3,
            ours / engines,
            1.1,
        )
    ]
