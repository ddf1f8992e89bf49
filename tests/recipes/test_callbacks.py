"""Callbacks: what they are called with, in which order, and that their errors stay theirs."""

from __future__ import annotations

import logging

import pytest

from tinkex.recipes.callbacks import Callback, Callbacks, Checkpoint, End
from tinkex.recipes.run import Run

RUN = Run("nowhere")


class Recording(Callback):
    def __init__(self, log, name="a"):
        self.log, self.name = log, name

    def on_step(self, run, row):
        self.log.append((self.name, row["step"]))

    def on_end(self, run, end):
        self.log.append((self.name, end.status))


class Failing:
    """Not a subclass: any object with one of the methods is a callback."""

    def __init__(self):
        self.calls = 0

    def on_step(self, run, row):
        self.calls += 1
        raise RuntimeError("no disk left")


def test_all_callbacks_are_called_in_order():
    log = []
    callbacks = Callbacks([Recording(log, "a"), Recording(log, "b")])

    callbacks.step(RUN, {"step": 1})
    callbacks.save(RUN, Checkpoint(1, "tinker://a/weights/b"))
    callbacks.end(RUN, End("finished"))

    assert [("a", 1), ("b", 1), ("a", "finished"), ("b", "finished")] == log


def test_an_error_is_logged_and_the_next_callback_is_called(caplog):
    log = []
    callbacks = Callbacks([Failing(), Recording(log)])

    with caplog.at_level(logging.WARNING, "tinkex"):
        callbacks.step(RUN, {"step": 1})

    assert [("a", 1)] == log
    assert (
        "The callback Failing failed in on_step (RuntimeError: no disk left); the run continues."
    ) in caplog.text


def test_a_callback_that_always_fails_is_given_up(caplog):
    """One log line per step of a long run would hide everything else."""
    failing = Failing()
    callbacks = Callbacks([failing])

    for step in range(20):
        callbacks.step(RUN, {"step": step})

    assert 5 == failing.calls
    assert "failed 5 times in a row and is not called again" in caplog.text


def test_ctrl_c_is_not_an_error_of_a_callback():
    class Interrupted(Callback):
        def on_step(self, run, row):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Callbacks([Interrupted()]).step(RUN, {"step": 1})


def test_a_callback_cannot_change_the_row_of_the_next():
    class Changing(Callback):
        def on_step(self, run, row):
            row["step"] = 99

    log = []
    Callbacks([Changing(), Recording(log)]).step(RUN, {"step": 1})

    assert [("a", 1)] == log


def test_what_is_no_callback_is_named():
    class Typo:
        def on_stpe(self, run, row): ...

    with pytest.raises(
        TypeError, match="Typo has on_stpe, which is not an event; did you mean on_st"
    ):
        Callbacks([Typo()])
    with pytest.raises(TypeError, match="got the class Recording; write Recording"):
        Callbacks([Recording])
    with pytest.raises(TypeError, match="a callback needs at least one of on_start"):
        Callbacks([print])
