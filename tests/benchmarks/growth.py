"""Costs by numbers and sizes: no curve may bend upwards.

The server's curves go through the SDK to the embedded engine with *tiny*; a home full of
checkpoints is made by adding rows and linked files to the server's home. The engine's curves come
from `growth_case`. A figure is the fastest of a few tries, since other load can only add to it. All
sizes are always measured, which takes about two minutes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.plots import Curve, panels
from tests.benchmarks.rows import Row, number

MODELS = (1, 10, 50, 200)
CHECKPOINTS = (10, 100, 1000, 10_000)
SESSIONS = (10, 100, 1000, 10_000)
METRICS = (100, 1000, 10_000, 100_000)

#: A curve bends upwards if its slope at the end, in logarithms, is steeper than this: a cost that
#: grows in proportion has slope 1. Times vary more than memory.
STEEPEST = {"time": 1.2, "memory": 1.1}
#: Lower bounds of the machine, shown beside our curves.
OF_THE_MACHINE = ("of which attention (ms a token)", "the bare products with the head (ms)")
#: Points at the end of a curve through which a line is fitted.
FITTED = 3
#: Costs below this (ms, MiB) are negligible and count as this.
NEXT_TO_NOTHING = {"time": 0.001, "memory": 1.0}
#: Allowed seconds of `tinkex checkpoint list`.
LIST_SECONDS = 0.5

Panels = dict[str, dict[str, Curve]]


def run() -> tuple[list[Row], Panels]:
    """Rows with a target, and panels of curves: costs by counted object."""
    with _served() as (service, home):
        rows, found = _of_the_server(service, home)
    found |= _of_the_engine()
    rows += [_bends(found, quantity) for quantity in STEEPEST]
    panels(found, "", "growth-of.svg", proportion=True)
    return rows, found


def text_of(found: Panels) -> str:
    """The curves as a table, with the slope at the end of each one."""
    lines = ["| what is counted | cost | at its sizes | slope at the end |", "|---" * 4 + "|"]
    for kind, curves in found.items():
        for name, points in curves.items():
            shown = ", ".join(f"{int(n):,}: {number(cost)}" for n, cost in points)
            lines.append(f"| {kind} | {name} | {shown} | {slope(name, points):.2f} |")
    return "\n".join(lines)


def slope(name: str, points: Curve) -> float:
    """Slope of a least-squares line through the last points on logarithmic axes: 0 is a constant
    cost, 1 a proportional one."""
    least = NEXT_TO_NOTHING[_quantity(name)]
    xs, ys = zip(*((math.log(n), math.log(max(cost, least))) for n, cost in points[-FITTED:]))
    return statistics.linear_regression(xs, ys).slope


def _quantity(name: str) -> str:
    """The quantity of the curve with this name: time or memory."""
    return "memory" if name.startswith("memory") else "time"


def _bends(found: Panels, quantity: str) -> Row:
    """The steepest curve of time or of memory."""
    slopes = {
        name: slope(name, points)
        for curves in found.values()
        for name, points in curves.items()
        if _quantity(name) == quantity and name not in OF_THE_MACHINE
    }
    steepest = max(slopes, key=lambda name: slopes[name])
    case = f"steepest curve of {quantity} ({steepest}): slope, 1 is in proportion"
    return Row(case, "", [slopes[steepest]], [1.0], target=STEEPEST[quantity])


def _quickest(work: Callable[[], object], tries: int = 5) -> float:
    """Milliseconds."""
    taken = []
    for _ in range(tries):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1e3 * min(taken)


# -- the server ----------------------------------------------------------------------------------


@contextmanager
def _served() -> Iterator[tuple[Any, Path]]:
    """A client of an embedded engine with an empty home."""
    import tinkex

    with tempfile.TemporaryDirectory(prefix="tinkex-bench-") as folder:
        home, before = Path(folder) / "home", os.environ.get("TINKEX_HOME")
        os.environ["TINKEX_HOME"] = str(home)
        try:
            with tinkex.ServiceClient() as service:
                yield service, home
        finally:
            os.environ.pop("TINKEX_HOME")
            if before is not None:
                os.environ["TINKEX_HOME"] = before


def _of_the_server(service: Any, home: Path) -> tuple[list[Row], Panels]:
    found = {"live models": _models(service), "samplers": _samplers(service)}
    found["sessions in the home"] = _sessions(service, home)
    found["points of a run's metrics"] = _metrics(service)
    found["checkpoints in the home"], seconds = _checkpoints(service, home)
    case = "tinkex checkpoint list, 10,000 in the home, against the time allowed"
    return [Row(case, "s", [seconds], [LIST_SECONDS], target=1.0)], found


def _datum() -> Any:
    from tinkex import types

    return types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})


def _models(service: Any) -> dict[str, Curve]:
    """A step of one model, and creating another, beside existing models."""
    from tinkex import types

    clients: list[Any] = []
    step, create = [], []

    def make() -> None:
        clients.append(service.create_lora_training_client("tiny", rank=4))

    def train() -> None:
        clients[0].forward_backward([_datum()], "cross_entropy")
        clients[0].optim_step(types.AdamParams()).result()

    make()  # loads the base model
    clients.pop().close()
    for count in MODELS:
        while len(clients) < count - 1:
            make()
        create.append((count, _quickest(make, 1)))
        step.append((count, _quickest(train)))
    for client in clients:
        client.close()
    return {"a training step (ms)": step, "creating one more (ms)": create}


def _samplers(service: Any) -> dict[str, Curve]:
    from tinkex import types

    client = service.create_lora_training_client("tiny", rank=4)
    samplers: list[Any] = []
    curve = []
    params = types.SamplingParams(max_tokens=8, stop=[])

    def sample() -> None:
        samplers[0].sample([1, 2, 3], sampling_params=params).result()

    for count in MODELS:
        while len(samplers) < count:
            samplers.append(client.save_weights_and_get_sampling_client_sync())
        curve.append((count, _quickest(sample)))
    client.close()
    return {"a sample of 8 tokens (ms)": curve}


@contextmanager
def _database(home: Path) -> Iterator[Any]:
    from tinkex.server.database import Database

    database = Database(home / "tinkex.sqlite")
    try:
        yield database
    finally:
        database.close()


def _owner(database: Any) -> str:
    [[owner]] = database.select("SELECT DISTINCT owner FROM sessions")
    return str(owner)


def _add_rows(database: Any, table: str, rows: Sequence[Any]) -> None:
    """In one transaction."""
    from tinkex.server.database import _values

    with database.transaction() as connection:
        for row in rows:
            values = _values(row)
            names, marks = ", ".join(values), ", ".join("?" * len(values))
            connection.execute(
                f"INSERT INTO {table} ({names}) VALUES ({marks})", list(values.values())
            )


def _sessions(service: Any, home: Path) -> dict[str, Curve]:
    from tinkex.server.database import SessionRow

    rest = service.create_rest_client()
    client = service.create_lora_training_client("tiny", rank=4)
    lists, operations, there = [], [], 0
    with _database(home) as database:
        owner = _owner(database)
        for count in SESSIONS:
            rows = [
                SessionRow(f"old-{i}", owner, "gone", 1.0 * i, status="ended")
                for i in range(there, count)
            ]
            _add_rows(database, "sessions", rows)
            there = count
            lists.append((count, _quickest(lambda: rest.list_sessions(limit=20))))
            operations.append((count, _quickest(lambda: rest.get_training_run(client.model_id))))
    client.close()
    return {"listing the newest 20 (ms)": lists, "asking for a run (ms)": operations}


def _metrics(service: Any) -> dict[str, Curve]:
    rest = service.create_rest_client()
    client = service.create_lora_training_client("tiny", rank=4)
    run_id = client.model_id
    add, read, there = [], [], 0
    for count in METRICS:
        while there < count:
            some = min(1000, count - there)
            points = [{"step": float(there + i), "loss": 1.0} for i in range(some)]
            rest.report_run_metrics(run_id, points)
            there += some
        add.append((count, _quickest(lambda: rest.report_run_metrics(run_id, [{"loss": 1.0}]))))
        read.append((count, _quickest(lambda: rest.get_run_metrics(run_id))))
    client.close()
    return {"adding a point (ms)": add, "reading them (ms)": read}


def _checkpoints(service: Any, home: Path) -> tuple[dict[str, Curve], float]:
    """Listing the newest 20 and all through the SDK; and the time of the command, in seconds."""
    from tinkex.server.database import CheckpointRow

    rest = service.create_rest_client()
    client = service.create_lora_training_client("tiny", rank=4)
    client.save_state("first").result()
    newest, every = [], []
    with _database(home) as database:
        [first] = database.all(CheckpointRow, "SELECT * FROM checkpoints")
        there = 1
        for count in CHECKPOINTS:
            rows = [_twin(first, i) for i in range(there, count)]
            _add_rows(database, "checkpoints", rows)
            there = count
            newest.append((count, _quickest(lambda: rest.list_user_checkpoints(limit=20))))
            every.append((count, _quickest(lambda: list(rest.iter_user_checkpoints()), 2)))
    settings = service._session.config
    seconds = min(_list_command(settings.base_url, settings.api_key) for _ in range(3))
    client.close()
    return {"the newest 20 (ms)": newest, "all of them (ms)": every}, seconds


def _twin(first: Any, i: int) -> Any:
    """Another row for the same checkpoint, with links to the first one's files."""
    import attrs

    name = f"weights/old-{i}"
    directory = Path(first.directory).with_name(f"old-{i}")
    directory.mkdir()
    for file in Path(first.directory).iterdir():
        os.link(file, directory / file.name)
    path = f"tinker://{first.run_id}/{name}"
    return attrs.evolve(
        first, path=path, checkpoint_id=name, directory=str(directory), created_at=1.0 * i
    )


def _list_command(url: str, key: str) -> float:
    """Seconds of `tinkex checkpoint list`, from the start of the process to its end."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tinkex", "checkpoint", "list", "--base-url", url],
        env={**os.environ, "TINKER_API_KEY": key},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - started


# -- the engine ----------------------------------------------------------------------------------


def _of_the_engine() -> Panels:
    """Each kind in one process, whose peak memory is reset before each measurement."""
    texts, vocabulary = _in_a_process("context"), _in_a_process("vocabulary")
    return {
        "length of a text": {
            "a training step (ms a token)": texts["step"],
            "of which attention (ms a token)": texts["attention"],
            "reading a prompt (ms a token)": texts["prompt"],
        },
        "length of a prompt": {"a token after it (ms)": texts["token"]},
        "length of one text": {
            "memory of a training step (MiB)": texts["step memory"],
            "memory of a sample (MiB)": texts["sample memory"],
        },
        "words of the vocabulary": {
            "a step of 1,024 tokens (ms)": vocabulary["step"],
            "the bare products with the head (ms)": vocabulary["products"],
            "a sampled token (ms)": vocabulary["token"],
        },
        "size of the vocabulary": {"memory of the step (MiB)": vocabulary["step memory"]},
    }


def _in_a_process(kind: str) -> dict[str, Curve]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.growth_case", kind],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Curve] = json.loads(done.stdout.splitlines()[-1])
    return found
