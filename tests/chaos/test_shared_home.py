"""One home for many: a script, another one, `tinkex serve` and the command line, all at once."""

from __future__ import annotations

import os
import subprocess
import sys

import tinkex
from tests.chaos import scenario
from tests.chaos.servers import Server
from tests.support.processes import ROOT

STEPS = 6

SCRIPT = f"""
import sys, tinkex
from tests.chaos import scenario
from tinkex import types

with tinkex.ServiceClient() as service:
    training = service.create_lora_training_client("tiny", rank=4, seed=int(sys.argv[1]))
    for step in range({STEPS}):
        training.forward_backward(scenario.batch(step), "cross_entropy")
        training.optim_step(types.AdamParams())
        saved = training.save_state(f"step-{{step}}")
    print(saved.result(60).path)
"""


def started(*command, home):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    environment |= {"TINKEX_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def output(process):
    out, err = process.communicate(timeout=120)
    assert 0 == process.returncode, err
    return out


def test_scripts_a_server_and_the_command_line_share_a_home(tmp_path):
    """Each server has its own models, all see all checkpoints, and none is in another's way."""
    home = tmp_path / "home"
    with (
        Server(home) as server,
        tinkex.ServiceClient(server.url) as service,
        service.create_lora_training_client("tiny", rank=4, seed=3) as training,
    ):
        scripts = [started("-c", SCRIPT, str(seed), home=home) for seed in (1, 2)]
        for step in range(STEPS):
            training.forward_backward(scenario.batch(step), "cross_entropy")
            training.optim_step(tinkex.types.AdamParams())
            ours = training.save_state(f"step-{step}")
        listing = started("-m", "tinkex", "checkpoint", "list", home=home)
        theirs = [output(script).strip() for script in scripts]
        output(listing)
        paths = [*theirs, ours.result(60).path]
        seen = {c.tinker_path for c in service.create_rest_client().iter_user_checkpoints()}
        loaded = [service.create_training_client_from_state(path).model_id for path in paths]
        servers = [folder.name for folder in (home / "servers").iterdir()]

    assert 3 * STEPS == len(seen)
    assert set(paths) <= seen
    assert 3 == len(loaded)
    assert [f"port-{server.port}"] == servers
