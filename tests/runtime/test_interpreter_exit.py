"""What runs at the end of a program, and the status with which it ends."""

from __future__ import annotations

import atexit
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tinkex.runtime import interpreter_exit


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.split(), done.stderr


def test_the_hook_runs_before_threads_are_joined():
    """The thread of the pool ends only because the hook wakes it."""
    script = """
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from tinkex.runtime.interpreter_exit import call_before_threads_end

    woken = threading.Event()
    ThreadPoolExecutor(1).submit(lambda: print("woken" if woken.wait(50) else "late"))
    call_before_threads_end(woken.set)
    """

    assert (0, ["woken"], "") == run(script)


def test_without_the_private_hook_of_python_atexit_serves(monkeypatch):
    registered = []
    monkeypatch.delattr(threading, "_register_atexit")
    monkeypatch.setattr(atexit, "register", registered.append)
    interpreter_exit.call_before_threads_end(print)

    assert [print] == registered


def test_a_status_is_set_after_all_that_runs_at_exit():
    """What others have registered still runs, and what they print is written."""
    script = """
    import atexit
    from tinkex.runtime.interpreter_exit import exit_with

    atexit.register(print, "last")
    atexit.register(print, "first")
    exit_with(7)
    """

    assert (7, ["first", "last"], "") == run(script)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to end by")
def test_ending_by_ctrl_c_is_what_a_shell_sees():
    script = """
    import atexit
    from tinkex.runtime.interpreter_exit import exit_by_ctrl_c

    atexit.register(print, "registered")
    exit_by_ctrl_c()
    """

    assert (-signal.SIGINT, ["registered"], "") == run(script)


def test_a_program_without_streams_ends_like_any_other():
    """As under pythonw, or where they were closed and removed."""
    script = """
    import sys
    from tinkex.runtime.interpreter_exit import exit_with

    exit_with(3)
    sys.stdout = sys.stderr = None
    """

    assert 3 == run(script)[0]


@pytest.mark.parametrize(
    "last, interactive, expected",
    [
        (None, False, (False, False)),
        (ValueError, False, (True, False)),
        (KeyboardInterrupt, False, (True, True)),
        (KeyboardInterrupt, True, (False, False)),
    ],
)
def test_the_exception_that_ends_a_program_is_known(monkeypatch, last, interactive, expected):
    """At a prompt, the last exception is one that the user has seen and gone past."""
    monkeypatch.setattr(sys, "last_type", last, raising=False)
    if interactive:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)

    assert expected == (interpreter_exit.ends_by_exception(), interpreter_exit.ends_by_ctrl_c())


def test_threads_of_a_pool_are_known_from_others():
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(threading.current_thread).result()

        assert interpreter_exit.belongs_to_executor(ours)
        assert not interpreter_exit.belongs_to_executor(threading.current_thread())
