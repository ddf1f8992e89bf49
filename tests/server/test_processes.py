"""The server as a process: start, announcement, shared homes, and end."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.processes import ROOT, ServerProcess, free_port
from tests.support.wire_client import WireClient
from tinkex.server.app import LocalServer, main
from tinkex.server.home import Home, HomeError


def wait_for(claim, seconds=10):
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.02)
    return claim()


@pytest.fixture
def process(tmp_path):
    running = []

    def make(home=None, port=None, **options):
        server = ServerProcess(home or tmp_path / "home", port, **options)
        running.append(server)
        return server

    yield make
    for server in running:
        server.close()


def test_it_says_where_it_listens_and_announces_it(process, tmp_path):
    """One line on stdout; the file is complete when the server accepts requests."""
    server = process(announce=str(tmp_path / "announce.json"))
    url = server.start()
    announced = json.loads((tmp_path / "announce.json").read_text())

    assert f"http://127.0.0.1:{server.port}" == url
    assert url == announced["url"]
    assert server.process.pid == announced["pid"]
    assert announced["version"]
    assert {"status": "ok"} == server.client.get("healthz")


def test_a_port_in_use_is_an_error_that_says_so(process):
    first = process()
    first.start()
    second = process(port=first.port)
    second.spawn()
    errors = second.end()

    assert 1 == second.process.returncode
    assert f"cannot listen on 127.0.0.1:{first.port}" in errors
    assert "--port" in errors
    assert "Traceback" not in errors


def test_a_home_that_cannot_be_written_is_an_error_that_says_so(process, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    server = process(home=tmp_path / "file")
    server.spawn()
    errors = server.end()

    assert 1 == server.process.returncode
    assert "cannot be written" in errors
    assert "--home" in errors
    assert "Traceback" not in errors


def test_a_broken_database_is_an_error_that_says_so(process, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "tinkex.sqlite").write_bytes(b"this is not a database" * 100)
    server = process(home=home)
    server.spawn()
    errors = server.end()

    assert 1 == server.process.returncode
    assert "tinkex.sqlite cannot be used" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("mode", [0o1777, 0o755, 0o777])
def test_a_folder_of_others_is_refused_and_its_mode_is_kept(process, tmp_path, mode):
    """A shared temporary folder with mode 0700 is unusable for everyone else."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    if mode == 0o755:
        (shared / "thesis.tex").write_text("mine")
    server = process(home=shared)
    server.spawn()
    errors = server.end()

    assert 1 == server.process.returncode
    assert str(shared) in errors
    assert "--home" in errors
    assert mode == stat.S_IMODE(shared.stat().st_mode)
    assert {"thesis.tex"} >= {path.name for path in shared.iterdir()}


def test_a_home_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)

    with pytest.raises(HomeError, match="belongs to user"):
        Home.open(tmp_path)


def test_a_home_made_by_an_earlier_version_is_opened(tmp_path):
    """It has no marker file, but a database."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("tinkex.sqlite", "notes.txt"):
        (home / name).touch()

    assert home == Home.open(home).path


def test_what_other_commands_leave_in_a_home_does_not_make_it_another_s(tmp_path):
    """`tinkex model pull` and `tinkex chat` may be the first to use it."""
    home = tmp_path / "home"
    for name in ("models", "engines", "logs"):
        (home / name).mkdir(parents=True)
    (home / "chat_history").touch()

    assert home == Home.open(home).path


def test_only_its_user_may_look_into_the_home(process, tmp_path):
    """0700 and 0600: it contains weights and training data."""
    server = process()
    server.start()
    model = server.client.model()
    server.client.result(server.client.save(model, 1, "x"))
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "home").rglob("*")}

    assert {0} == modes
    assert 0o700 == stat.S_IMODE((tmp_path / "home").stat().st_mode)


def test_an_embedded_server_wants_its_token_and_forgets_it_from_the_environment(process):
    """Other users of the machine can reach the port; they cannot read the environment."""
    server = process(environment={"TINKEX_ENGINE_TOKEN": "a-token"})
    server.start()
    mine = WireClient(f"http://127.0.0.1:{server.port}", "a-token")
    status, sentence = server.client.refused("create_session", {})

    assert mine.session()
    assert 401 == status
    assert "a-token" not in sentence
    assert b"a-token" not in b"".join(
        path.read_bytes() for path in server.home.rglob("*") if path.is_file()
    )


def test_on_another_address_a_key_is_made_up_and_shown_once(process):
    """Other machines can reach it, so a key is required."""
    server = process(host="0.0.0.0")
    server.start()
    line = server.process.stdout.readline()
    key = line.rsplit(" ", 1)[1].strip()
    refused = server.client.refused("create_session", {})

    assert line.startswith("API key (not shown again): tml-")
    assert 401 == refused[0]
    assert WireClient(f"http://127.0.0.1:{server.port}", key).session()


PARENT = """
import os, subprocess, sys, json
options = json.dumps({"parent_pid": os.getpid(), "announce": sys.argv[2]})
subprocess.Popen(
    [sys.executable, "-m", "tests.support.fake_engine", "0", sys.argv[1], options],
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
sys.stdin.read()
"""


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_it_ends_with_its_parent_even_if_that_is_killed(tmp_path):
    """Neither the server nor its files in the home are left behind."""
    announce = tmp_path / "announce.json"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "home"), str(announce)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
    )
    assert wait_for(announce.exists)
    pid = json.loads(announce.read_text())["pid"]
    started = time.monotonic()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdin.close()
    ended = wait_for(lambda: not alive(pid), 5)

    assert ended
    assert time.monotonic() - started < 3
    assert [] == list((tmp_path / "home" / "servers").iterdir())


def test_two_servers_share_a_home(serve):
    """Each owns its models and sessions; both see all checkpoints."""
    one, other = serve(), serve()
    model = one.client.model()
    path = one.client.result(one.client.save(model, 1, "shared"))["path"]
    session = other.client.session()
    loaded = other.client.result(
        other.client.post("load_weights", {"session_id": session, "model_seq_id": 0, "path": path})
    )
    foreign = other.client.refused("optim_step", {"model_id": model, "seq_id": 2})
    beat = other.client.refused("session_heartbeat", {"session_id": model.split(":")[0]})

    assert f"{session}:train:0" == loaded["model_id"]
    assert [path] == [c["tinker_path"] for c in other.client.get("checkpoints")["checkpoints"]]
    assert 404 == foreign[0]
    assert 404 == beat[0]
    assert "another server" in beat[1]


def test_two_servers_save_at_the_same_time(serve):
    """SQLite allows one writer at a time; this causes no errors."""
    servers = [serve(), serve()]
    models = [served.client.model() for served in servers]
    promises = [
        [served.client.save(model, seq, f"s{seq}") for seq in range(1, 30)]
        for served, model in zip(servers, models)
    ]
    results = [
        served.client.result(promise) for served, own in zip(servers, promises) for promise in own
    ]

    assert [] == [result for result in results if "error" in result]
    assert 58 == servers[0].client.get("checkpoints")["cursor"]["total_count"]


def test_a_successor_takes_over_only_from_the_dead_of_its_port(process, tmp_path):
    """A server on another port of the same home is not affected."""
    one, other = process(), process()
    one.start()
    other.start()
    models = [server.client.model() for server in (one, other)]
    one.kill()
    third = process(port=free_port())
    third.start()
    unknown = third.client.refused("optim_step", {"model_id": models[0], "seq_id": 1})
    one.start()

    assert 404 == unknown[0]
    assert "metrics" in one.client.result(one.client.optim_step(models[0], 1))
    assert "metrics" in other.client.result(other.client.optim_step(models[1], 1))


def test_what_dead_servers_on_chance_ports_left_is_cleaned_up(process, tmp_path):
    """Their live state is deleted; checkpoints stay, sessions are reported as ended."""
    server = process(port=None, announce=str(tmp_path / "announce.json"))
    server.port = 0
    url = server.start()
    client = WireClient(url)
    session = client.session()
    model = client.model(session)
    client.result(client.save(model, 1, "kept"))
    client.result(
        client.post(
            "save_weights_for_sampler",
            {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0},
        )
    )
    server.kill()
    [left] = (tmp_path / "home" / "servers").iterdir()
    successor = process(port=free_port())
    successor.start()
    answer = successor.client.get(f"sessions/{session}")
    beat = successor.client.refused("session_heartbeat", {"session_id": session})

    assert not left.exists()
    assert 1 == len(successor.client.get("checkpoints")["checkpoints"])
    assert [model] == answer["training_run_ids"]
    assert [] == answer["sampler_ids"]
    assert 410 == beat[0]


def test_an_engine_that_cannot_start_ends_the_server_with_the_reason(capfd, tmp_path):
    """For example if torch is missing."""

    def broken():
        raise ImportError("No module named 'torch'")

    code = main(home=tmp_path / "home", engine=broken)

    assert 1 == code
    assert "the engine is not running: No module named 'torch'" in capfd.readouterr().err


def test_a_device_that_is_not_here_ends_the_server_in_one_sentence(capfd, tmp_path):
    code = main(home=tmp_path / "home", device="nonsense")
    shown = capfd.readouterr().err

    assert 1 == code
    assert "device 'nonsense' cannot be used here" in shown
    assert "Choose auto, cpu, cuda or mps." in shown
    assert "Traceback" not in shown


def test_operations_wait_for_the_engine_to_start(tmp_path):
    """The server answers at once; importing the engine takes seconds."""
    gate = threading.Event()

    def slow():
        gate.wait(10)
        return FakeEngine()

    with LocalServer(tmp_path / "home", engine=slow) as server:
        client = WireClient(server.url)
        session = client.session()
        starting = client.send("GET", "healthz").headers["X-Tinkex-Engine"]
        promise = client.post(
            "create_model", {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        )
        gate.set()
        result = client.result(promise)
        client.http.close()

    assert "starting" == starting
    assert "model_id" in result


def test_a_home_is_its_users_folder(tmp_path):
    """Opened twice, it is the same home with the same secret."""
    first, second = Home.open(tmp_path / "h"), Home.open(tmp_path / "h")

    assert first.secret() == second.secret()
    assert 32 == len(first.secret())
