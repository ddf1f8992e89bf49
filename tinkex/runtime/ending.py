"""The end of clients and programs: of a `with` block, and of the interpreter.

Importing this module registers a function that runs when the main thread has ended.
"""

from __future__ import annotations

import sys
import threading

from tinkex.runtime import http_session, interpreter_exit
from tinkex.runtime.connection import HURRIED_TIMEOUT
from tinkex.runtime.executor import end_all
from tinkex.runtime.session import open_sessions


def is_normal_end(exc: BaseException | None) -> bool:
    """True if a with block that ended with *exc* succeeded: sys.exit(0) is not a failure."""
    return exc is None or (isinstance(exc, SystemExit) and exc.code in (None, 0))


def exit_timeout(exc: BaseException | None) -> float | None:
    """Seconds for close() after a with block that ended with *exc*; None is the default."""
    if is_normal_end(exc) or isinstance(exc, Exception):
        return None
    return HURRIED_TIMEOUT


def _end_program() -> None:
    """Runs when the main thread has ended: waits for submitted work, or prints what is dropped.

    After an exception or Ctrl-C it does not wait.
    """
    quick = interpreter_exit.ends_by_exception()
    status = 0
    for session in [s for s in list(open_sessions) if s.ends_with_this_process]:
        try:
            _join_threads_of_program()
            left = session.end_with_program(0.0 if quick else session.config.patience.close)
        except KeyboardInterrupt:
            quick, status = True, 130  # a shell's status after Ctrl-C
            left = session.end_with_program(0.0)
        session.pending.report()
        if left:
            status = status or 1
            print(
                f"tinkex: the program ended before {left}. What was not sent is dropped. "
                "To keep such work, call result() on the last future or close the client before "
                f"the end; patience.close ({session.config.patience.close:.0f} s) limits the wait.",
                file=sys.stderr,
            )
    end_all(http_session.interrupt_all)
    if interpreter_exit.ends_by_ctrl_c():
        interpreter_exit.exit_by_ctrl_c()
    elif status and not interpreter_exit.ends_by_exception():
        interpreter_exit.exit_with(status)


def _join_threads_of_program() -> None:
    """Python waits for threads that are not daemons; while they run, they may submit more."""
    for thread in threading.enumerate():
        is_ours = thread is threading.main_thread() or interpreter_exit.belongs_to_executor(thread)
        if not thread.daemon and not is_ours:
            thread.join()


interpreter_exit.call_before_threads_end(_end_program)
