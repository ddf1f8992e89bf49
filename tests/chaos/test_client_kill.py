"""The client can die: `tinkex train` killed with -9 at random moments and resumed ends in the
weights of a run that was never touched; and it leaves no server behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time

import psutil
import pytest

import tinkex
from tests.chaos.conftest import CLIENT_KILLS
from tests.chaos.servers import Server, wait_for
from tests.support.processes import ROOT

OPTIONS = ("--base-model", "tiny", "--rank", "4", "--batch-size", "2",
           "--learning-rate", "1e-2", "--seed", "3", "--save-every", "3", "--eval-every", "5",
           "--eval-fraction", "0.1")  # fmt: skip


class Training:
    """`tinkex train` in its own folder, on the server at *url*, or on the embedded engine."""

    def __init__(self, folder, url=None):
        self.output, self.home = folder / "run", folder / "home"
        self.data = folder / "data.jsonl"
        lines = [
            json.dumps({"prompt": f"{i} + {i} = ", "completion": f"{2 * i}."}) for i in range(44)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self.data.write_text("\n".join(lines))
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
        self._environment |= {"PYTHONPATH": str(ROOT), "TINKEX_HOME": str(self.home)}
        if url is not None:
            self._environment |= {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-any"}

    def start(self):
        begun = (self.output / "state.json").exists()
        what = ["--resume"] if begun else [str(self.data), *OPTIONS]
        with open(self.output.with_name("train.log"), "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tinkex", "train", "--output", str(self.output), *what],
                cwd=ROOT,
                env=self._environment,
                stdout=log,
                stderr=log,
            )

    def finish(self):
        """Continue to the end; returns the seconds it took."""
        began = time.monotonic()
        assert 0 == self.start().wait(120), self.log
        return time.monotonic() - began

    def killed_after(self, seconds):
        """Whether there was still something to kill."""
        process = self.start()
        try:
            process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return True

    @property
    def log(self):
        return self.output.with_name("train.log").read_text()

    @property
    def adapter(self):
        files = sorted((self.output / "adapter").iterdir())
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("served") / "home") as server:
        with tinkex.ServiceClient(server.url) as service:
            service.create_lora_training_client("tiny", rank=4)  # the engine is there from now on
        yield server


@pytest.mark.parametrize("engine", [pytest.param("embedded", marks=pytest.mark.slow), "served"])
def test_a_killed_training_goes_on_to_the_same_adapter(tmp_path, request, engine, report):
    """On the embedded engine each kill takes the server, too."""
    url = request.getfixturevalue("server").url if engine == "served" else None
    undisturbed = Training(tmp_path / "undisturbed", url)
    seconds = undisturbed.finish()
    chance = random.Random(engine)
    wanted = CLIENT_KILLS // 2
    kills = runs = 0
    adapters = []

    while kills < wanted:
        training = Training(tmp_path / f"killed-{runs}", url)
        runs += 1
        for _ in range(min(5, wanted - kills)):
            if not training.killed_after(chance.uniform(0.2, 0.9) * seconds):
                break
            kills += 1
        training.finish()
        adapters.append(training.adapter)
    report(
        "client kills",
        kills=kills,
        runs=runs,
        identical=all(adapter == undisturbed.adapter for adapter in adapters),
    )

    assert [undisturbed.adapter] * runs == adapters
    assert wait_for(lambda: [] == processes_of(tmp_path), 5)


def processes_of(folder):
    """Command lines of what still runs with *folder* in them."""
    lines = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    return [line for line in lines if str(folder) in line]
