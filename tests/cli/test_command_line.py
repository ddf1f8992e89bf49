"""
The real program on a real server with real checkpoints: what a user types, and what is printed.

One server with a base model of two layers serves all tests. What the program does as a process is
tested in one; other commands are called here, which saves its start. Their details are tested in
test_checkpoint.py, test_run.py, test_session.py and tests/test_diagnostics.py.
"""

from __future__ import annotations

import io
import json
import os
import pty
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tinkex
from tests.support import hf_reference as hf
from tests.support.terminals import read_all
from tinkex import cli, types

ROOT = Path(__file__).parents[2]
TOKENS = np.arange(40) * 7 % hf.VOCAB


def environment(**more):
    """Our environment without the variables that name a server."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TINKER_", "TINKEX_"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return hf.make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def url(home, base):
    """A running `tinkex serve`."""
    command = [sys.executable, "-m", "tinkex", "serve", "--base-model", str(base)]
    process = subprocess.Popen(
        command,
        env=environment(TINKEX_HOME=str(home)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        yield process.stdout.readline().strip()
        process.terminate()


@pytest.fixture(scope="module")
def run_id(url, base):
    """A training run with checkpoints step-0 to step-2, and weights to sample from."""
    datum = types.Datum(
        types.ModelInput.from_ints(TOKENS[:-1].tolist()), {"target_tokens": TOKENS[1:]}
    )
    adam = types.AdamParams(learning_rate=1e-2)
    with (
        tinkex.ServiceClient(url, user_metadata={"of": "test"}) as service,
        service.create_lora_training_client(str(base), rank=4, seed=1) as training,
    ):
        for step in range(3):
            training.forward_backward([datum], "cross_entropy")
            training.optim_step(adam)
            training.save_state(f"step-{step}")
        path = training.save_weights_for_sampler("final").result().path
    return types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id


@pytest.fixture
def tinkex_process(url, run_id, tmp_path):
    """Runs `tinkex ...` against the server: what subprocess.run says."""

    def program(*arguments, **more):
        return subprocess.run(
            [sys.executable, "-m", "tinkex", *arguments],
            env=environment(**{"TINKER_BASE_URL": url, **more}),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return program


@pytest.fixture
def tinkex_program(url, run_id, tmp_path, monkeypatch, capsys):
    """The same, in this process."""
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("TINKER_BASE_URL", url)
    monkeypatch.chdir(tmp_path)

    def program(*arguments, answer=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        status = cli.main([*arguments])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return program


def good(done):
    """stdout of a run that succeeded with nothing on stderr."""
    assert (0, "") == (done.returncode, done.stderr), done
    return done.stdout


def test_run_list_and_info(tinkex_process, run_id, base):
    table = good(tinkex_process("run", "list"))
    [run] = json.loads(good(tinkex_process("run", "list", "--format", "json")))["runs"]
    info = good(tinkex_process("run", "info", run_id))

    assert [run_id, str(base), "rank", "4"] == table.splitlines()[1].split()[:4]
    assert (run_id, 4) == (run["training_run_id"], run["lora_rank"])
    assert f"tinker://{run_id}/weights/step-2" in info


def test_session_list_and_info(tinkex_program, run_id):
    [session] = json.loads(good(tinkex_program("session", "list", "-f", "json")))["sessions"]
    info = good(tinkex_program("session", "info", session["session_id"]))

    assert [run_id] == session["training_run_ids"]
    assert {"of": "test"} == session["user_metadata"]
    assert f"Run       {run_id}\n" in info


def test_checkpoint_list_and_info(tinkex_program, run_id):
    listed = json.loads(good(tinkex_program("checkpoint", "list", "step-*", "-f", "json")))
    paths = [checkpoint["tinker_path"] for checkpoint in listed["checkpoints"]]
    info = good(tinkex_program("checkpoint", "info", paths[0]))

    assert [f"tinker://{run_id}/weights/step-{i}" for i in (2, 1, 0)] == paths
    assert "LoRA           rank 4\n" in info


def test_publish_unpublish_and_set_ttl(tinkex_program, run_id):
    path = f"tinker://{run_id}/weights/step-1"

    def entry():
        return json.loads(good(tinkex_program("checkpoint", "info", path, "-f", "json")))

    assert f"Published {path}\n" == good(tinkex_program("checkpoint", "publish", path))
    good(tinkex_program("checkpoint", "set-ttl", path, "--ttl", "1d"))
    after = entry()
    good(tinkex_program("checkpoint", "unpublish", path))
    good(tinkex_program("checkpoint", "set-ttl", path, "--remove"))

    assert (True, True) == (after["public"], after["expires_at"] is not None)
    assert (False, None) == (entry()["public"], entry()["expires_at"])


def test_delete_asks_and_deletes(tinkex_program, run_id):
    """By a pattern, after a question; "no" changes nothing."""
    path = f"tinker://{run_id}/weights/step-0"
    refused = tinkex_program("checkpoint", "delete", "weights/step-0", answer="n\n")
    done = tinkex_program("checkpoint", "delete", "weights/step-0", answer="y\n")
    again = tinkex_program("checkpoint", "delete", path, "--yes")

    assert (1, "") == (refused.returncode, refused.stdout)
    assert (0, f"Deleted {path}\n") == (done.returncode, done.stdout)
    assert "Delete 1 checkpoint (" in done.stderr
    assert 1 == again.returncode
    assert f"error: {path}: there is no checkpoint" in again.stderr


def test_download(tinkex_program, run_id, tmp_path):
    """Into a folder with the name of the checkpoint, in the current directory."""
    out = good(tinkex_program("checkpoint", "download", f"tinker://{run_id}/weights/step-2"))
    folder = tmp_path / out.strip()
    again = tinkex_program("checkpoint", "download", f"tinker://{run_id}/weights/step-2")

    assert (folder / "optimizer.safetensors").exists()
    assert 1 == again.returncode
    assert "already exists" in again.stderr


def test_export_is_what_peft_and_transformers_load(tinkex_program, run_id, base, tmp_path):
    """Without changes; the adapter names its base model."""
    path = f"tinker://{run_id}/sampler_weights/final"
    good(tinkex_program("checkpoint", "export", path, "adapter"))
    good(tinkex_program("checkpoint", "export", path, "whole", "--merge"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    adapted = hf.load_adapter(config["base_model_name_or_path"], tmp_path / "adapter")
    whole, plain = hf.load_base(tmp_path / "whole"), hf.load_base(base)
    ids = torch.tensor(TOKENS)[None]
    with torch.no_grad():
        of_adapter, of_whole, of_base = (model(ids).logits for model in (adapted, whole, plain))

    torch.testing.assert_close(of_adapter, of_whole, atol=2e-5, rtol=1e-5)
    assert (of_adapter - of_base).abs().max() > 0.1
    assert [97] == transformers.AutoTokenizer.from_pretrained(tmp_path / "whole").encode("a")


def test_doctor_on_a_sound_server(tinkex_program, url, base):
    out = good(tinkex_program("doctor"))

    assert f"{base}" in out
    assert "failed" not in out


def test_doctor_on_a_closed_port(tinkex_program):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    done = tinkex_program("doctor", f"http://127.0.0.1:{port}")

    assert (1, "") == (done.returncode, done.stderr)
    assert "connection refused" in done.stdout


def test_without_a_server_commands_work_on_the_embedded_home(tinkex_process, home, run_id):
    """`tinkex checkpoint list` works after `tinkex train`; the notice goes to stderr."""
    arguments = ("checkpoint", "list", "final", "-f", "json")
    done = tinkex_process(*arguments, TINKER_BASE_URL="", TINKEX_HOME=str(home))
    [checkpoint] = json.loads(done.stdout)["checkpoints"]

    assert f"tinker://{run_id}/sampler_weights/final" == checkpoint["tinker_path"]
    assert done.stderr.startswith("tinkex: embedded engine at http://127.0.0.1:")


def test_an_unreachable_server_is_an_error_within_seconds(tinkex_process):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    done = tinkex_process("run", "list", "--base-url", f"http://127.0.0.1:{port}")

    assert (1, "") == (done.returncode, done.stdout)
    assert done.stderr.endswith("connection refused; is the server running, on this port?\n")


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["checkpoint", "info", "tinker://none/weights/none"], 1),
        (["run", "info", "none"], 1),
        (["checkpoint", "list", "--older-than", "soon"], 2),
    ],
)
def test_errors_have_their_status_and_print_nothing_to_stdout(tinkex_process, arguments, status):
    done = tinkex_process(*arguments)

    assert (status, "") == (done.returncode, done.stdout)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("path, status", [("step-*", 0), ("none", 1)])
def test_a_closed_pipe_does_not_change_the_status(url, run_id, path, status):
    """`tinkex checkpoint set-ttl ... | head -1`: the status is that of the command."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tinkex", "checkpoint", "set-ttl", path, "--remove", "--yes"],
        env=environment(TINKER_BASE_URL=url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    program.stdout.close()  # before anything is written
    with program.stderr:
        said = program.stderr.read()

    assert status == program.wait()
    assert ("" if status == 0 else "No checkpoint matches.\n") == said


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_terminals_that_want_them(url, run_id, no_color):
    """https://no-color.org"""
    ours, theirs = pty.openpty()
    shown = []
    reader = threading.Thread(target=lambda: shown.append(read_all(ours)))
    reader.start()
    subprocess.run(
        [sys.executable, "-m", "tinkex", "run", "list"],
        env=environment(TINKER_BASE_URL=url, NO_COLOR=no_color, TERM="xterm"),
        stdout=theirs,
        check=True,
    )
    os.close(theirs)
    reader.join()

    assert (no_color == "") == ("\x1b[" in shown[0])
