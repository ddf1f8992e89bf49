"""The client against the official SDK, side by side on the same do-nothing server.

Every figure is a ratio tinkex / official, the median over rounds in which both ran one after the
other; absolute times are shown to give a feeling, and mean nothing elsewhere.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
#: Seconds that no client can be quicker than, where they are much of the whole.
LATENCY = {"samples_200": 1.0, "samples_200_polled": 1.0}
GROWTH = (10, 100, 1000, 10_000)


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


def rows(rounds: int) -> list[Row]:
    """All figures of the client table."""
    made = [*import_rows(rounds)]
    with null_server() as url:
        for case, figures in CASES.items():
            ours, theirs, floors = [], [], []
            for _ in range(rounds):
                ours.append(run("tinkex", case, url))
                theirs.append(run("tinker", case, url))
                if case in ("cold_start", "small_operation", "pipelined"):
                    floors.append(run("floor", f"floor_{case}", url))
            if case in LATENCY:
                floors = [{"wall": LATENCY[case]}]
            made += [_row(case, *figure, ours, theirs, floors) for figure in figures]
        made += closed_port_rows(url)
    return made


def _row(
    case: str,
    figure: str,
    unit: str,
    scale: float,
    target: float | None,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    floors: list[dict[str, float]],
) -> Row:
    ratio = statistics.median(
        a[figure] / max(b[figure], 1e-12) for a, b in zip(ours, theirs, strict=True)
    )
    known = [f[figure] * scale for f in floors if figure in f]
    return Row(
        f"{NAMES[case]}: {figure}",
        unit,
        statistics.median(a[figure] for a in ours) * scale,
        statistics.median(b[figure] for b in theirs) * scale,
        ratio,
        target,
        floor=statistics.median(known) if known else None,
    )


def import_rows(rounds: int) -> list[Row]:
    """`import`, in a fresh process, less the time of a bare interpreter; and its memory.

    Ours imports the public names when they are first used; what that costs then is in the cold
    start, and shown here as a line without a target.
    """
    made = []
    for label, prelude, target in (
        ("without torch", "import sys; sys.modules['torch'] = None; ", 0.35),
        ("with torch installed", "", 0.12),
    ):
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(_import(sys.executable, f"{prelude}import tinkex"))
            theirs.append(_import(str(sdk.python_of(OFFICIAL)), f"{prelude}import tinker"))
        for figure, unit in (("wall", "ms"), ("memory", "MB")):
            made.append(
                Row(
                    f"import, {label}: {figure}",
                    unit,
                    statistics.median(a[figure] for a in ours),
                    statistics.median(b[figure] for b in theirs),
                    statistics.median(
                        a[figure] / b[figure] for a, b in zip(ours, theirs, strict=True)
                    ),
                    target if figure == "wall" else 1.0,
                )
            )
    whole = [_import(sys.executable, "import tinkex.service") for _ in range(rounds)]
    wall = statistics.median(one["wall"] for one in whole)
    made.append(Row("import of all that ServiceClient needs: wall", "ms", wall, None, None))
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
    """First contact with a closed port: seconds until an error comes."""
    ours, theirs = run("tinkex", "closed_port", url), run("tinker", "closed_port", url)
    return [
        Row(
            "first contact with a closed port: seconds to a clear error (official: none in 30 s)"
            if not theirs["said"]
            else "first contact with a closed port: seconds to a clear error",
            "s",
            ours["wall"],
            theirs["wall"],
            ours["wall"] / theirs["wall"],
            10 / 30,
        )
    ]


def growth(url: str) -> dict[str, list[tuple[int, float]]]:
    """Client processor time per operation (ms) against how many there are."""
    curves: dict[str, list[tuple[int, float]]] = {"queued": [], "in flight": []}
    for n in GROWTH:
        pipelined = run("tinkex", f"pipelined_{n}", url)
        curves["queued"].append((n, pipelined["cpu"] / 2 * 1e3))
        in_flight = run("tinkex", f"in_flight_{n}", url)
        curves["in flight"].append((n, in_flight["cpu"] / n * 1e3))
    return curves
