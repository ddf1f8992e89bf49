"""Everything at once for a long time: several clients training, thousands of samples in flight.

python -m tests.chaos.load [--seconds 600] [--clients 8] [--samples 2000] [--out build/load.json]
    runs that against its own server, writes what it saw, and says whether it is as promised.
python -m tests.chaos.load --draw docs/load.png [--out build/load.json]
    draws it.

One client sends small batches and times them; the others send big ones. Memory and threads of the
server and of the clients' process are looked at every few seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import psutil

import tinkex
from tests.chaos.servers import Server
from tinkex import types
from tinkex.runtime.heartbeat import Heartbeat

MIB = 2**20
#: (datums, tokens of each) of a batch.
BIG, SMALL = (32, 64), (1, 16)
#: Tokens of a prompt, and of what is sampled to it.
PROMPT, SAMPLED = 12, 8
#: Seconds between two looks.
LOOK = 5.0
#: How much more at the end than at the beginning is still flat: the larger of both.
GROWTH, SLACK = 1.05, 48 * MIB


@attrs.define
class Seen:
    """What was seen. All lists but `looks` are in seconds.

    Attributes:
        looks: dicts with the time, and memory and threads of both processes, and all counters.
        small: from the call of a small batch to its result, each.
        late: how much later than they should heartbeats were answered.
        errors: what failed, in words.
    """

    seconds: float = 0.0
    steps: int = 0
    samples: int = 0
    asked: int = 0
    looks: list[dict[str, float]] = attrs.field(factory=list)
    small: list[float] = attrs.field(factory=list)
    late: list[float] = attrs.field(factory=list)
    errors: list[str] = attrs.field(factory=list)


class Load:
    """Clients at work, until `seconds` are over."""

    def __init__(self, server: Server, clients: int, samples: int, seconds: float) -> None:
        self._server, self._clients, self._samples = server, clients, samples
        self._until = time.monotonic() + seconds
        self._began = time.monotonic()
        self._lock = threading.Lock()  # guards `seen`
        self.seen = Seen()
        self._steps = 0

    def run(self) -> Seen:
        workers = [threading.Thread(target=self._guarded, args=(self._sample,), name="sampler")]
        for number in range(self._clients):
            arguments = (self._train, number, SMALL if number == 0 else BIG)
            workers.append(threading.Thread(target=self._guarded, args=arguments))
        with heartbeats_in(self.seen.late):
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                self._look()
                time.sleep(min(LOOK, (self._until - self._began) / 10))
        self.seen.seconds = time.monotonic() - self._began
        return self.seen

    def _guarded(self, work: Any, *arguments: Any) -> None:
        try:
            with tinkex.ServiceClient(self._server.url, "tml-any") as service:
                work(service, *arguments)
        except Exception as exc:
            with self._lock:
                self.seen.errors.append(f"{type(exc).__name__}: {exc}")

    def _train(self, service: Any, number: int, size: tuple[int, int]) -> None:
        training = service.create_lora_training_client("tiny", rank=8, seed=number)
        for step in itertools.count():
            if time.monotonic() > self._until:
                return
            began = time.monotonic()
            batch = training.forward_backward(batch_of(*size, seed=step), "cross_entropy")
            stepped = training.optim_step(types.AdamParams(learning_rate=1e-3))
            if step % 20 == 19:
                training.save_state("latest", overwrite=True, ttl_seconds=3600).result()
            batch.result()
            if size == SMALL:
                self.seen.small.append(time.monotonic() - began)
                time.sleep(0.1)
            stepped.result()
            with self._lock:
                self.seen.steps += 1

    def _sample(self, service: Any) -> None:
        sampler = service.create_sampling_client(base_model="tiny")
        params = types.SamplingParams(max_tokens=SAMPLED)
        for _, response in sampler.sample_many(self._prompts(), 1, params, in_flight=self._samples):
            assert SAMPLED >= len(response.sequences[0].tokens) > 0
            self.seen.samples += 1

    def _prompts(self) -> Iterator[list[int]]:
        chance = np.random.default_rng(0)
        while time.monotonic() < self._until:
            self.seen.asked += 1
            yield chance.integers(1, 200, size=PROMPT).tolist()

    def _look(self) -> None:
        look: dict[str, float] = {"at": time.monotonic() - self._began}
        for name, pid in (("server", self._server.process.pid), ("client", os.getpid())):
            process = psutil.Process(pid)
            look[f"{name}_bytes"] = process.memory_info().rss
            look[f"{name}_threads"] = process.num_threads()
            look[f"{name}_files"] = process.num_fds()
        look |= {"steps": self.seen.steps, "samples": self.seen.samples}
        look["home_bytes"] = sum(
            path.stat().st_size for path in self._server.home.rglob("*.sqlite*") if path.exists()
        )
        self.seen.looks.append(look)


@contextlib.contextmanager
def heartbeats_in(late: list[float]) -> Iterator[None]:
    """While entered, notes in *late* by how many seconds each heartbeat was late."""
    beat: Any = Heartbeat._beat_once
    last: dict[str, float] = {}

    def noting(heartbeat: Any) -> None:
        beat(heartbeat)
        now, before = time.monotonic(), last.get(heartbeat.name)
        last[heartbeat.name] = now
        if before is not None:
            late.append(now - before - heartbeat._transport.config.patience.heartbeat)

    Heartbeat._beat_once = noting
    try:
        yield
    finally:
        Heartbeat._beat_once = beat


def batch_of(datums: int, tokens: int, seed: int) -> list[types.Datum]:
    chance = np.random.default_rng(seed)
    rows = chance.integers(1, 200, size=(datums, tokens))
    weights = np.ones(tokens - 1, dtype=np.float32)
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:], "weights": weights},
        )
        for row in rows
    ]


def grown(looks: list[dict[str, float]], name: str) -> tuple[float, float]:
    """The median in the second fifth of the time, and in the last."""
    fifth = max(1, len(looks) // 5)
    early, late = looks[fifth : 2 * fifth] or looks, looks[-fifth:]
    return tuple(statistics.median(look[name] for look in part) for part in (early, late))


def is_flat(looks: list[dict[str, float]], name: str) -> bool:
    early, late = grown(looks, name)
    slack = SLACK if name.endswith("bytes") else 16
    return late <= max(early * GROWTH, early + slack)


def summary(seen: Seen) -> list[str]:
    """What was seen, in lines."""
    small = sorted(seen.small) or [0.0]
    late = sorted(seen.late) or [0.0]
    lines = [
        f"{seen.seconds:.0f} s: {seen.steps} steps, {seen.samples} samples of {seen.asked} "
        f"asked for, {len(seen.errors)} errors",
        f"a small batch among big ones: {statistics.median(small):.2f} s in the median, "
        f"{small[int(0.99 * (len(small) - 1))]:.2f} s at the 99th percentile, {small[-1]:.2f} s "
        "at most",
        f"heartbeats: {len(seen.late)}, the latest {late[-1]:.2f} s late",
    ]
    for name in ("server", "client"):
        memory = [value / MIB for value in grown(seen.looks, f"{name}_bytes")]
        threads, files = (grown(seen.looks, f"{name}_{what}") for what in ("threads", "files"))
        lines.append(
            f"{name}: memory {memory[0]:.0f} -> {memory[1]:.0f} MiB, threads {threads[0]:.0f} -> "
            f"{threads[1]:.0f}, open files {files[0]:.0f} -> {files[1]:.0f}"
        )
    return lines + seen.errors[:5]


def draw(seen: Seen, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    minutes = [look["at"] / 60 for look in seen.looks]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6), constrained_layout=True)
    for name, axis, unit in (("bytes", axes[0][0], MIB), ("threads", axes[0][1], 1)):
        for who in ("server", "client"):
            axis.plot(minutes, [look[f"{who}_{name}"] / unit for look in seen.looks], label=who)
        axis.set(title="memory, MiB" if name == "bytes" else "threads", ylim=(0, None))
        axis.legend()
    axes[1][0].plot(minutes, [look["samples"] for look in seen.looks], label="samples")
    axes[1][0].plot(minutes, [look["steps"] for look in seen.looks], label="steps")
    axes[1][0].set(title="done", xlabel="minutes", yscale="log")
    axes[1][0].legend()
    axes[1][1].hist(seen.small, bins=50)
    axes[1][1].set(title="a small batch among big ones", xlabel="seconds to its result")
    figure.savefig(path, dpi=110)


def measure(home: Path, clients: int, samples: int, seconds: float) -> Seen:
    """Put that load on a server in *home*."""
    with Server(home) as server, tinkex.ServiceClient(server.url) as service:
        service.create_lora_training_client("tiny", rank=8)  # the engine is there from now on
        return Load(server, clients, samples, seconds).run()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("build/load.json"))
    parser.add_argument("--draw", type=Path)
    given = parser.parse_args()
    if given.draw is not None:
        seen = Seen(**json.loads(given.out.read_text()))
        draw(seen, given.draw)
    else:
        with tempfile.TemporaryDirectory() as folder:
            seen = measure(Path(folder) / "home", given.clients, given.samples, given.seconds)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(attrs.asdict(seen)))
    print("\n".join(summary(seen)))
    names = [f"{who}_{what}" for who in ("server", "client") for what in ("bytes", "threads")]
    growing = [name for name in names if not is_flat(seen.looks, name)]
    if growing:
        print("not flat:", ", ".join(growing))
    return 1 if seen.errors or growing or seen.samples != seen.asked else 0


if __name__ == "__main__":
    sys.exit(main())
