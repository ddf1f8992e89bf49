"""
Trains on the fake service with one real tracker, offline, and prints its content as JSON.

Runs in an environment that has the tracker's package, without the rest of the test requirements:
python -m tests.support.track_a_run NAME FOLDER
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import tinkex
from tests.support.fake_service import FakeService
from tinkex import errors
from tinkex.text import tokenizer

ROWS = [{"prompt": f"{i}", "completion": "abab" * (i + 1)} for i in range(25)]


def train(name: str, folder: Path) -> tinkex.Run:
    """A run of 10 steps in two parts: stopped at the 6th, and resumed."""

    def no_tokenizer(identifier):
        raise errors.TokenizerError("only known to the fake server")

    class StopOnce(tinkex.Callback):
        def on_step(self, run, row):
            if row["step"] == 6:
                raise KeyboardInterrupt

    tokenizer.load = no_tokenizer
    service = FakeService()
    settings = {
        "learning_rate": 0.5,
        "batch_size": 4,
        "epochs": 2,
        "eval_fraction": 0.2,
        "prompts": ["one"],
        "generate_every": 5,
        "report_to": name,
        "service": service,
        "progress": False,
        "save_every": 2,
    }
    try:
        tinkex.finetune(ROWS, "fake", folder / "run", callbacks=[StopOnce()], **settings)
    except KeyboardInterrupt:
        pass
    return tinkex.finetune(ROWS, "fake", folder / "run", resume=True, **settings)


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log: blocks with pieces of records."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block is too small for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def arrived_wandb(run: tinkex.Run) -> dict:
    """From the files that `wandb sync` would upload."""
    from wandb.proto import wandb_internal_pb2

    found = {"config": {}, "steps": {}, "artifacts": [], "runs": set()}
    for path in sorted(run.folder.glob("wandb/offline-run-*/run-*.wandb")):
        for content in records(path):
            record = wandb_internal_pb2.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found["runs"].add(record.run.run_id)
                for item in record.run.config.update:
                    found["config"][item.key] = json.loads(item.value_json)
            elif kind == "history":
                values = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                step = str(values.get("_step", record.history.step.num))
                found["steps"].setdefault(step, {}).update(values)
            elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
                artifact = record.request.log_artifact.artifact
                files = [entry.path for entry in artifact.manifest.contents]
                found["artifacts"].append([artifact.type, files])
            elif kind == "artifact":
                files = [entry.path for entry in record.artifact.manifest.contents]
                found["artifacts"].append([record.artifact.type, files])
    return {**found, "runs": sorted(found["runs"])}


def arrived_mlflow(run: tinkex.Run) -> dict:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tinkex")
    [tracked] = client.search_runs([experiment.experiment_id])
    number = tracked.info.run_id
    return {
        "config": tracked.data.params,
        "steps": {
            key: [(m.step, m.value) for m in client.get_metric_history(number, key)]
            for key in tracked.data.metrics
        },
        "artifacts": [a.path for a in client.list_artifacts(number, "adapter")],
        "samples": [a.path for a in client.list_artifacts(number, "samples")],
        "status": tracked.info.status,
    }


def arrived_trackio(run: tinkex.Run) -> dict:
    """From trackio's database, as its page reads it."""
    [path] = Path(os.environ["TRACKIO_DIR"]).glob("*.db")
    with sqlite3.connect(path) as database:
        steps: dict[str, dict] = {}
        for step, values in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
            steps.setdefault(str(step), {}).update(json.loads(values))
        [config] = database.execute("SELECT config FROM configs")
        runs = [name for (name,) in database.execute("SELECT DISTINCT run_name FROM metrics")]
        artifacts = database.execute("SELECT name, type FROM artifacts").fetchall()
    return {
        "runs": runs,
        "config": json.loads(config[0]),
        "steps": steps,
        "artifacts": artifacts,
    }


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    os.chdir(folder)
    trained = train(name, folder)
    print("ARRIVED " + json.dumps(globals()[f"arrived_{name}"](trained), default=str))
