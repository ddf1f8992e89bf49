"""A user's small samples beside a neighbour that requests as much as possible.

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
from typing import Any

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
#: Its long prompts, each its own, and what is asked of them, which costs time, too.
PROMPTS = [[(i + j) % 250 for j in range(4000)] for i in range(200)]
SCORES = {"prompt_logprobs": True}

ENDLESS: dict[str, Any] = {"num_samples": SAMPLES, "max_tokens": TOKENS}
#: How a neighbour is called -> its requests.
NEIGHBOURS: dict[str, list[dict[str, Any]]] = {
    f"{SAMPLES:,} x {TOKENS:,}": [ENDLESS],
    f"{SAMPLES:,} x {TOKENS:,} with 64 stop strings of 512 characters": [
        {**ENDLESS, "params": {"stop": STOPS}}
    ],
    f"{len(PROMPTS)} prompts of {len(PROMPTS[0]):,} tokens with their log-probabilities": [
        {"tokens": prompt, **SCORES} for prompt in PROMPTS
    ],
}


@attrs.define
class Seen:
    """Seconds from each request to its result, and the server's largest memory in bytes."""

    neighbour: str
    latencies: list[float] = attrs.field(factory=list)
    memory: int = 0

    def percentile(self, part: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[int(part * (len(ordered) - 1))]

    def __str__(self) -> str:
        return (
            f"{len(self.latencies)} samples of one token beside {self.neighbour}: "
            f"{statistics.median(self.latencies):.3f} s in the median, "
            f"{self.percentile(0.99):.3f} s at the 99th percentile, "
            f"{max(self.latencies):.3f} s at most; server {self.memory / 2**20:.0f} MiB at most"
        )


def measure(home: Path, seconds: float, neighbour: str) -> Seen:
    """Sample single tokens for *seconds* while the neighbour's requests run."""
    keys = ["greedy=greedy-key", "small=small-key"]
    server = ServerProcess(home, real=True, api_keys=keys)
    server.start()
    process, seen = psutil.Process(server.process.pid), Seen(neighbour)
    try:
        url = f"http://127.0.0.1:{server.port}"
        greedy, small = WireClient(url, "greedy-key"), WireClient(url, "small-key")
        mine, theirs = small.sampler(), greedy.sampler()
        small.result(small.sample(mine, 0, max_tokens=1))  # the engine has started
        for i, asked in enumerate(NEIGHBOURS[neighbour]):
            greedy.sample(theirs, i, **asked)
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
    for neighbour in NEIGHBOURS:
        with tempfile.TemporaryDirectory() as folder:
            seen = measure(Path(folder) / "home", given.seconds, neighbour)
        print(seen, flush=True)
        good &= seen.percentile(0.99) < SECONDS
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
