"""A user's small samples beside a neighbour who asks for everything.

python -m tests.chaos.neighbour [--seconds 60]
    prints the latencies and the server's memory, and fails if they are not as promised.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import attrs
import psutil

from tests.support.processes import ServerProcess
from tests.support.wire_client import WireClient

#: What the neighbour asks for: samples, and tokens of each.
SAMPLES, TOKENS = 1024, 1_000_000
#: Promised at the 99th percentile.
SECONDS = 1.0
#: The neighbour's stop strings cost time at every token.
STOPS = [f"{i:04}" * 128 for i in range(64)]


@attrs.define
class Seen:
    """Seconds from each request to its result, and the server's largest memory in bytes."""

    latencies: list[float] = attrs.field(factory=list)
    memory: int = 0

    def percentile(self, part: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[int(part * (len(ordered) - 1))]

    def __str__(self) -> str:
        return (
            f"{len(self.latencies)} samples of one token beside {SAMPLES:,} x {TOKENS:,}: "
            f"{statistics.median(self.latencies):.3f} s in the median, "
            f"{self.percentile(0.99):.3f} s at the 99th percentile, "
            f"{max(self.latencies):.3f} s at most; server {self.memory / 2**20:.0f} MiB at most"
        )


def measure(home: Path, seconds: float, stops: bool = False) -> Seen:
    """Sample single tokens for *seconds* while the neighbour's request runs."""
    keys = ["greedy=greedy-key", "small=small-key"]
    server = ServerProcess(home, real=True, api_keys=keys)
    server.start()
    process, seen = psutil.Process(server.process.pid), Seen()
    try:
        url = f"http://127.0.0.1:{server.port}"
        greedy, small = WireClient(url, "greedy-key"), WireClient(url, "small-key")
        mine, theirs = small.sampler(), greedy.sampler()
        small.result(small.sample(mine, 0, max_tokens=1))  # the engine has started
        params = {"stop": STOPS} if stops else {}
        greedy.sample(theirs, 0, num_samples=SAMPLES, max_tokens=TOKENS, params=params)
        until, seq = time.monotonic() + seconds, 1
        while time.monotonic() < until:
            start = time.monotonic()
            small.result(small.sample(mine, seq, max_tokens=1))
            seen.latencies.append(time.monotonic() - start)
            seen.memory = max(seen.memory, process.memory_info().rss)
            seq += 1
        for client in (greedy, small):
            client.http.close()
    finally:
        server.close()
    return seen


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    given = parser.parse_args()
    good = True
    for stops in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            seen = measure(Path(folder) / "home", given.seconds, stops)
        print(f"{seen}{' (with 64 stop strings of 512 characters)' if stops else ''}", flush=True)
        good &= seen.percentile(0.99) < SECONDS
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
