"""Hooks at the end of the program: functions run before threads are joined, and the exit status.

`atexit` runs only after the threads of every ThreadPoolExecutor have been joined, which is too late
to wake them. The hook of concurrent.futures is private; it is used only here.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # registers its own hook first, so that ours runs before it
import os
import signal
import sys
import threading
from collections.abc import Callable


def call_before_threads_end(function: Callable[[], None]) -> None:
    """Call *function* when the main thread has ended, before threads are joined.

    CPython 3.9 to 3.14 have the hook; its functions run last in, first out. Without it, *function*
    runs by atexit, and the end of the program waits for open polls.
    """
    register = getattr(threading, "_register_atexit", atexit.register)
    register(function)


def ends_by_exception() -> bool:
    """True if an uncaught exception (including Ctrl-C) ends the program.

    Python stores it in sys.last_type, which at an interactive prompt may be an older one.
    """
    interactive = hasattr(sys, "ps1") or sys.flags.interactive
    return not interactive and getattr(sys, "last_type", None) is not None


def ends_by_ctrl_c() -> bool:
    """True if Ctrl-C ends the program."""
    return ends_by_exception() and issubclass(sys.last_type or object, KeyboardInterrupt)


def belongs_to_executor(thread: threading.Thread) -> bool:
    """True if *thread* belongs to a ThreadPoolExecutor: it ends only after our hook has run."""
    return thread in getattr(concurrent.futures.thread, "_threads_queues", ())


def exit_with(status: int) -> None:
    """Let the program end with *status*, after the atexit functions registered so far."""
    _end_by(lambda: os._exit(status))


def exit_by_ctrl_c() -> None:
    """Let the program end by SIGINT, as Python usually does after Ctrl-C.

    CPython forgets the Ctrl-C if another thread then calls exec() with a string, as importing
    protobuf does: the exit status would be 1.
    """
    if os.name == "posix":
        _end_by(_kill_by_sigint)


def _kill_by_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _end_by(end: Callable[[], None]) -> None:
    def leave() -> None:
        atexit.unregister(leave)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        end()

    atexit.register(leave)  # last registered, first called
