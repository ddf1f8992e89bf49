"""
How a program can end, and what happens to the work it has submitted: real scripts, a real server.

The server runs on the fake engine; where it must not answer, it is stopped (SIGSTOP). The scripts
mostly wait, so several run at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.processes import ROOT, ServerProcess

START = """
import os, signal, sys, threading, time
import tinkex
from tinkex import types
from tinkex.config import Patience

url, name, close, no_answer = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
patience = Patience(close=close, no_answer=no_answer, connect=2.0, report_after=60.0)
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
    print("freeze the server", flush=True)
    sys.stdin.readline()

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


def start(server, script, name, *, close=60.0, no_answer=60.0, is_measured=True):
    """Start *script*; it prints the time when its work is submitted.

    Args:
        is_measured: False if the handler that coverage has for SIGTERM would change the result.
    """
    environment = {**os.environ, "SERVER": str(server.process.pid), "TINKER_API_KEY": ""}
    if not is_measured:
        environment.pop("COVERAGE_PROCESS_CONFIG", None)
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
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(server, script, name, **options):
    with ended(start(server, script, name, **options)) as result:
        return result()


def run_all(server, scripts, at_once, **options):
    """Run scripts by their names, *at_once* at a time; how each ended."""
    with ThreadPoolExecutor(at_once) as threads:
        ends = threads.map(lambda name: run(server, scripts[name], name, **options), scripts)
        return dict(zip(scripts, ends))


def run_frozen(server, *ends, before="s = service()", **options):
    """Run a script for each of *ends*; the server is frozen when all have called freeze()."""
    scripts = [FROZEN.format(before=before, now=NOW, end=end) for end in ends]
    try:
        with ExitStack() as stack, ThreadPoolExecutor(len(ends)) as threads:
            processes = [start(server, script, "never", **options) for script in scripts]
            results = [stack.enter_context(ended(process)) for process in processes]
            for process in processes:
                assert "freeze the server\n" == process.stdout.readline(), process.stderr.read()
            server.process.send_signal(signal.SIGSTOP)
            return list(threads.map(lambda result: result("\n"), results))
    finally:
        server.process.send_signal(signal.SIGCONT)


@contextmanager
def ended(process):
    """A function that gives *process* its input and waits for its end."""

    def result(given=None):
        stdout, stderr = process.communicate(given, timeout=60)
        return Ended(process, stdout, stderr, time.time())

    try:
        yield result
    finally:
        process.kill()


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


def test_a_normal_end_waits_for_what_was_submitted(server):
    """101 operations, and result() is never called: the checkpoint must be there all the same."""
    scripts = {"kept-" + "".join(filter(str.isalnum, name)): NORMAL[name] for name in NORMAL}

    for name, end in run_all(server, scripts, at_once=4).items():
        assert (0, "") == (end.status, end.stderr), name
        assert is_saved(server, name), name


FROZEN = """
    {before}
    t = s.create_lora_training_client("tiny"); t.optim_step(ADAM).result()
    freeze(); train(t); {now}
    {end}
    """


EXCEPTIONS = {
    "1 / 0": 1,
    "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)": -signal.SIGINT,
    # exec() of a string, as importing protobuf does it, makes Python forget the Ctrl-C
    "import atexit; atexit.register(exec, '', {}); os.kill(os.getpid(), 2)": -signal.SIGINT,
    "s.__exit__(SystemExit, SystemExit(3), None); sys.exit(3)": 3,
    "with s: 1 / 0": 1,
    "with t: 1 / 0": 1,
    "with s: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)": -signal.SIGINT,
    "with t: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)": -signal.SIGINT,
}


@pytest.mark.parametrize("script", EXCEPTIONS)
def test_an_end_by_exception_is_quick_and_says_what_is_dropped(server, script):
    """The server is frozen: waiting for it would take a minute."""
    [end] = run_frozen(server, script)

    assert EXCEPTIONS[script] == end.status, end.stderr
    assert "operations (" in end.stderr and "x optim_step on" in end.stderr
    assert 5 > end.seconds


CLOSED = "was closed after waiting 1 s before 101 operations"


def test_a_frozen_server_holds_up_no_end_beyond_the_patience(server):
    """And the exit status tells a pipeline that the work was not done."""
    says = {
        "pass": "tinkex: the program ended before 101 operations",
        **dict.fromkeys(["s.close()", "t.close()", "with s: pass", "with t: pass"], CLOSED),
    }

    for script, end in zip(says, run_frozen(server, *says, close=1.0)):
        assert 1 == end.status, script
        assert says[script] in end.stderr, script
        assert 0.8 < end.seconds < 9, script


def test_a_server_that_does_not_answer_holds_up_no_end_beyond_no_answer(server):
    scripts = ["pass", "t.close()"]

    for script, end in zip(scripts, run_frozen(server, *scripts, no_answer=2.0)):
        assert 1 == end.status, script
        assert "operations" in end.stderr, script
        assert 0.8 < end.seconds < 9, script


@pytest.mark.parametrize("end", ["pass", "with s: pass", "with t: 1 / 0"])
def test_a_dead_server_holds_up_no_end_beyond_the_patience(tmp_path, end):
    """Connections are refused at once, so every moment of the patience is a moment of retrying."""
    server = ServerProcess(tmp_path / "home")
    server.start()
    die = "freeze = lambda: os.kill(int(os.environ['SERVER']), signal.SIGKILL); s = service()"
    script = FROZEN.format(before=die, now=NOW, end=end)
    try:
        result = run(server, script, "never", close=1.0)
    finally:
        server.kill()
        server.client.http.close()

    assert 1 == result.status
    assert "operations (" in result.stderr
    assert 9 > result.seconds


def test_ctrl_c_ends_the_wait_at_the_end_of_the_script(server):
    """The user has seen that the script waits, and does not want it to."""
    [end] = run_frozen(server, "interrupt_after(1.5)")

    assert 130 == end.status
    assert "tinkex: the program ended before" in end.stderr
    assert 9 > end.seconds


def test_ctrl_c_ends_the_wait_of_close_and_says_what_is_dropped(server):
    """Not only how far close() had come, which is all that Python's traceback shows."""
    now = "interrupt_after(1.5)"
    for end in run_frozen(server, f"{now}; s.close()", f"{now}; t.close()", f"with s: {now}"):
        assert -signal.SIGINT == end.status
        assert "was closed before" in end.stderr and "operations (" in end.stderr
        assert 9 > end.seconds


def test_sigterm_can_be_made_an_end_like_ctrl_c(server):
    """The line of docs/reliability.md; `sys.exit` in a handler would wait for the frozen server."""
    [end] = run_frozen(
        server,
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
        before="s = service(); signal.signal(signal.SIGTERM, signal.default_int_handler)",
    )

    assert -signal.SIGINT == end.status
    assert "tinkex: the program ended before" in end.stderr
    assert 5 > end.seconds


def test_sigterm_alone_ends_the_program_at_once(server):
    """No handler is installed behind the user's back, so nothing can be printed."""
    [end] = run_frozen(
        server,
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL; "
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
        is_measured=False,
    )

    assert -signal.SIGTERM == end.status
    assert "dropped" not in end.stderr
    assert 5 > end.seconds


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


def open_polls(end, models, service="service()", before=""):
    script = OPEN_POLLS.format(service=service, models=models, now=NOW, end=end)
    return textwrap.dedent(before) + textwrap.dedent(script)


@pytest.mark.parametrize(
    "end", ["pass", "1 / 0", "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"], ids=str
)
def test_open_polls_do_not_hold_up_the_end(stuck_server, end):
    """A long poll may have 40 s to go. So may 64, and those of samples."""
    scripts = {f"{models} models": open_polls(end, models) for models in (1, 64)}

    check_quick(run_all(stuck_server, scripts, at_once=2, close=0.01))


@pytest.mark.parametrize("end", ["pass", "1 / 0"])
def test_nor_do_polls_through_an_adapter_of_the_user(stuck_server, end):
    """Nothing is known of its connections, so none of them can be woken."""
    service = "tinkex.ServiceClient(url, 'tml-test', patience=patience, session=session)"
    before = """
    import requests
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=300))
    """
    scripts = {f"{models} models": open_polls(end, models, service, before) for models in (1, 64)}

    check_quick(run_all(stuck_server, scripts, at_once=2, close=0.01))


def check_quick(ends):
    for name, end in ends.items():
        assert "operations (0 not sent" in end.stderr, (name, end.stderr)
        assert 2 > end.seconds, (name, end.stderr)


PARENTS = [
    # pytest
    """
        import pytest
        with open(name, "w") as file:
            file.write("def test_it():\\n" + textwrap.indent(code, "    "))
        pytest.main(["-s", "-p", "no:terminal", "-p", "no:cacheprovider", name])
        """,
    # a forked daemon process
    """
        start = multiprocessing.get_context("fork").Process
        child = start(target=exec, args=(code, {}), daemon=True); child.start(); child.join()
        """,
    # a spawned daemon process
    """
        start = multiprocessing.get_context("spawn").Process
        child = start(target=exec, args=(code, {}), daemon=True); child.start(); child.join()
        """,
    # a daemon thread that still waits
    """
        opened = threading.Event()
        code += "opened.set(); work[0].result()"
        threading.Thread(target=exec, args=(code, {"opened": opened}), daemon=True).start()
        opened.wait()
        """,
]


def test_nor_do_they_inside_another_program(stuck_server, tmp_path):
    """None of these ends as a script does: the work is done in a function, a child or a thread."""
    code = START + open_polls("", 64)
    scripts = {
        str(tmp_path / f"test_{number}.py"): (
            f"import multiprocessing, textwrap\ncode = {code!r}\n{textwrap.dedent(parent)}"
        )
        for number, parent in enumerate(PARENTS)
    }

    check_quick(run_all(stuck_server, scripts, at_once=2, close=0.01))
