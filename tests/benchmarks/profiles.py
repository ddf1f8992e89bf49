"""`make profile`: flame graphs of a training step, a decode step and a call of the client.

Usage: python -m tests.benchmarks.profiles [step] [decode] [call]: starts py-spy, which samples a
separate process a hundred times a second, and writes build/profile/NAME.svg. Shows lines of Python,
not C, because py-spy cannot unwind the code that oneDNN generates, which is most of a step. For the
engine's two graphs, also prints a table of torch's operations by their own time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.figures import ROOT

OUT = ROOT / "build" / "profile"
MODEL = "small"

#: Seconds sampled for a graph.
SECONDS = 10.0
#: Operations in a table.
TOP = 12


def step(repeat: Callable[[Callable[[], object]], None]) -> None:
    """A training step of the small model."""
    from tests.benchmarks import engine

    with tempfile.TemporaryDirectory() as folder:
        bench = engine.Bench(MODEL, Path(folder))
        data = engine.data_of(engine.chats(16, bench.vocab))

        def work() -> None:
            engine.drive(bench.engine.forward_backward("m", data, "cross_entropy", None))
            bench.engine.optim_step("m", engine.LEARN)

        repeat(work)


def decode(repeat: Callable[[Callable[[], object]], None]) -> None:
    """Decoding with the small model, 16 streams."""
    from tests.benchmarks import engine

    with tempfile.TemporaryDirectory() as folder:
        bench = engine.Bench(MODEL, Path(folder))
        prompts = engine.prompts_of([16] * 16, bench.vocab)
        repeat(lambda: engine.ask(bench, prompts, 1, 32))


def call(repeat: Callable[[Callable[[], object]], None]) -> None:
    """Consecutive small operations of the client, on a server that computes nothing."""
    import os

    import tinkex
    from tests.benchmarks.client import null_server

    os.environ["TINKER_API_KEY"] = "tml-null"
    with null_server() as url, tinkex.ServiceClient(base_url=url) as service:
        client = service.create_lora_training_client("null")
        repeat(lambda: client.optim_step(tinkex.types.AdamParams()).result())


KINDS = {"step": step, "decode": decode, "call": call}


def _for_a_while(work: Callable[[], object]) -> None:
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        work()


def _with_table(work: Callable[[], object]) -> None:
    """Print the results of torch's profiler for one call."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        work()
    events = measured.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:TOP]:
        own = event.self_cpu_time_total
        print(f"{event.key:55} {event.count:7,} {own / 1e3:9,.1f} ms {own / whole:4.0%}")


def record(name: str) -> Path:
    """Draw one flame graph; return its file.

    Raises:
        RuntimeError: With py-spy's message, if it may not inspect the process.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    file = OUT / f"{name}.svg"
    command = [Path(sys.executable).with_name("py-spy"), "record", "--subprocesses"]
    command += ["--output", file, "--", sys.executable, "-m", __spec__.name, "--run", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not file.exists() or done.returncode:
        raise RuntimeError(f"py-spy could not record {name}:\n{done.stderr[-2000:]}")
    return file


def main() -> int:
    if sys.argv[1:2] == ["--run"]:
        KINDS[sys.argv[2]](_for_a_while)
        return 0
    names = sys.argv[1:] or list(KINDS)
    for name in names:
        if name != "call":
            print(f"{name}: {(KINDS[name].__doc__ or '').strip()}")
            KINDS[name](_with_table)
        print(f"{name}: {record(name).relative_to(ROOT)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
