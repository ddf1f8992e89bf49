"""The client against the official SDK, side by side on the same do-nothing server.

Every case runs in a separate process; in every round, both SDKs run in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.rounds import LEAST, MOST, Allowance
from tests.benchmarks.rows import Row
from tests.official_sdk import sdk

HERE = Path(__file__).parent
OFFICIAL = "0.38.0"

BEYOND = ("wall beyond the latency", "s", 1, 0.4)
#: case -> [(figure, unit, scale, target ratio)]
CASES: dict[str, list[tuple[str, str, float, float | None]]] = {
    "cold_start": [("wall", "ms", 1e3, 0.35)],
    "small_operation": [("p50", "ms", 1e3, 0.25), ("cpu", "ms", 1e3, 0.25)],
    "pipelined": [("wall", "ms a step", 1e3, 1 / 3), ("cpu", "ms a step", 1e3, 0.25)],
    "large_batch": [
        ("wall", "s", 1, 0.5),
        ("memory", "MB above the data", 1e-6, 0.2),
        ("bytes", "MB sent", 1e-6, 1.0),
    ],
    "samples_2000": [
        ("wall", "s", 1, 0.3),
        ("cpu", "s", 1, 0.3),
        ("memory", "MB", 1e-6, 1.0),
    ],
    "samples_200": [("wall", "s", 1, 0.8), BEYOND, ("cpu", "s", 1, 0.4)],
    "samples_2000_polled": [("wall", "s", 1, 0.35), ("cpu", "s", 1, 0.35)],
    "samples_200_polled": [("wall", "s", 1, 0.8), BEYOND, ("cpu", "s", 1, 0.4)],
}
NAMES = {
    "cold_start": "cold start to the first result",
    "small_operation": "one small operation, submit to result",
    "pipelined": "200 pipelined steps (8 x 128 tokens + optim_step)",
    "large_batch": "one forward_backward of 2,048 x 2,048 tokens",
    "samples_2000": "2,000 samples in flight, 50 ms each",
    "samples_200": "200 samples in flight, 1,000 ms each",
    "samples_2000_polled": "the same 2,000, server without retrieve_futures",
    "samples_200_polled": "the same 200, server without retrieve_futures",
}
#: Lower bounds in seconds for any client, where they dominate the total.
LATENCY = {"samples_200": 1.0, "samples_200_polled": 1.0}
OF_SESSION = "against the adapter without requests.Session"
GROWTH = (10, 100, 1000, 10_000)

#: Costs by number, for each counted object.
Curves = dict[str, list[tuple[int, float]]]


@contextmanager
def null_server() -> Iterator[str]:
    """The address of a do-nothing server in a separate process."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "null_server.py")], stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"  # type: ignore[union-attr]
    finally:
        process.terminate()
        process.wait()


def run(name: str, case: str, url: str) -> dict[str, Any]:
    """One case in a separate process; RuntimeError if it fails."""
    python = str(sdk.python_of(OFFICIAL)) if name == "tinker" else sys.executable
    done = subprocess.run(
        [python, str(HERE / "client_case.py"), name, case, url],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=sdk.ROOT,
        env={**os.environ, "PYTHONPATH": str(sdk.ROOT) if name == "tinkex" else ""},
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{case} of {name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def run_all(seconds: float) -> tuple[list[Row], Curves]:
    """All figures of the client's table, and its curves."""
    allowance = Allowance(seconds, len(CASES) + 1)  # the last: the curves
    made = import_rows()
    with null_server() as url:
        for case, figures in CASES.items():
            found = _case_rows(case, figures, url, allowance.next())
            for row in found:
                print(f"{row.key:70} ratio {row.ratio}", flush=True)
            made += found
        made += [session_row(url), *closed_port_rows(url)]
        return made, growth(url)


def _case_rows(
    case: str, figures: Sequence[tuple[str, str, float, float | None]], url: str, seconds: float
) -> list[Row]:
    """A case of both SDKs in turns, and of the bare loop if there is one."""
    names = ["tinkex", "tinker"]
    if case in ("cold_start", "small_operation", "pipelined"):
        names.append("floor")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for done in range(MOST):
        if done >= LEAST and time.perf_counter() >= end:
            break
        for name in names:
            found[name].append(run(name, f"floor_{case}" if name == "floor" else case, url))
        names.reverse()
    floors = [{"wall": LATENCY[case]}] if case in LATENCY else found.get("floor", [])
    return [
        Row(
            f"{NAMES[case]}: {figure}",
            unit,
            [one[figure] * scale for one in found["tinkex"]],
            [one[figure] * scale for one in found["tinker"]],
            target=target,
            floor=_median([one[figure] * scale for one in floors if figure in one]),
        )
        for figure, unit, scale, target in figures
    ]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def import_rows() -> list[Row]:
    """`import` in a fresh process, minus the time of a bare interpreter; and its memory.

    Ours imports the public names when they are first used; that cost is part of the cold start, and
    shown here as a line without a target.
    """
    made = []
    official = str(sdk.python_of(OFFICIAL))
    for label, prelude, target in (
        ("without torch", "import sys; sys.modules['torch'] = None; ", 0.35),
        ("with torch installed", "", 0.12),
    ):
        ours, theirs = [], []
        for _ in range(LEAST):
            ours.append(_import(sys.executable, f"{prelude}import tinkex"))
            theirs.append(_import(official, f"{prelude}import tinker"))
        for figure, unit in (("wall", "ms"), ("memory", "MB")):
            made.append(
                Row(
                    f"import, {label}: {figure}",
                    unit,
                    [one[figure] for one in ours],
                    [one[figure] for one in theirs],
                    target=target if figure == "wall" else 1.0,
                )
            )
    whole = [_import(sys.executable, "import tinkex.service")["wall"] for _ in range(LEAST)]
    made.append(Row("import of all that ServiceClient needs: wall", "ms", whole))
    return made


def _import(python: str, code: str) -> dict[str, float]:
    program = (
        "import time; t = time.perf_counter()\n"
        f"{code}\n"
        "wall = (time.perf_counter() - t) * 1e3\n"
        "[kb] = [s.split()[1] for s in open('/proc/self/status') if s.startswith('VmHWM')]\n"
        "print(wall, int(kb) / 1e3)"
    )
    environment = {**os.environ, "PYTHONPATH": str(sdk.ROOT) if python == sys.executable else ""}
    done = subprocess.run(
        [python, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    wall, memory = map(float, done.stdout.split())
    return {"wall": wall, "memory": memory}


def closed_port_rows(url: str) -> list[Row]:
    """First contact with a closed port: seconds until the error."""
    ours, theirs = run("tinkex", "closed_port", url), run("tinker", "closed_port", url)
    case = "first contact with a closed port: seconds to a clear error"
    if not theirs["said"]:
        case += " (official: none in 30 s)"
    return [Row(case, "s", [ours["wall"]], [theirs["wall"]], target=10 / 30)]


def session_row(url: str) -> Row:
    """The cost of `requests.Session` per exchange; the other figure is without it."""
    rounds = [run("tinkex", "session_price", url) for _ in range(LEAST)]
    return Row(
        f"one exchange, {OF_SESSION}: cpu",
        "us",
        [one["with"] * 1e6 for one in rounds],
        [one["without"] * 1e6 for one in rounds],
    )


def growth(url: str) -> Curves:
    """Client processor time per operation (ms), by the number of operations."""
    curves: Curves = {"queued": [], "in flight": []}
    for n in GROWTH:
        pipelined = run("tinkex", f"pipelined_{n}", url)
        curves["queued"].append((n, pipelined["cpu"] / 2 * 1e3))
        in_flight = run("tinkex", f"in_flight_{n}", url)
        curves["in flight"].append((n, in_flight["cpu"] / n * 1e3))
    return curves
