"""
How a program can end, and what happens to the work it has submitted: real scripts, a real server.

The server runs on the fake engine; where it must not answer, it is stopped (SIGSTOP).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.support.processes import ROOT, ServerProcess

START = """
import os, signal, sys, threading, time
import tinkex
from tinkex import types
from tinkex.config import Patience

url, name, close, no_answer = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
patience = Patience(close=close, no_answer=no_answer, connect=2.0)
ADAM = types.AdamParams(learning_rate=1e-3)

def datum(*tokens):
    return types.Datum(types.ModelInput.from_ints(list(tokens)), {"target_tokens": list(tokens)})

def service():
    return tinkex.ServiceClient(url, "tml-test", patience=patience)

def train(client, steps=50):
    for _ in range(steps):
        client.forward_backward([datum(1, 2, 3)], "cross_entropy")
        client.optim_step(ADAM)
    return client.save_state(name)

def freeze():
    os.kill(int(os.environ["SERVER"]), signal.SIGSTOP)

def interrupt_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = ServerProcess(tmp_path_factory.mktemp("endings"))
    made.start()
    yield made
    made.process.send_signal(signal.SIGCONT)
    made.close()


class Ended:
    """How a script ended: its status, what it wrote, how long it took from its last line on."""

    def __init__(self, process, stdout, stderr, ended):
        self.status, self.stderr = process.returncode, stderr
        *lines, last = stdout.splitlines() or [""]
        self.lines = lines
        self.seconds = ended - float(last) if last.replace(".", "").isdigit() else None


def start(server, script, name, *, close=60.0, no_answer=60.0):
    """Start *script*; it prints the time when its work is submitted."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            START + textwrap.dedent(script),
            f"http://127.0.0.1:{server.port}",
            name,
            str(close),
            str(no_answer),
        ],
        cwd=ROOT,
        env={**os.environ, "SERVER": str(server.process.pid), "TINKER_API_KEY": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(server, script, name, **options):
    process = start(server, script, name, **options)
    try:
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        server.process.send_signal(signal.SIGCONT)
    return Ended(process, stdout, stderr, time.time())


def is_saved(server, name):
    return list(server.home.rglob(f"**/{name}"))


NOW = "print(time.time(), flush=True)"
NORMAL = {
    "the script just ends": f"""
        s = service(); t = s.create_lora_training_client("tiny"); train(t); {NOW}
        """,
    "inside a function": f"""
        def main():
            train(service().create_lora_training_client("tiny"))
        main(); {NOW}
        """,
    "sys.exit(0)": f"""
        s = service(); t = s.create_lora_training_client("tiny"); train(t); {NOW}; sys.exit(0)
        """,
    "close of the service": f"""
        s = service(); t = s.create_lora_training_client("tiny"); train(t); {NOW}; s.close()
        """,
    "close of the model": f"""
        s = service(); t = s.create_lora_training_client("tiny"); train(t); {NOW}; t.close()
        """,
    "with the service": f"""
        with service() as s:
            t = s.create_lora_training_client("tiny"); train(t); {NOW}
        """,
    "with the service, sys.exit(0) inside": f"""
        with service() as s:
            t = s.create_lora_training_client("tiny"); train(t); {NOW}; sys.exit(0)
        """,
    "with the model": f"""
        s = service()
        with s.create_lora_training_client("tiny") as t:
            train(t); {NOW}
        """,
    "with both": f"""
        with service() as s, s.create_lora_training_client("tiny") as t:
            train(t); {NOW}
        """,
    "with a model of its own": f"""
        with tinkex.TrainingClient.start(
            "tiny", base_url=url, api_key="tml-test", patience=patience
        ) as t:
            train(t); {NOW}
        """,
    "a thread outlives the main thread": f"""
        def work():
            time.sleep(0.5)
            train(s.create_lora_training_client("tiny"))
        s = service()
        thread = threading.Thread(target=work); thread.start(); {NOW}
        """,
}


@pytest.mark.parametrize("script", NORMAL.values(), ids=NORMAL)
def test_a_normal_end_waits_for_what_was_submitted(server, script, request):
    """101 operations, and result() is never called: the checkpoint must be there all the same."""
    name = "kept-" + "".join(c for c in request.node.callspec.id if c.isalnum())
    ended = run(server, script, name)

    assert (0, "") == (ended.status, ended.stderr)
    assert is_saved(server, name)


FROZEN = """
    {before}
    t = s.create_lora_training_client("tiny"); t.optim_step(ADAM).result()
    freeze(); train(t); {now}
    {end}
    """


@pytest.mark.parametrize(
    "status, end",
    [
        (1, "1 / 0"),
        (-signal.SIGINT, "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"),
        # exec() of a string, as importing protobuf does it, makes Python forget the Ctrl-C
        (-signal.SIGINT, "import atexit; atexit.register(exec, '', {}); os.kill(os.getpid(), 2)"),
        (3, "s.__exit__(SystemExit, SystemExit(3), None); sys.exit(3)"),
        (1, "with s: 1 / 0"),
        (1, "with t: 1 / 0"),
        (-signal.SIGINT, "with s: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"),
        (-signal.SIGINT, "with t: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"),
    ],
    ids=str,
)
def test_an_end_by_exception_is_quick_and_says_what_is_dropped(server, status, end):
    """The server is frozen: waiting for it would take a minute."""
    ended = run(server, FROZEN.format(before="s = service()", now=NOW, end=end), "never")

    assert status == ended.status, ended.stderr
    assert "operations (" in ended.stderr and "x optim_step on" in ended.stderr
    assert 5 > ended.seconds


SOON, NO_ANSWER = {"close": 1.0}, {"no_answer": 2.0}


@pytest.mark.parametrize(
    "end, says, limit",
    [
        ("pass", "tinkex: the program ended before 101 operations", SOON),
        ("s.close()", "was closed after waiting 1 s before 101 operations", SOON),
        ("t.close()", "was closed after waiting 1 s before 101 operations", SOON),
        ("with s: pass", "was closed after waiting 1 s before 101 operations", SOON),
        ("with t: pass", "was closed after waiting 1 s before 101 operations", SOON),
        ("pass", "operations", NO_ANSWER),
        ("t.close()", "operations", NO_ANSWER),
    ],
    ids=str,
)
def test_a_frozen_server_holds_up_no_end_beyond_the_patience(server, end, says, limit):
    """And the exit status tells a pipeline that the work was not done."""
    ended = run(server, FROZEN.format(before="s = service()", now=NOW, end=end), "never", **limit)

    assert 1 == ended.status
    assert says in ended.stderr
    assert 0.8 < ended.seconds < 9


@pytest.mark.parametrize("end", ["pass", "with s: pass", "with t: 1 / 0"])
def test_a_dead_server_holds_up_no_end_beyond_the_patience(tmp_path, end):
    """Connections are refused at once, so every moment of the patience is a moment of retrying."""
    server = ServerProcess(tmp_path / "home")
    server.start()
    die = "freeze = lambda: os.kill(int(os.environ['SERVER']), signal.SIGKILL); s = service()"
    process = start(server, FROZEN.format(before=die, now=NOW, end=end), "never", close=1.0)
    try:
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        server.kill()
        server.client.http.close()
    ended = Ended(process, stdout, stderr, time.time())

    assert 1 == ended.status
    assert "operations (" in ended.stderr
    assert 9 > ended.seconds


def test_ctrl_c_ends_the_wait_at_the_end_of_the_script(server):
    """The user has seen that the script waits, and does not want it to."""
    script = FROZEN.format(
        before="s = service(); interrupt_after(4.0)",
        now=NOW,
        end="pass",
    )
    ended = run(server, script, "never")

    assert 130 == ended.status
    assert "tinkex: the program ended before" in ended.stderr
    assert 9 > ended.seconds


def test_sigterm_can_be_made_an_end_like_ctrl_c(server):
    """The line of docs/reliability.md; `sys.exit` in a handler would wait for the frozen server."""
    script = FROZEN.format(
        before="s = service(); signal.signal(signal.SIGTERM, signal.default_int_handler)",
        now=NOW,
        end="os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    )
    ended = run(server, script, "never")

    assert -signal.SIGINT == ended.status
    assert "tinkex: the program ended before" in ended.stderr
    assert 5 > ended.seconds


def test_sigterm_alone_ends_the_program_at_once(server):
    """No handler is installed behind the user's back, so nothing can be printed."""
    end = """
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)
    """
    script = FROZEN.format(before="s = service()", now=NOW, end=end)
    ended = run(server, script, "never")

    assert -signal.SIGTERM == ended.status
    assert "dropped" not in ended.stderr
    assert 5 > ended.seconds


# Threads of a ThreadPoolExecutor are joined at the end of the program: polls must be woken.


@pytest.fixture(scope="module")
def stuck_server(tmp_path_factory):
    """It accepts everything and finishes nothing: a poll stays open for 30 s."""
    made = ServerProcess(tmp_path_factory.mktemp("stuck"), stuck=True)
    made.start()
    yield made
    made.close()


OPEN_POLLS = """
    s = {service}
    models = [s.create_lora_training_client("tiny") for _ in range({models})]
    sampler = s.create_sampling_client(base_model="tiny")
    work = [t.forward_backward([datum(1, 2, 3)], "cross_entropy") for t in models]
    work += [sampler.sample([1, 2, 3]) for _ in models]
    while not all(future.running() for future in work):
        time.sleep(0.01)
    time.sleep(1.0)  # for the polls to be open
    {now}
    {end}
    """


@pytest.mark.parametrize("models", [1, 64])
@pytest.mark.parametrize(
    "end", ["pass", "1 / 0", "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"], ids=str
)
def test_open_polls_do_not_hold_up_the_end(stuck_server, models, end):
    """A long poll may have 40 s to go. So may 64, and those of samples."""
    script = OPEN_POLLS.format(service="service()", models=models, now=NOW, end=end)
    ended = run(stuck_server, script, "never", close=0.01)

    assert "operations (0 not sent" in ended.stderr, ended.stderr
    assert 2 > ended.seconds, ended.stderr


@pytest.mark.parametrize("models", [1, 64])
@pytest.mark.parametrize("end", ["pass", "1 / 0"])
def test_nor_do_polls_through_an_adapter_of_the_user(stuck_server, models, end):
    """Nothing is known of its connections, so none of them can be woken."""
    service = "tinkex.ServiceClient(url, 'tml-test', patience=patience, session=session)"
    script = """
    import requests
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=300))
    """
    script = textwrap.dedent(script) + textwrap.dedent(OPEN_POLLS)
    script = script.format(service=service, models=models, now=NOW, end=end)
    ended = run(stuck_server, script, "never", close=0.01)

    assert "operations (0 not sent" in ended.stderr, ended.stderr
    assert 2 > ended.seconds, ended.stderr


PARENTS = {
    "pytest": """
        import pytest
        with open(name, "w") as file:
            file.write("def test_it():\\n" + textwrap.indent(code, "    "))
        pytest.main(["-s", "-p", "no:terminal", "-p", "no:cacheprovider", name])
        """,
    "a forked daemon process": """
        start = multiprocessing.get_context("fork").Process
        child = start(target=exec, args=(code, {}), daemon=True); child.start(); child.join()
        """,
    "a spawned daemon process": """
        start = multiprocessing.get_context("spawn").Process
        child = start(target=exec, args=(code, {}), daemon=True); child.start(); child.join()
        """,
    "a daemon thread that still waits": """
        opened = threading.Event()
        code += "opened.set(); work[0].result()"
        threading.Thread(target=exec, args=(code, {"opened": opened}), daemon=True).start()
        opened.wait()
        """,
}


@pytest.mark.parametrize("parent", PARENTS.values(), ids=PARENTS)
def test_nor_do_they_inside_another_program(stuck_server, tmp_path, parent):
    """None of these ends as a script does: the work is done in a function, a child or a thread."""
    code = START + textwrap.dedent(OPEN_POLLS).format(
        service="service()", models=64, now=NOW, end=""
    )
    script = f"import multiprocessing, textwrap\ncode = {code!r}\n{textwrap.dedent(parent)}"
    ended = run(stuck_server, script, str(tmp_path / "test_it.py"), close=0.01)

    assert "operations (0 not sent" in ended.stderr, ended.stderr
    assert 2 > ended.seconds, ended.stderr
