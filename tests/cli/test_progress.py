"""
Progress in a terminal and outside of one; Ctrl-C in a program that is really interrupted.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from tests.support.terminals import read_all
from tinkex.cli import progress

ROOT = Path(__file__).parents[2]

ROW = {"step": 1, "train_loss": 2.5, "tokens_per_second": 1234.5, "learning_rate": 1e-4}


@pytest.fixture
def clock():
    """A clock that stands still until it is moved."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_outside_of_a_terminal_a_line_comes_every_few_seconds(clock, capsys):
    """Not thousands of lines in the log of a job."""
    bar = progress.Progress(clock)

    bar.begin(0, 100)
    for step in range(1, 13):
        clock.now += 1
        bar.row({**ROW, "step": step})
    bar.end()

    assert [
        "step 5/100, loss 2.5000, 1,234 tokens/s, 01:35 left",
        "step 10/100, loss 2.5000, 1,234 tokens/s, 01:30 left",
    ] == capsys.readouterr().err.splitlines()


def test_rendering_shows_how_far_it_is(clock, capsys):
    """Ten thousand conversations take a while, before the first step."""
    bar = progress.Progress(clock)

    for done in range(256, 3000, 256):
        clock.now += 1
        bar.rendered(done, 2816)

    assert ["rendered 1280/2816 examples", "rendered 2560/2816 examples"] == (
        capsys.readouterr().err.splitlines()
    )


def test_rendering_is_a_bar_in_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = progress.Progress(clock)

    bar.rendered(256, 512)
    bar.rendered(512, 512)

    assert "rendering: 100%" in capsys.readouterr().err


def test_quiet_rendering_shows_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = progress.Progress(clock, quiet=True)

    bar.rendered(512, 512)

    assert "" == capsys.readouterr().err


def test_evaluations_and_the_end_always_have_a_line(clock, capsys):
    bar = progress.Progress(clock)

    bar.begin(0, 2)
    bar.row({"step": 0, "eval_loss": 6.25})
    bar.row({**ROW, "step": 1})
    bar.row({**ROW, "step": 2, "eval_loss": 1.5})
    bar.end()

    assert [
        "step 0/2, held-out loss 6.2500",
        "step 2/2, loss 2.5000, 1,234 tokens/s, held-out loss 1.5000",
    ] == capsys.readouterr().err.splitlines()


def test_in_a_terminal_there_is_a_bar_with_loss_speed_and_time_left():
    program = """
        from tinkex.cli import progress
        bar = progress.Progress()
        bar.begin(3, 10)
        for step in range(4, 11):
            bar.row({"step": step, "train_loss": 2.5, "tokens_per_second": 1234.5})
        bar.end()
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], stderr=theirs, stdout=theirs
    )
    os.close(theirs)
    shown = read_all(ours)

    assert 0 == done.returncode
    assert "10/10" in shown
    assert "loss 2.5000, 1,234 tokens/s" in shown


# Ctrl-C

PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
import tinkex
from tests.support.fake_service import FakeService
from tinkex import cli

operations = 0

def pace(name):
    global operations
    operations += 1
    if operations == {slow_from}:
        print("slow from here", flush=True)
    if operations >= {slow_from}:
        time.sleep({seconds})

tinkex.ServiceClient = lambda **_: FakeService(pace)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def interrupted(tmp_path):
    """Run `tinkex train`, press Ctrl-C (so many times) while it runs; status, seconds, stderr."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "abababab"}\n' * 200)
    output = str(tmp_path / "run")
    train = ["train", str(data), "--base-model", "fake", "--output", output, "--batch-size", "1"]

    def interrupted(presses=1, number=signal.SIGINT, **pace):
        code = PROGRAM.format(root=str(ROOT), **pace)
        process = subprocess.Popen(
            [sys.executable, "-c", code, *train],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "slow from here\n" == process.stdout.readline()
        begun = time.monotonic()
        for _ in range(presses):
            process.send_signal(number)
            time.sleep(0.2)  # two signals at once are one
        _, err = process.communicate(timeout=20)
        return process.returncode, time.monotonic() - begun, err

    return interrupted


@pytest.mark.parametrize("number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_saves_a_checkpoint_and_prints_the_command(interrupted, tmp_path, number, expected):
    """So does SIGTERM, which job schedulers send at the end of a job's time."""
    status, seconds, err = interrupted(number=number, slow_from=20, seconds=0.05)

    assert expected == status
    assert seconds < 5
    assert f"Continue with:\n  tinkex train --resume --output {tmp_path / 'run'}\n" in err
    assert "Traceback" not in err
    assert '"checkpoint": "tinker://run1/weights/step-' in (tmp_path / "run/state.json").read_text()


def test_ctrl_c_ends_within_five_seconds_whatever_hangs(interrupted):
    status, seconds, _ = interrupted(slow_from=20, seconds=30)

    assert 130 == status
    assert seconds < 5


def test_a_second_ctrl_c_exits_at_once(interrupted):
    status, seconds, _ = interrupted(presses=2, slow_from=20, seconds=30)

    assert 130 == status
    assert seconds < 1.5


def test_ctrl_c_raises_keyboard_interrupt_elsewhere():
    with pytest.raises(KeyboardInterrupt), progress.CtrlC():
        signal.raise_signal(signal.SIGINT)


def test_deferred_ctrl_c_is_recorded():
    with progress.CtrlC() as ctrl_c, ctrl_c.deferred() as is_pressed:
        before = is_pressed()
        signal.raise_signal(signal.SIGINT)
        after = is_pressed()

    assert (False, True) == (before, after)


def test_the_previous_signal_handlers_are_restored():
    numbers = (signal.SIGINT, signal.SIGTERM)
    was = [signal.getsignal(number) for number in numbers]

    with progress.CtrlC():
        pass

    assert was == [signal.getsignal(number) for number in numbers]
