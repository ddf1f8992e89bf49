"""The compute thread: only it uses the engine, and it decides what runs next.

Each model has a queue (a line): its jobs run one at a time in the order of their numbers, without
gaps; an early job waits until those before it have arrived. Lines and sampling share the thread
fairly by time: training and sampling get half each while both have work, and the lines share
training's half. A job can be interrupted at every `yield`, so small jobs do not wait for big ones.

A job that waits, for a file for example, yields a `Wait`: it is parked, and others run until the
wait is done. States of a line: open; closing (a last job waits for those before it); removed. Does
not know about HTTP, users, files, or what a job computes; takes callables.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any

import attrs

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class Wait:
    """An event that a job waits for without using the compute thread.

    Attributes:
        done: the job is parked until this future ends, with or without an error.
        describe: the reason and progress of the wait, for clients that wait for the job.
        leave: called once when the job no longer waits, because it continues or was cancelled.
    """

    done: Future[Any]
    describe: Callable[[], str]
    leave: Callable[[], None] = lambda: None


Steps = Generator[Wait | None, None, Any]


@attrs.define(eq=False)
class Job:
    """One operation.

    Attributes:
        steps: called with the engine when the job starts; a generator that yields None where other
            work may run first, or yields a `Wait`, and returns the result.
        finish: called once, on the compute thread, with the result or the exception.
        after: called with the engine after `finish`, for work that no client waits for.
        size: bytes of memory that it holds while it waits.
    """

    steps: Callable[[Any], Steps]
    finish: Callable[[Any], None]
    after: Callable[[Any], None] | None = None
    size: int = 0


@attrs.define(eq=False)
class SampleJob:
    """One sample request.

    Attributes:
        ticket: its id in the engine.
        submit: called with the engine; submits the request under that ticket. A generator if it
            must wait first.
        finish: called once, on the compute thread, with the response or the exception.
        after: called with the engine after `finish`, if the request had been submitted.
    """

    ticket: str
    submit: Callable[[Any], Steps | None]
    finish: Callable[[Any], None]
    after: Callable[[Any], None]
    steps: Steps | None = None


@attrs.frozen
class Load:
    """The load of the compute thread.

    Attributes:
        running: the line that ran last, if it has more work.
        waiting: number of waiting and running jobs of each line, without idle lines.
        samples: number of waiting and running sample requests.
    """

    running: str | None
    waiting: dict[str, int]
    samples: int


class Cancelled(ValueError):
    """The job was cancelled."""


class LineClosed(ValueError):
    """The job's model was unloaded before the job ran."""


@attrs.define(eq=False)
class _Line:
    next_seq: int
    waiting: dict[int, Job] = attrs.field(factory=dict)
    running: tuple[Job, Steps] | None = None
    last: Job | None = None
    used: float = 0.0  # seconds of compute time, for fairness
    parked: Wait | None = None
    cancelled: bool = False

    @property
    def ready(self) -> bool:
        if self.parked is not None:
            return False
        return self.running is not None or self.next_seq in self.waiting or self.last is not None

    def take(self) -> Job | None:
        """The next job; the closing job only if no other can run."""
        job = self.waiting.pop(self.next_seq, None)
        if job is not None:
            self.next_seq += 1
        return job or self.last


class Scheduler:
    """Runs jobs on one thread, from `start` to `close`.

    `make_engine` is called on that thread, because imports take seconds; jobs wait for it. If it
    raises, `failure` holds the exception, `on_failure` is called there, and no job runs: after a
    restart with a working engine they still can.
    """

    def __init__(
        self,
        make_engine: Callable[[], Any],
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make_engine = make_engine
        self._on_failure = on_failure
        self._clock = clock
        self._engine: Any = None
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tinkex-compute", daemon=True)
        self._changed = threading.Condition()  # guards everything below
        self._lines: dict[str, _Line] = {}
        self._active: dict[str, _Line] = {}  # lines with a job that can run
        self._chores: deque[Callable[[Any], None]] = deque()
        self._new_samples: dict[str, SampleJob] = {}
        self._parked: dict[str, tuple[SampleJob, Wait]] = {}
        self._cancelled: list[str] = []
        self._samples: dict[
            str, SampleJob
        ] = {}  # submitted to the engine; used by the compute thread only
        self._train_used = self._sample_used = 0.0
        self._served: str | None = None
        self._turns = 0
        self._stopping = False

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float | None = None) -> bool:
        """Stop after the current slice. False if it still runs after *timeout* seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """True if jobs run, or will run once the engine has started."""
        return self._thread.is_alive() and self.failure is None

    def open_line(self, line_id: str, next_seq: int = 0) -> None:
        """Create the line of a model; its first job has the number *next_seq*."""
        with self._changed:
            self._lines.setdefault(line_id, _Line(next_seq))

    def drop_line(self, line_id: str) -> None:
        """Remove an empty line."""
        with self._changed:
            self._lines.pop(line_id, None)

    def put(self, line_id: str, seq: int, job: Job) -> None:
        """Queue *job* after the line's jobs with lower numbers. Each number must be used once."""
        with self._changed:
            line = self._lines.get(line_id)
            if line is not None and line.last is None:
                line.waiting[seq] = job
                self._wake(line_id, line)
                return
        job.finish(LineClosed(f"model {line_id} was unloaded before operation {seq} arrived."))

    def put_last(self, line_id: str, job: Job) -> None:
        """Run *job* when the line has nothing else to run, then remove the line."""
        with self._changed:
            line = self._lines.get(line_id)
            if line is not None and line.last is None:
                line.last = job
                self._wake(line_id, line)
                return
        job.finish(LineClosed(f"model {line_id} was unloaded already."))

    def put_sample(self, job: SampleJob) -> None:
        with self._changed:
            self._new_samples[job.ticket] = job
            self._changed.notify()

    def cancel_sample(self, ticket: str) -> None:
        """Cancel a sample request; unless it has ended, it ends with `Cancelled`."""
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify()

    def cancel_parked(self, line_id: str, seq: int) -> None:
        """Cancel job *seq* if it is parked; it ends with `Cancelled`. Running jobs continue."""
        with self._changed:
            line = self._lines.get(line_id)
            wait = None if line is None or seq != line.next_seq - 1 else line.parked
        if line is not None and wait is not None:
            self._unpark(line_id, line, wait, cancelled=True)

    def put_chore(self, chore: Callable[[Any], None]) -> None:
        """Call *chore* with the engine before the next slice."""
        with self._changed:
            self._chores.append(chore)
            self._changed.notify()

    def next_seq(self, line_id: str) -> int | None:
        """The number that the line runs or waits for next; None if there is no such line."""
        with self._changed:
            line = self._lines.get(line_id)
            return None if line is None else line.next_seq

    def is_active(self, line_id: str) -> bool:
        """True if the line has a job that can run."""
        with self._changed:
            return line_id in self._active

    def load(self) -> Load:
        with self._changed:
            waiting = {
                line_id: len(line.waiting) + (line.running is not None) + (line.last is not None)
                for line_id, line in self._lines.items()
            }
            samples = len(self._samples) + len(self._new_samples)
            running = self._served if self._served in self._active else None
        return Load(running, {name: count for name, count in waiting.items() if count}, samples)

    def place(self, line_id: str, seq: int) -> tuple[int, str]:
        """How many jobs are ahead of number *seq*, and the reason why it waits."""
        with self._changed:
            line = self._lines.get(line_id)
            if not self.ready.is_set():
                return 0, "the engine is starting"
            if line is None:
                return 0, "running"
            if line.parked is not None:
                return max(0, seq - line.next_seq + 1), line.parked.describe()
            if seq < line.next_seq:
                return 0, "running"
            for missing in range(line.next_seq, seq):
                if missing not in line.waiting:
                    return seq - line.next_seq, f"operation {missing} has not arrived yet"
            ahead = seq - line.next_seq + (line.running is not None)
            return ahead, f"{ahead} operations of this model are ahead"

    def sample_place(self, ticket: str) -> str:
        """The reason why a sample request waits."""
        with self._changed:
            if not self.ready.is_set():
                return "the engine is starting"
            parked = self._parked.get(ticket)
            if parked is None:
                return "the sample request is waiting or running"
            return parked[1].describe()

    def _unpark(self, line_id: str, line: _Line, wait: Wait, *, cancelled: bool = False) -> None:
        """Let a parked job run again. Called from any thread, without the lock."""
        with self._changed:
            if line.parked is not wait:
                return
            line.parked, line.cancelled = None, cancelled
            self._wake(line_id, line)
        wait.leave()

    def _unpark_sample(self, ticket: str) -> None:
        with self._changed:
            job, wait = self._parked.pop(ticket, (None, None))
            if job is not None:
                self._new_samples[ticket] = job
                self._changed.notify()
        if wait is not None:
            wait.leave()

    @property
    def turns(self) -> int:
        """The number of slices of jobs and samples run so far; unchanged if nothing ran."""
        return self._turns

    @property
    def is_settled(self) -> bool:
        """True if nothing can run until something new arrives."""
        with self._changed:
            parked = self._parked or any(line.parked for line in self._lines.values())
            return not (self._active or self._has_samples() or parked)

    # What follows runs on the compute thread.

    def _wake(self, line_id: str, line: _Line) -> None:
        """Called with the lock held."""
        # The active line with that id may be a removed one that has not ended yet.
        if line.ready and self._active.get(line_id) is not line:
            if self._active:
                line.used = max(line.used, min(other.used for other in self._active.values()))
            self._active[line_id] = line
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._engine = self._make_engine()
        except ValueError as exc:  # an invalid setting: the caller reports it
            self.failure = exc
            self._on_failure()
        except BaseException as exc:
            self._fail(exc)
        self.ready.set()
        while self.failure is None:
            with self._changed:
                while not self._stopping and not self._has_work():
                    self._changed.wait()
                if self._stopping:
                    return
                turn = self._choose()
            try:
                turn()
            except BaseException as exc:
                # A bug in the scheduler, not a failed job: continuing could run a job twice.
                self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        logger.critical(
            "The compute thread has failed, and no operation runs any more: %s", exc, exc_info=exc
        )
        self.failure = exc
        self._on_failure()

    def _has_work(self) -> bool:
        return bool(self._chores or self._active or self._cancelled or self._has_samples())

    def _has_samples(self) -> bool:
        return bool(self._new_samples or self._samples)

    def _choose(self) -> Callable[[], None]:
        """Decide what runs next. Called with the lock held."""
        if self._chores:
            chore = self._chores.popleft()
            return lambda: self._chore_turn(chore)
        self._turns += 1
        sampling = self._has_samples() or bool(self._cancelled)
        if not self._active:
            self._train_used = max(self._train_used, self._sample_used)
            return self._sample_turn
        if not sampling:
            self._sample_used = max(self._train_used, self._sample_used)
        elif self._sample_used <= self._train_used:
            return self._sample_turn
        line_id, line = min(self._active.items(), key=lambda item: item[1].used)
        return lambda: self._train_turn(line_id, line)

    def _chore_turn(self, chore: Callable[[Any], None]) -> None:
        self._submit_and_cancel()  # earlier requests come first
        try:
            chore(self._engine)
        except Exception:
            logger.exception("A background task on the compute thread failed.")

    def _train_turn(self, line_id: str, line: _Line) -> None:
        start = self._clock()
        self._served = line_id
        if line.running is None:
            with self._changed:
                job = line.take()
            if job is None:  # impossible: an active line has a job
                raise RuntimeError(f"line {line_id} is active without a job")
            line.running = (job, job.steps(self._engine))
        job, steps = line.running
        try:
            if line.cancelled:
                line.cancelled = False
                wait = steps.throw(Cancelled("the request was cancelled."))
            else:
                wait = next(steps)
            if wait is not None:
                self._park(line_id, line, wait)
        except StopIteration as stop:
            self._end(line_id, line, job, stop.value)
        except Exception as exc:
            self._end(line_id, line, job, exc)
        spent = self._clock() - start
        line.used += spent
        self._train_used += spent

    def _park(self, line_id: str, line: _Line, wait: Wait) -> None:
        with self._changed:
            line.parked = wait
            del self._active[line_id]
        wait.done.add_done_callback(lambda _: self._unpark(line_id, line, wait))

    def _end(self, line_id: str, line: _Line, job: Job, outcome: Any) -> None:
        job.finish(outcome)
        if job.after is not None:
            job.after(self._engine)
        stranded: Iterable[tuple[int, Job]] = ()
        with self._changed:
            line.running = None
            if job is line.last:
                if self._lines.get(line_id) is line:
                    del self._lines[line_id]
                line.last, stranded, line.waiting = None, line.waiting.items(), {}
            if not line.ready and self._active.get(line_id) is line:
                del self._active[line_id]
        for seq, left in stranded:
            left.finish(LineClosed(f"model {line_id} was unloaded before operation {seq} ran."))

    def _sample_turn(self) -> None:
        start = self._clock()
        self._submit_and_cancel()
        if self._samples:
            try:
                finished = self._engine.sample_step()
            except Exception as exc:
                logger.exception(
                    "A sampling step failed; all running sample requests fail with it."
                )
                finished = [(ticket, exc) for ticket in self._samples]
                self._forget_at_engine(list(self._samples))
            for ticket, outcome in finished:
                self._end_sample(ticket, outcome)
        self._sample_used += self._clock() - start

    def _submit_and_cancel(self) -> None:
        with self._changed:
            new, self._new_samples = self._new_samples, {}
            cancelled, self._cancelled = self._cancelled, []
        for ticket, job in new.items():
            try:
                self._submit(ticket, job)
            except Exception as exc:
                job.finish(exc)
        for ticket in cancelled:
            with self._changed:
                parked, wait = self._parked.pop(ticket, (None, None))
                waiting = parked or self._new_samples.pop(ticket, None)  # unparked just now
            if wait is not None:
                wait.leave()
            if waiting is not None:
                waiting.finish(Cancelled("the request was cancelled."))
            elif ticket in self._samples:
                self._forget_at_engine([ticket])
                self._end_sample(ticket, Cancelled("the request was cancelled."))

    def _submit(self, ticket: str, job: SampleJob) -> None:
        if job.steps is None:
            job.steps = job.submit(self._engine)
        wait = None if job.steps is None else next(job.steps, None)
        if wait is None:
            self._samples[ticket] = job
            return
        with self._changed:
            self._parked[ticket] = job, wait
        wait.done.add_done_callback(lambda _: self._unpark_sample(ticket))

    def _end_sample(self, ticket: str, outcome: Any) -> None:
        job = self._samples.pop(ticket, None)
        if job is not None:
            job.finish(outcome)
            job.after(self._engine)

    def _forget_at_engine(self, tickets: list[str]) -> None:
        for ticket in tickets:
            try:
                self._engine.cancel_sample(ticket)
            except Exception:
                logger.exception("Sample request %s could not be cancelled.", ticket)
