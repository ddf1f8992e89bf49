"""The compute thread, without a server: order, fairness, shutdown."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future

import pytest

from tinkex.server.scheduler import Cancelled, Job, LineClosed, SampleJob, Scheduler, Wait


class Engine:
    """Samples that end after some steps; what was cancelled."""

    def __init__(self):
        self.waiting = {}
        self.cancelled = []
        self.broken = None

    def sample_step(self):
        if self.broken:
            raise self.broken
        finished = []
        for ticket in list(self.waiting):
            self.waiting[ticket] -= 1
            if self.waiting[ticket] == 0:
                del self.waiting[ticket]
                finished.append((ticket, f"sample {ticket}"))
        return finished

    def cancel_sample(self, ticket):
        self.cancelled.append(ticket)
        self.waiting.pop(ticket, None)


class Story:
    """Events in order; one for each job that has ended."""

    def __init__(self):
        self.log = []
        self.outcomes = {}
        self._ended = {}

    def end_of(self, name):
        return self._ended.setdefault(name, threading.Event())

    def wait(self, *names):
        for name in names:
            assert self.end_of(name).wait(5), f"{name} has not ended: {self.log}"

    def finish(self, name):
        def finished(outcome):
            self.outcomes[name] = outcome
            self.end_of(name).set()

        return finished

    def job(self, name, slices=1, fails=None, hold=None):
        def steps(engine):
            for i in range(slices):
                if hold:
                    hold.wait(5)
                self.log.append(name if slices == 1 else f"{name}{i}")
                if i < slices - 1:
                    yield
            if fails:
                raise fails
            return f"result of {name}"

        return Job(steps, self.finish(name))

    def sample(self, ticket, steps=1, fails=None):
        def submit(engine):
            if fails:
                raise fails
            engine.waiting[ticket] = steps

        return SampleJob(
            ticket, submit, self.finish(ticket), lambda engine: self.log.append(f"after {ticket}")
        )


@pytest.fixture
def story():
    return Story()


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def scheduler(engine):
    # By this clock every slice takes as long as any other, however busy the machine is.
    scheduler = Scheduler(lambda: engine, clock=itertools.count().__next__)
    yield scheduler
    if scheduler.alive:
        assert scheduler.close(5)


def test_jobs_of_a_line_run_in_the_order_of_their_numbers(scheduler, story):
    """In any order of arrival; jobs wait for missing ones before them."""
    scheduler.open_line("m", 1)
    for seq in (4, 3, 2):
        scheduler.put("m", seq, story.job(f"j{seq}"))
    scheduler.start()
    place = scheduler.place("m", 3)
    scheduler.put("m", 1, story.job("j1"))
    story.wait("j4")

    assert ["j1", "j2", "j3", "j4"] == story.log
    assert "result of j4" == story.outcomes["j4"]
    assert place[0] in (0, 2)  # 0 while the engine is starting


def test_lines_take_turns_slice_by_slice(scheduler, story):
    """A job of two slices ends before one of twenty that started earlier."""
    for line in ("big", "small"):
        scheduler.open_line(line)
    scheduler.put("big", 0, story.job("big", 20))
    scheduler.put("small", 0, story.job("small", 2))
    scheduler.start()
    story.wait("big", "small")

    assert story.log.index("small1") < story.log.index("big19")


def test_sampling_and_training_share_the_thread(scheduler, story, engine):
    """Neither waits until the other is idle."""
    scheduler.open_line("m")
    scheduler.put("m", 0, story.job("train", 50))
    scheduler.put_sample(story.sample("s", 5))
    scheduler.start()
    story.wait("train", "s")

    assert story.log.index("after s") < story.log.index("train49")


def test_a_job_that_fails_ends_with_its_exception_and_the_line_goes_on(scheduler, story):
    scheduler.open_line("m")
    failure = ValueError("no")
    scheduler.put("m", 0, story.job("bad", fails=failure))
    scheduler.put("m", 1, story.job("good"))
    scheduler.start()
    story.wait("good")

    assert failure is story.outcomes["bad"]
    assert "result of good" == story.outcomes["good"]


def test_the_last_job_waits_for_what_can_run_and_fails_the_rest(scheduler, story):
    """Jobs do not wait forever for a number that can no longer arrive."""
    scheduler.open_line("m")
    scheduler.put("m", 0, story.job("first"))
    scheduler.put("m", 5, story.job("stranded"))
    scheduler.put_last("m", story.job("last"))
    scheduler.start()
    story.wait("stranded")
    scheduler.put("m", 1, story.job("late"))

    assert ["first", "last"] == story.log
    assert isinstance(story.outcomes["stranded"], LineClosed)
    assert isinstance(story.outcomes["late"], LineClosed)
    assert scheduler.next_seq("m") is None


def test_a_line_can_be_opened_anew_while_the_old_ones_job_is_ending(scheduler, story):
    """A client may react to a failed creation before the compute thread continues."""
    scheduler.open_line("m")

    def begin_anew(outcome):
        scheduler.drop_line("m")
        scheduler.open_line("m")
        scheduler.put("m", 0, story.job("second"))

    scheduler.put("m", 0, Job(story.job("first").steps, begin_anew))
    scheduler.start()
    story.wait("second")

    assert ["first", "second"] == story.log


def test_samples_end_as_they_are_done_and_are_cleaned_up_after(scheduler, story):
    scheduler.start()
    for i in range(3):
        scheduler.put_sample(story.sample(f"s{i}", 3 - i))
    story.wait("s0", "s1", "s2")

    assert "sample s0" == story.outcomes["s0"]
    assert 3 == sum(entry.startswith("after") for entry in story.log)


def test_a_sample_that_is_refused_ends_without_having_begun(scheduler, story):
    """There is nothing to clean up, because it was not submitted."""
    scheduler.start()
    scheduler.put_sample(story.sample("bad", fails=ValueError("too long")))
    story.wait("bad")

    assert "too long" == str(story.outcomes["bad"])
    assert [] == story.log


def test_a_cancelled_sample_ends_at_once(scheduler, story, engine):
    scheduler.start()
    scheduler.put_sample(story.sample("s", 10**9))
    scheduler.cancel_sample("s")
    story.wait("s")

    assert isinstance(story.outcomes["s"], Cancelled)
    assert ["s"] == engine.cancelled


def test_a_sample_can_be_cancelled_before_the_engine_has_it(scheduler, story):
    scheduler.put_sample(story.sample("s", 10**9))
    scheduler.cancel_sample("s")
    scheduler.start()
    story.wait("s")

    assert isinstance(story.outcomes["s"], Cancelled)


def test_a_sample_can_be_cancelled_just_when_what_it_waited_for_has_come(scheduler, story, engine):
    """It is not with the engine then, and does not wait any more either."""
    here, left = Future(), []
    here.set_result(None)

    def submit(engine):
        yield Wait(here, lambda: "its base model", lambda: left.append("s"))
        engine.waiting["s"] = 10**9

    scheduler.put_sample(SampleJob("s", submit, story.finish("s"), lambda engine: None))
    scheduler.cancel_sample("s")
    scheduler.start()
    story.wait("s")

    assert isinstance(story.outcomes["s"], Cancelled)
    assert (["s"], {}) == (left, engine.waiting)
    assert scheduler.is_settled


def test_a_broken_sampling_step_fails_what_runs_and_nothing_else(scheduler, story, engine):
    scheduler.open_line("m")
    engine.broken = RuntimeError("bug")
    scheduler.start()
    scheduler.put_sample(story.sample("s"))
    story.wait("s")
    engine.broken = None
    scheduler.put_sample(story.sample("t"))
    scheduler.put("m", 0, story.job("j"))
    story.wait("t", "j")

    assert "bug" == str(story.outcomes["s"])
    assert "sample t" == story.outcomes["t"]


def test_chores_come_first_but_after_what_was_asked_before(scheduler, story, engine):
    """When a chore closes a sampler, its samples are cancelled already."""
    scheduler.put_sample(story.sample("s", 10**9))
    scheduler.cancel_sample("s")
    scheduler.put_chore(lambda engine: story.log.append("chore"))
    scheduler.put_chore(lambda engine: 1 / 0)
    scheduler.start()
    story.wait("s")
    done = threading.Event()
    scheduler.put_chore(lambda engine: done.set())

    assert done.wait(5)
    assert ["after s", "chore"] == story.log


def test_without_an_engine_nothing_is_run_and_the_reason_is_kept(story):
    """Waiting jobs do not fail: a restart with a working engine can run them."""
    told = []

    def broken():
        raise ImportError("no torch")

    scheduler = Scheduler(broken, lambda: told.append(scheduler.failure))
    scheduler.open_line("m")
    scheduler.put("m", 0, story.job("early"))
    scheduler.start()
    scheduler.ready.wait(5)
    scheduler.put("m", 1, story.job("late"))

    assert scheduler.close(5)
    assert not scheduler.alive
    assert "no torch" == str(told[0])
    assert {} == story.outcomes


def test_a_fault_of_its_own_ends_the_thread_rather_than_run_something_twice(story):
    """For example if the result of a job cannot be passed on."""
    failed = threading.Event()
    scheduler = Scheduler(Engine, failed.set)
    scheduler.open_line("m")

    def finish(outcome):
        raise RuntimeError("cannot tell")

    scheduler.put("m", 0, Job(story.job("j").steps, finish))
    scheduler.start()

    assert failed.wait(5)
    assert "cannot tell" == str(scheduler.failure)
    assert ["j"] == story.log


def test_closing_does_not_wait_for_what_is_queued(scheduler, story):
    """It waits only for the current slice."""
    hold = threading.Event()
    scheduler.open_line("m")
    scheduler.put("m", 0, story.job("long", 1000, hold=hold))
    scheduler.start()
    scheduler.ready.wait(5)
    closed_early = scheduler.close(0.05)
    hold.set()

    assert not closed_early
    assert scheduler.close(5)
    assert len(story.log) < 1000


def test_a_line_that_is_closed_is_not_closed_twice(scheduler, story):
    """A second unload is answered, not left waiting."""
    scheduler.open_line("m")
    scheduler.start()
    scheduler.put_last("m", story.job("first"))
    story.wait("first")
    scheduler.put_last("m", story.job("second"))
    story.wait("second")
    scheduler.put("m", 0, story.job("late"))
    story.wait("late")

    assert isinstance(story.outcomes["second"], LineClosed)
    assert "unloaded before operation 0 arrived" in str(story.outcomes["late"])


def test_while_the_engine_starts_that_is_why_everything_waits():
    """And not an operation that has not arrived."""
    started = threading.Event()

    def make():
        started.wait(5)
        return Engine()

    scheduler = Scheduler(make)
    scheduler.open_line("m", 1)
    scheduler.start()
    try:
        assert (0, "the engine is starting") == scheduler.place("m", 2)
        assert "the engine is starting" == scheduler.sample_place("t")
    finally:
        started.set()
        assert scheduler.ready.wait(5)
        place = scheduler.place("m", 2), scheduler.place("gone", 1), scheduler.sample_place("t")
        scheduler.close(5)

    assert (1, "operation 1 has not arrived yet") == place[0]
    assert (0, "running") == place[1]
    assert "the sample request is waiting or running" == place[2]
