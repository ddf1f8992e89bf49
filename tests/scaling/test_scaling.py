"""`make scaling`: what cannot be installed or started is a row with its reason, never a hang."""

from __future__ import annotations

import os
import sys
import time

import pytest

from tests.scaling import __main__ as program
from tests.scaling import servers
from tests.scaling.servers import SERVERS, Server, Unavailable, install, running
from tests.support import hf_reference


@pytest.fixture
def odd(monkeypatch):
    """Makes a server of a Python program."""

    def make(code):
        monkeypatch.setattr(servers, "command", lambda *_: [sys.executable, "-c", code])
        return Server("Odd", "1.0")

    return make


def test_a_server_for_which_there_is_no_python_is_not_run():
    with pytest.raises(Unavailable, match=r"needs Python 3\.99, and there is none here"):
        install(Server("Odd", "1.0", ("3.99",)))


def test_a_server_that_cannot_be_installed_has_pip_s_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(servers, "BUILD", tmp_path)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    missing = ("--no-index", "--isolated", "no-such-package-at-all==1.0")
    with pytest.raises(Unavailable, match="no-such-package-at-all"):
        install(Server("Odd", "1.0", (here,), (missing,)))

    assert not (tmp_path / "odd-1.0" / "made").exists()  # it is tried again the next time


def test_a_server_that_ends_at_its_start_has_the_end_of_its_output(odd, tmp_path):
    server = odd("import sys; print('no GPU here'); sys.exit(3)")
    found = program.look_at(server, tmp_path, tmp_path)
    text = program.table([found])

    assert "it ended with 3: no GPU here" == found.problem
    assert "| Odd 1.0 () | not run here: it ended with 3: no GPU here | - | - |" in text


def test_a_server_that_never_answers_is_ended_with_all_that_it_has_started(
    odd, tmp_path, monkeypatch
):
    """Also if it ignores SIGTERM, as TuFT does while it waits for a GPU."""
    monkeypatch.setattr(servers, "START_TIMEOUT", 3.0)
    monkeypatch.setattr(servers, "END_SECONDS", 0.5)
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); pid = os.fork();"
        "open(f'{\"child\" if pid == 0 else \"parent\"}', 'w').write(str(os.getpid()));"
        "time.sleep(600)"
    )
    with (
        pytest.raises(Unavailable, match="did not answer within 3 s"),
        running(odd(code), tmp_path, tmp_path, tmp_path),
    ):
        pass
    for name in ("child", "parent"):
        pid = int((tmp_path / name).read_text())
        deadline = time.monotonic() + 10
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_our_own_server_is_trained_on(tmp_path):
    model = hf_reference.make_base(tmp_path / "model", "qwen3")
    with running(SERVERS[0], install(SERVERS[0]), model, tmp_path) as url:
        said = program.train(
            url, model, program.TEXTS[:8], tmp_path / "run", "--batch-size", "4", "--max-steps", "2"
        )
        with pytest.raises(RuntimeError, match="learning-rate"):
            program.train(url, model, program.TEXTS[:8], tmp_path / "again", "--learning-rate", "x")

    assert said.startswith("loss ") and "in 2 steps" in said and "then:" not in said


def test_the_tables_take_the_place_of_the_last_ones(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{program.BEGIN}\nold\n{program.END}\nafter\n")
    program.write("new", page)

    assert f"before\n{program.BEGIN}\nnew\n{program.END}\nafter\n" == page.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="no place for the tables"):
        program.write("new", page)


def test_the_tables_have_a_row_for_each_server_and_each_check_that_one_fails():
    first = program.Found(SERVERS[1], "loss 2 -> 1", "loss 0.69")
    first.checks = {"a | b": ("fail", "why"), "c": ("pass", ""), "d": ("pass", "")}
    second = program.Found(SERVERS[2], "loss 3 -> 2", "loss 0.69")
    second.checks = {"a | b": ("pass", ""), "c": ("not offered", "404"), "d": ("pass", "")}
    lines = program.table([first, second]).splitlines()

    assert "2 pass, 1 fail, 0 not offered" in lines[2]
    assert "| a \\| b | fail | pass |" in lines
    assert "| c | pass | not offered |" in lines
    assert not any(line.startswith("| d ") for line in lines)
