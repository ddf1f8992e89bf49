"""The embedded engine: a child process that is what it says it is, and never outlives us."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest

import tinkex
from tinkex import config, errors
from tinkex.runtime import embedded
from tinkex.runtime.embedded import EmbeddedEngine

ROOT = Path(__file__).parents[2]

#: `python -m tinkex serve`, in as far as its parent can see it.
SERVE = """
import json, os, signal, sys, time

options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
how = os.environ.get("FAKE_ENGINE", "good")
print("starting", sys.argv[1:], flush=True)
if how == "crash":
    print("Traceback: no space left on device", flush=True)
    sys.exit(3)
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
told = {"pid": os.getpid(), "url": "http://127.0.0.1:45678"}
if how == "impostor":
    told["pid"] += 1
text = json.dumps(told)
path = options["--announce"]
if how == "in two writes":
    with open(path, "w") as file:
        file.write(text[:10])
    time.sleep(0.05)
if how != "silent":
    with open(path, "w") as file:
        file.write(text)
with open(path + ".seen", "w") as file:
    json.dump({"argv": sys.argv, "token": os.environ.get("TINKEX_ENGINE_TOKEN")}, file)
while os.getppid() == int(options["--parent-pid"]):
    time.sleep(0.01)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A place where `python -m tinkex` is the fake, and the home of its engine."""
    package = tmp_path / "place" / "tinkex"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")  # or the installed package would win
    (package / "__main__.py").write_text(SERVE)
    monkeypatch.chdir(package.parent)
    for name in [name for name in os.environ if name.startswith("TINKER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path / "home"


@pytest.fixture
def engine(home, capsys):
    made = EmbeddedEngine.start()
    yield made
    made.close()


def gone(pid):
    try:
        psutil.Process(pid).wait(10)
    except psutil.NoSuchProcess:
        return True
    return not psutil.pid_exists(pid)


# Starting.


def test_it_says_in_one_line_where_it_is(engine, home, capsys):
    """Else users do not know that a gigabyte of engine runs, nor where its models are kept."""
    said = capsys.readouterr()

    assert "" == said.out
    assert f"tinkex: embedded engine at http://127.0.0.1:45678 (home {home})\n" == said.err


def test_it_is_started_on_loopback_for_this_process_with_a_secret_of_its_own(home, monkeypatch):
    """What answers there must be what we started; no other user of the machine may use it."""
    monkeypatch.setenv("TINKER_API_KEY", "")
    seen = {}
    spawn = embedded._spawn

    def spying(home, announce, log_path, token):
        seen.update(token=token, announce=announce)
        return spawn(home, announce, log_path, token)

    monkeypatch.setattr(embedded, "_spawn", spying)
    started = EmbeddedEngine.start()
    command = psutil.Process(started._process.pid).cmdline()
    started.close()

    assert ["serve", "--host", "127.0.0.1", "--port", "0"] == command[3:8]
    assert str(os.getpid()) == command[command.index("--parent-pid") + 1]
    assert started.api_key == seen["token"]
    assert len(started.api_key) >= 40
    assert started.api_key not in " ".join(command)


def test_its_key_is_in_a_file_for_this_user_while_it_runs(engine):
    path = config.engine_key_file(engine.base_url)

    assert engine.api_key == path.read_text()
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    engine.close()
    assert not path.exists()


def test_key_files_of_engines_that_were_killed_are_removed(home):
    """And those of running ones stay: other processes read them."""
    folder = home / "engines"
    folder.mkdir(mode=0o700, parents=True)
    with socket.create_server(("127.0.0.1", 0)) as running:
        with socket.create_server(("127.0.0.1", 0)) as killed:
            dead, port = killed.getsockname()[1], running.getsockname()[1]
        (folder / f"127.0.0.1-{dead}.key").write_text("tml-dead")
        (folder / f"127.0.0.1-{port}.key").write_text("tml-running")
        (folder / "not-an-address.key").write_text("")
        started = EmbeddedEngine.start()
        started.close()

        assert {f"127.0.0.1-{port}.key", "not-an-address.key"} == {p.name for p in folder.iterdir()}


def test_its_output_goes_to_a_log_for_this_user(engine, home):
    [log] = (home / "logs").iterdir()

    assert engine.log_path == log
    assert "starting" in log.read_text()
    assert 0o600 == stat.S_IMODE(log.stat().st_mode)


def test_of_old_logs_twenty_are_kept(home):
    logs = home / "logs"
    logs.mkdir(parents=True)
    for i in range(30):
        (logs / f"embedded-{i:02}.log").write_text("old")
        os.utime(logs / f"embedded-{i:02}.log", (i, i))
    EmbeddedEngine.start().close()
    kept = sorted(path.name for path in logs.iterdir())

    assert 21 == len(kept)
    assert "embedded-10.log" == kept[0]


@pytest.mark.parametrize("how", ["in two writes"])
def test_half_an_announcement_is_none_yet(home, monkeypatch, how):
    monkeypatch.setenv("FAKE_ENGINE", how)
    started = EmbeddedEngine.start()
    started.close()

    assert "http://127.0.0.1:45678" == started.base_url


def test_one_that_ends_at_once_is_told_with_the_end_of_its_log(home, monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE", "crash")

    with pytest.raises(
        errors.EngineError, match="ended with status 3 before it was ready"
    ) as caught:
        EmbeddedEngine.start()
    assert "no space left on device" in str(caught.value)
    assert str(home / "logs") in str(caught.value)


@pytest.mark.parametrize("how", ["silent", "impostor"])
def test_one_that_does_not_announce_itself_is_ended(home, monkeypatch, how):
    """Another process's announcement is not ours."""
    monkeypatch.setattr(embedded, "START_TIMEOUT", 0.3)
    monkeypatch.setenv("FAKE_ENGINE", how)
    started = []
    spawn = embedded._spawn
    monkeypatch.setattr(embedded, "_spawn", lambda *a: started.append(spawn(*a)) or started[0])

    with pytest.raises(errors.EngineError, match="was not ready after 0 s"):
        EmbeddedEngine.start()
    assert started[0].poll() is not None


def test_a_home_that_cannot_be_written_is_told_with_the_way_out(home, monkeypatch):
    home.write_text("a file")

    with pytest.raises(errors.EngineError, match="set TINKEX_HOME to a folder of yours"):
        EmbeddedEngine.start()


def test_a_key_file_that_cannot_be_written_leaves_no_process(home, monkeypatch):
    (home / "engines").parent.mkdir(parents=True)
    (home / "engines").write_text("a file")
    started = []
    spawn = embedded._spawn
    monkeypatch.setattr(embedded, "_spawn", lambda *a: started.append(spawn(*a)) or started[0])

    with pytest.raises(errors.EngineError, match="engines cannot be written"):
        EmbeddedEngine.start()
    assert started[0].poll() is not None


def test_what_is_not_installed_is_told_with_the_ways_out(monkeypatch):
    find = embedded.importlib.util.find_spec
    monkeypatch.setattr(
        embedded.importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("torch", "uvicorn") else find(name, *a),
    )

    with pytest.raises(
        errors.MissingExtraError, match=r"torch, uvicorn\. Install it with: pip inst"
    ):
        EmbeddedEngine.start()


# Ending.


def test_closing_ends_it_and_is_idempotent(engine):
    assert engine.is_running
    engine.close()
    engine.close()

    assert not engine.is_running


def test_one_that_does_not_listen_is_ended_by_force(home, monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE", "stubborn")
    started = EmbeddedEngine.start()
    started.close(timeout=0.05)

    assert not started.is_running


def test_of_one_that_died_is_said_how_and_what_to_do(engine):
    assert engine.obituary() is None
    os.kill(engine._process.pid, signal.SIGKILL)
    engine._process.wait(10)
    said = engine.obituary()

    assert "the embedded engine has died (status -9). What was saved is safe" in said
    assert str(engine.log_path) in said


PROGRAM = """
import os, sys, time
sys.path.insert(0, {root!r})
from tinkex.runtime import embedded
engine = embedded.acquire()
print(engine._process.pid, flush=True)
"""


def run(home, code):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT)) + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize(
    "end",
    ["", "sys.exit(3)", "raise ValueError", "os._exit(0)", "os.kill(os.getpid(), 9)"],
    ids=["end", "exit", "exception", "_exit", "kill -9"],
)
def test_it_never_outlives_its_parent(home, end):
    """Whatever ends us, even if it leaves no time to end the child."""
    with run(home, end) as parent:
        pid = int(parent.stdout.readline())
        parent.wait(10)

    assert gone(pid)


def test_ctrl_c_in_the_terminal_is_for_the_parent_alone(engine):
    """The engine is in a session of its own; its parent ends it in good order."""
    assert os.getpgid(engine._process.pid) != os.getpgid(0)


# Sharing.


@pytest.fixture
def shared(home, monkeypatch):
    monkeypatch.setattr(embedded, "_shared", None)
    monkeypatch.setattr(embedded, "_users", 0)


def test_a_process_has_one_engine_for_all_its_users(shared):
    first, second = embedded.acquire(), embedded.acquire()
    assert first is second
    embedded.release(first)
    assert first.is_running
    embedded.release(second)

    assert not first.is_running


def test_after_the_last_user_the_next_one_gets_another(shared):
    first = embedded.acquire()
    embedded.release(first)
    second = embedded.acquire()

    assert first is not second and second.is_running
    embedded.release(second)


def test_one_that_died_is_replaced_and_its_users_end_nothing(shared):
    first = embedded.acquire()
    first._process.kill()
    first._process.wait(10)
    second = embedded.acquire()
    embedded.release(first)

    assert second.is_running
    embedded.release(second)
    assert not second.is_running


def test_many_threads_start_one(shared):
    got, meeting = [], threading.Barrier(6)

    def want():
        meeting.wait(10)
        got.append(embedded.acquire())

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert 1 == len(set(map(id, got)))
    for engine in got:
        embedded.release(engine)
    assert not got[0].is_running


def test_a_forked_child_neither_uses_nor_ends_its_parent_s_engine(home):
    code = """
    pid = os.fork()
    if pid == 0:
        print(embedded._shared, flush=True)
        sys.exit(0)
    os.waitpid(pid, 0)
    print(engine.is_running, flush=True)
    """
    with run(home, code) as parent:
        engine = int(parent.stdout.readline())
        rest = parent.stdout.read()

    assert ["None", "True"] == rest.split()
    assert gone(engine)


# The real one.


def test_a_real_engine_that_is_killed_is_told_within_seconds(monkeypatch, tmp_path):
    """And the next ServiceClient starts another, on which what was saved is still there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("TINKER_")]:
        monkeypatch.delenv(name)
    with tinkex.ServiceClient() as service:
        client = service.create_lora_training_client("tiny", rank=2)
        path = client.save_state("before").result(60).path
        os.kill(service._session.engine._process.pid, signal.SIGKILL)
        service._session.engine._process.wait(10)

        with pytest.raises(errors.EngineError, match=r"has died \(status -9\)"):
            client.optim_step(tinkex.types.AdamParams()).result(20)
    with tinkex.ServiceClient() as service:
        again = service.create_training_client_from_state_with_optimizer(path)

        assert again.optim_step(tinkex.types.AdamParams()).result(60)
