"""The whole stack (SDK, HTTP, scheduler) against the engine alone in this process.

Both train the same model on the same data in turns. Also measures the time from the start of a
process to the first loss and the first token.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tinkex
from tests.benchmarks import engine
from tests.benchmarks.rounds import LEAST, in_turns
from tests.benchmarks.rows import Row
from tinkex import types
from tinkex.engine.fetch import ensure
from tinkex.text import registry

#: The first example of the README, until its first loss.
FIRST_LOSS = """
import tinkex
with tinkex.ServiceClient() as service:
    client = service.create_lora_training_client("tiny")
    tokens = list(b"Hello, world.")
    datum = tinkex.types.Datum(
        model_input=tinkex.types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )
    print(client.forward_backward([datum], "cross_entropy").result().loss, flush=True)
"""
IMPORT_TORCH = "import torch; print(torch.__version__, flush=True)"
CHAT = [sys.executable, "-c", "from tinkex.cli import main; main()", "chat", "smollm2"]

#: Allowed seconds from the start of the process.
FIRST_LOSS_SECONDS, FIRST_TOKEN_SECONDS = 3.5, 5.0


def rows(seconds: float) -> list[Row]:
    """All figures of this part."""
    with _home() as folder:
        found = [_first_loss(), _first_token()]
        started = time.perf_counter()
        with tinkex.ServiceClient() as service:
            ready = time.perf_counter() - started
            return [*found, *_first_times(service, ready), *_overhead(service, folder, seconds / 2)]


@contextmanager
def _home() -> Iterator[Path]:
    """A home that contains only the fetched model."""
    model = ensure("smollm2")
    folder = Path(tempfile.mkdtemp(prefix="tinkex-bench-"))
    before = os.environ.get("TINKEX_HOME")
    os.environ["TINKEX_HOME"] = str(folder / "home")
    try:
        registry.folder().mkdir(parents=True)
        (registry.folder() / model.name).symlink_to(model, target_is_directory=True)
        yield folder
    finally:
        os.environ.pop("TINKEX_HOME")
        if before is not None:
            os.environ["TINKEX_HOME"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _first_loss() -> Row:
    """`python example.py` until it prints its first loss."""
    taken = [_until_output([sys.executable, "-c", FIRST_LOSS], b"") for _ in range(LEAST)]
    allowed = [FIRST_LOSS_SECONDS]
    return Row(
        "from nothing to a first loss (tiny)", "s", taken, allowed, target=1.0, floor=_floor()
    )


def _first_token() -> Row:
    """`tinkex chat smollm2` until the first letters of an answer."""
    taken = [_until_output(CHAT, b"What is the capital of France?\n") for _ in range(LEAST)]
    allowed = [FIRST_TOKEN_SECONDS]
    return Row(
        "from nothing to a first token (tinkex chat smollm2)", "s", taken, allowed, target=1.0,
        floor=_floor(),
    )  # fmt: skip


def _floor() -> float:
    """Seconds of a process that only imports torch, which every engine needs."""
    return min(_until_output([sys.executable, "-c", IMPORT_TORCH], b"") for _ in range(LEAST))


def _until_output(command: list[str], typed: bytes) -> float:
    """Seconds from the start of a program until it prints something.

    Raises:
        RuntimeError: If it ends without output.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise RuntimeError("a program was started without pipes.")
        process.stdin.write(typed)
        process.stdin.flush()
        seen = process.stdout.read(1)
        taken = time.perf_counter() - started
        process.terminate()
        if not seen:
            raise RuntimeError(f"{command[-3:]} printed nothing: {process.stderr.read()!r}")
    return taken


#: Reading a model in a process that has imported the engine; prints milliseconds.
READ = """
import time
from tinkex.engine.engine import Engine
engine = Engine(device="cpu")
started = time.perf_counter()
engine.load_base("smollm2")
print(1e3 * (time.perf_counter() - started))
"""


def stages() -> str:
    """A table of import times before the first loss, by `python -X importtime`, and of reading a
    model before the first token."""
    rows = ["| import | ms | of which |", "|---|---|---|"]
    for what, code in (
        ("the client", "import tinkex; tinkex.ServiceClient"),
        ("the engine's process", "import tinkex.server.app, tinkex.engine.engine"),
    ):
        times = _import_times(code)
        whole = sum(times.values())
        first = sorted(times, key=lambda name: -times[name])[:6]
        parts = ", ".join(f"{name} {times[name]:,.0f}" for name in first)
        rows.append(f"| {what} | {whole:,.0f} | {parts} |")
    read = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    rows.append(f"| (reading smollm2's weights) | {float(read.stdout):,.0f} | |")
    return "\n".join(rows)


def _import_times(code: str) -> dict[str, float]:
    """Milliseconds of the modules themselves, by package."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    times: dict[str, float] = {}
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", done.stderr):
        package = name.split(".")[0]
        times[package] = times.get(package, 0.0) + int(own) / 1e3
    return times


def _first_times(service: tinkex.ServiceClient, ready: float) -> list[Row]:
    started = time.perf_counter()
    service.create_lora_training_client("tiny", rank=engine.RANK).close()
    whole = ready + time.perf_counter() - started
    made = []

    def create() -> None:
        made.append(service.create_lora_training_client("tiny", rank=engine.RANK))

    create()
    sampler = made[0].save_weights_and_get_sampling_client_sync()
    params = types.SamplingParams(max_tokens=8, stop=[])
    prompt = list(range(65, 81))
    creates, samples = in_turns(
        (create, lambda: sampler.sample(prompt, sampling_params=params).result()), 5.0
    )
    return [
        Row("from nothing to a first model, torch imported", "s", [whole], [8.0], target=1.0),
        Row("create_lora_training_client (tiny)", "ms", [s * 1e3 for s in creates], [300.0],
            target=1.0),
        Row("one 8-token sample alone (tiny)", "ms", [s * 1e3 for s in samples], [40.0],
            target=1.0),
    ]  # fmt: skip


def _overhead(service: tinkex.ServiceClient, folder: Path, seconds: float) -> list[Row]:
    bench = engine.Bench("small", folder)
    data = engine.data_of(engine.chats(32, bench.vocab))
    client = service.create_lora_training_client(
        str(bench.base), rank=engine.RANK, adapter=str(bench.adapter), **engine.FLAGS
    )

    def through_the_sdk() -> None:
        client.forward_backward(data, "cross_entropy")
        client.optim_step(engine.LEARN).result()

    def alone() -> None:
        engine.drive(bench.engine.forward_backward("m", data, "cross_entropy", None))
        bench.engine.optim_step("m", engine.LEARN)

    ours, engines = in_turns((through_the_sdk, alone), seconds)
    bench.close()
    case = "one training step of small: SDK, HTTP, scheduler, engine; against the engine alone"
    return [Row(case, "ms", [s * 1e3 for s in ours], [s * 1e3 for s in engines], target=1.1)]
