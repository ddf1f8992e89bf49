"""Progress of a run in a terminal, and stopping it by Ctrl-C and SIGTERM.

Progress goes to stderr; stdout is for results. Does not know what is running.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Seconds after the first Ctrl-C until the process is forced to exit.
LAST_RESORT_SECONDS = 4.7
#: Seconds between two plain progress lines.
PLAIN_SECONDS = 5.0


class Progress:
    """Steps of a run: a bar in a terminal, otherwise a line every few seconds. A Report.

    Args:
        clock: seconds; replaceable in tests.
        quiet: show nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, quiet: bool = False) -> None:
        self._clock = clock
        self._quiet = quiet
        self._bar: Any = None  # a tqdm, once there is progress to show
        self._first_step = self._total = 0
        self._begun = self._last_line = clock()

    def say(self, text: str) -> None:
        if not self._quiet:
            _tqdm().write(text, file=sys.stderr)

    def rendered(self, done: int, total: int) -> None:
        """Show how many of *total* examples have been tokenized."""
        if self._quiet:
            return
        now = self._clock()
        if _shows_bars():
            if self._bar is None:
                self._bar = _tqdm()(total=total, unit="example", dynamic_ncols=True)
                self._bar.set_description_str("rendering")
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            print(f"rendered {done}/{total} examples", file=sys.stderr, flush=True)
        if done >= total:
            self.end()

    def begin(self, step: int, total_steps: int) -> None:
        self._first_step, self._total = step, total_steps
        self._begun = self._last_line = self._clock()
        if _shows_bars() and not self._quiet:
            self._bar = _tqdm()(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def row(self, row: dict[str, float]) -> None:
        if self._bar is None:
            self._print(row)
            return
        fields = _fields(row)
        if "eval_loss" in row:
            self.say(
                f"step {row['step']}: {fields[-1]}{'' if 'eval_reward' in row else ' per token'}"
            )
        self._bar.set_postfix_str(", ".join(fields), refresh=False)
        self._bar.update(int(row["step"]) - self._bar.n)

    def _print(self, row: dict[str, float]) -> None:
        if self._quiet:
            return
        step, now = int(row["step"]), self._clock()
        is_worth_a_line = "eval_loss" in row or step == self._total
        if not is_worth_a_line and now - self._last_line < PLAIN_SECONDS:
            return
        self._last_line = now
        fields = [f"step {step}/{self._total}", *_fields(row)]
        if self._first_step < step < self._total:
            left = (now - self._begun) / (step - self._first_step) * (self._total - step)
            fields.append(f"{_tqdm().format_interval(left)} left")
        print(", ".join(fields), file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def is_notebook() -> bool:
    """True in a Jupyter notebook, where IPython's shell is connected to a browser."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def _shows_bars() -> bool:
    return sys.stderr.isatty() or is_notebook()


def _fields(row: dict[str, float]) -> list[str]:
    fields = []
    if "train_loss" in row:
        name = "reward" if "reward" in row else "loss"
        fields.append(f"{name} {row.get('reward', row['train_loss']):.4f}")
        fields.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "eval_reward" in row:
        fields.append(f"held-out reward {row['eval_reward']:.4f}")
    elif "eval_loss" in row:
        fields.append(f"held-out loss {row['eval_loss']:.4f}")
    return fields


class CtrlC:
    """Handles Ctrl-C, and SIGTERM, the Ctrl-C of job schedulers, while this context is entered.

    Inside `deferred` the first signal is only recorded, elsewhere it raises KeyboardInterrupt. The
    second one exits at once. `LAST_RESORT_SECONDS` after the first, the process is forced to exit,
    whatever it is waiting for. Signals are not handled in other threads than the main one.

    Args:
        is_last_resort: end the process, as above. False is for use inside other programs: the
            second signal raises KeyboardInterrupt, and only Ctrl-C is handled.

    Attributes:
        status: the exit status: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, *, is_last_resort: bool = True) -> None:
        self.status = 128 + signal.SIGINT
        self._ends_process = is_last_resort
        self._is_deferred = self._is_pressed = False
        self._last_resort: threading.Timer | None = None

    def __enter__(self) -> CtrlC:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM) if self._ends_process else (signal.SIGINT,)
            self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        if self._last_resort is not None:
            self._last_resort.cancel()

    @contextmanager
    def deferred(self) -> Iterator[Callable[[], bool]]:
        """Yields a function that returns True once a signal has arrived."""
        self._is_deferred = True
        try:
            yield lambda: self._is_pressed
        finally:
            self._is_deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Do not print here: the signal may have interrupted another print.
        if self._is_pressed and self._ends_process:
            os._exit(self.status)
        if not self._ends_process:
            is_second, self._is_pressed = self._is_pressed, True
            if is_second or not self._is_deferred:
                raise KeyboardInterrupt
            return
        self._is_pressed = True
        self.status = 128 + signum
        self._last_resort = threading.Timer(LAST_RESORT_SECONDS, os._exit, (self.status,))
        self._last_resort.daemon = True
        self._last_resort.start()
        if not self._is_deferred:
            raise KeyboardInterrupt


def _tqdm() -> Any:
    """tqdm's class. Imported late, because `tinkex --help` imports this module."""
    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm warns; a text bar is sufficient.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm

    return tqdm
