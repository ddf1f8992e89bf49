"""
`tinkex train` for real: the program, the embedded engine, signals, and PEFT's files at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tinkex.cli import demo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tinkex(tmp_path_factory):
    """Starts the program in a folder of its own, with a home of its own and no server named."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "library").mkdir()
    for i in range(40):
        code = f'def f{i}(a, b={i}):\n    """Return a plus {i}."""\n'
        (folder / "library" / f"m{i}.py").write_text(code)
    demo.write(folder / "data.jsonl", folder / "library")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    environment |= {"TINKEX_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}

    def start(*arguments):
        command = [sys.executable, "-m", "tinkex", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

    start.folder = folder
    return start


def finish(process):
    """Status, stdout and stderr of a program, once it has ended."""
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


TRAIN = "train data.jsonl --base-model tiny --rank 4 --learning-rate 5e-3 --batch-size 4".split()
TRAIN += "--schedule linear --eval-fraction 0.1 --epochs 2 --save-every 4 --eval-every 6".split()


@pytest.fixture(scope="module")
def undisturbed(tinkex):
    """A run from beginning to end: its folder and what it printed."""
    status, out, err = finish(tinkex(*TRAIN, "--output", "undisturbed"))

    assert (0, "") == (status, err if status else "")
    return tinkex.folder / "undisturbed", out


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def wait_for_step(process, folder, step):
    """Until the run has noted *step*."""
    deadline = time.monotonic() + 240
    path = folder / "metrics.jsonl"
    while not path.exists() or f'"step": {step}' not in path.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_model_learns(undisturbed):
    folder, out = undisturbed
    evaluated = [row["eval_loss"] for row in rows(folder) if "eval_loss" in row]

    assert 4 == len(evaluated)
    assert evaluated[-1] < evaluated[0] / 2
    assert 3 == out.count("after   ")


def test_the_adapter_is_one_that_peft_reads(undisturbed):
    from peft import PeftConfig
    from safetensors.numpy import load_file

    folder, _ = undisturbed
    config = PeftConfig.from_pretrained(str(folder / "adapter"))
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")

    assert ("LORA", 4) == (config.peft_type.value, config.r)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in tensors)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        # In `make test`, tests/chaos/test_client_kill.py kills a run.
        pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_ends_in_the_same_bits(tinkex, undisturbed, how):
    """Same order, same optimizer: nothing shows that it was ever stopped."""
    folder = tinkex.folder / how.name
    process = tinkex(*TRAIN, "--output", how.name)
    wait_for_step(process, folder, 9)
    begun = time.monotonic()
    process.send_signal(how)
    status, _, err = finish(process)
    seconds = time.monotonic() - begun
    resumed, _, resumed_err = finish(tinkex("train", "--resume", "--output", how.name))

    if how is signal.SIGINT:
        assert (130, True) == (status, seconds < 5)
        assert f"tinkex train --resume --output {how.name}" in err
    assert (0, "") == (resumed, resumed_err if resumed else "")
    assert rows(undisturbed[0]) == rows(folder)
    name = "adapter/adapter_model.safetensors"
    assert (undisturbed[0] / name).read_bytes() == (folder / name).read_bytes()


def test_an_engine_that_dies_is_started_again_and_the_run_resumed(tinkex, undisturbed):
    """Killed or out of memory: no one has to restart it. The run ends in the same bits."""
    process = tinkex(*TRAIN, "--output", "died")
    wait_for_step(process, tinkex.folder / "died", 9)
    [engine] = [
        child for child in psutil.Process(process.pid).children() if "serve" in child.cmdline()
    ]
    engine.kill()
    status, _, err = finish(process)

    assert 0 == status, err
    assert "has died (status -9)" in err
    assert "Starting it again and resuming after step 8 (1 of 3)." in err
    assert rows(undisturbed[0]) == rows(tinkex.folder / "died")
    name = "adapter/adapter_model.safetensors"
    assert (undisturbed[0] / name).read_bytes() == (tinkex.folder / "died" / name).read_bytes()


def test_a_folder_is_one_process_s_at_a_time(tinkex):
    """Two that resume one run would both write its metrics, and report each other's checkpoints."""
    folder = tinkex.folder / "shared"
    # So long that it has not ended by itself when the second one has started.
    process = tinkex(*TRAIN, "--epochs", "99", "--output", "shared")
    wait_for_step(process, folder, 2)
    status, _, err = finish(tinkex("train", "--resume", "--output", "shared"))

    assert 1 == status
    assert f"is in use by process {process.pid} on " in err
    process.kill()  # which leaves the file behind, but not the lock
    finish(process)
    assert (folder / "lock").exists()
    status, _, err = finish(tinkex("train", "--resume", "--output", "shared", "--max-steps", "9"))
    assert "in use" not in err


def test_a_finished_run_can_be_asked(tinkex, undisturbed):
    command = ["sample", "undisturbed", "--prompt", "def f7(a, b=7):\n", "--temperature", "0"]

    status, out, _ = finish(tinkex(*command, "--json", "--max-tokens", "12"))

    assert 0 == status
    assert json.loads(out)["text"].startswith("Re")


def test_what_goes_wrong_is_said_in_a_line(tinkex):
    output = ["--output", "wrong"]

    for arguments, words in [
        (["--base-url", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["--base-model", "/no/such/model"], "/no/such/model"),
    ]:
        status, out, err = finish(tinkex(*TRAIN, *output, *arguments))

        assert (1, "") == (status, out)
        last = err.splitlines()[-1]
        assert last.startswith("error: ")
        assert words in last
        assert "Traceback" not in err
        output = ["--output", "wrong2"]
