"""The supervised fine-tuning loop: a data file and settings in, a PEFT adapter out.

Steps, evaluations and checkpoints are jobs in one line; the next is submitted before the one
before it is awaited, so the server never waits for us. What a step does depends on its number
alone, so a run that is resumed from a checkpoint ends in the weights of one that was never stopped.
Does not know about the command line, the terminal or signals: it takes a Report and a guard. One
subject in one module, so that a reader sees the whole loop.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from datetime import date as Date
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np

from tinkex import errors, types
from tinkex.data import datums, files
from tinkex.data.split import Plan, split
from tinkex.recipes.run_folder import Metrics, State, check_same, save_state
from tinkex.recipes.settings import Settings
from tinkex.sampling import SamplingClient
from tinkex.service import ServiceClient
from tinkex.text.tokenizer import resolve_base_model
from tinkex.training import TrainingClient

#: Jobs submitted but not yet awaited.
IN_FLIGHT = 2
#: Held-out examples that are evaluated in one request.
EVALUATED_AT_ONCE = 64
#: Held-out examples whose completions are shown before and after.
SHOWN_EXAMPLES = 3
#: Tokens of each shown completion.
SHOWN_TOKENS = 64
#: Checkpoints and evaluations of a run, unless the settings say how often.
PARTS = 10
#: Seconds to save a checkpoint in when the run is stopped.
STOP_SECONDS = 3.5
#: Seconds between two looks at whether the run is to stop.
LOOK_SECONDS = 0.1
#: A run has diverged when its loss was this many times the first one for so many steps.
DIVERGED_FACTOR, DIVERGED_STEPS = 3.0, 20

Guard = Callable[[], AbstractContextManager[Callable[[], bool]]]


class DivergedError(ArithmeticError, ValueError):
    """The training loss diverged. The message names the step and the learning rate."""


@attrs.frozen
class Shown:
    """A held-out prompt and the model's completions of it, at most `SHOWN_TOKENS` tokens."""

    prompt: str
    before: str
    after: str


@attrs.frozen
class Outcome:
    """How a run ended: with an adapter, or stopped before its end (adapter is None)."""

    state: State
    adapter: Path | None = None
    shown: Sequence[Shown] = ()
    losses: tuple[float, float] | None = None  # held out, per token: before, after


class Report(Protocol):
    """Receives the events of a run, in this order; `say` at any time."""

    def say(self, text: str) -> None: ...

    def rendered(self, done: int, total: int) -> None: ...

    def begin(self, step: int, total_steps: int) -> None: ...

    def row(self, row: dict[str, float]) -> None: ...

    def end(self) -> None: ...


# The run


def run(
    service: ServiceClient,
    data: files.DataFile,
    settings: Settings,
    folder: Path,
    report: Report,
    state: State | None = None,
    guard: Guard = lambda: nullcontext(lambda: False),
    *,
    eval_data: files.DataFile | None = None,
    tokenizer: Any = None,
) -> Outcome:
    """
    Train, and put the adapter into *folder*.

    Args:
        state: of the run to resume, from `load_state`; None starts one.
        guard: entered around the training loop; returns a function that is true when the run is to
            stop. Then a checkpoint is saved within `STOP_SECONDS` and the outcome is not finished.
        eval_data: held out instead of a part of *data*.
        tokenizer: the base model's, if it is known before the model is loaded: then bad data is
            refused before that. None asks the server.

    Raises:
        ValueError: If the settings or the data are not those of *state*, or data is bad.
        DivergedError: If the loss is not finite, or stays far above the first one.
        TinkexError: If a request to the server fails.
    """
    settings = _completed(settings, state)
    if state is None:
        state = State(
            settings,
            "\n".join(data.sources),
            data.sha256,
            eval_data="\n".join(eval_data.sources) if eval_data else None,
            eval_sha256=eval_data.sha256 if eval_data else None,
        )
    check_same(state, settings, data, eval_data)
    state = attrs.evolve(state, settings=settings)
    folder.mkdir(parents=True, exist_ok=True)
    prepared = None
    if tokenizer is not None:
        prepared = _prepare(data, eval_data, settings, tokenizer, folder, report)
    save_state(folder, state)
    training = _open(service, state)
    try:
        theirs = training.get_tokenizer()
        if prepared is None or not _is_same(tokenizer, theirs):
            prepared = _prepare(data, eval_data, settings, theirs, folder, report)
        trainer = _Trainer(training, theirs, prepared, state, folder, report)
        with guard() as is_stopped:
            if not trainer.run(is_stopped):
                return Outcome(trainer.state)
        return trainer.finish(service)
    finally:
        training.close()


def _completed(settings: Settings, state: State | None) -> Settings:
    """With the model's absolute path, and the date, so that the run is the same on any day."""
    today = state.settings.date if state is not None else Date.today().isoformat()
    return attrs.evolve(
        settings,
        base_model=resolve_base_model(settings.base_model),
        date=settings.date or today,
    )


def _is_same(ours: Any, theirs: Any) -> bool:
    fingerprint = getattr(ours, "fingerprint", None)
    return ours is theirs or (
        fingerprint is not None and fingerprint == getattr(theirs, "fingerprint", None)
    )


def _open(service: ServiceClient, state: State) -> TrainingClient:
    """A client of a new model, of given weights, or of the last checkpoint with its optimizer."""
    if state.checkpoint is not None:
        return service.create_training_client_from_state_with_optimizer(state.checkpoint)
    settings = state.settings
    start = settings.start_from
    if start is not None and start.startswith("tinker://"):
        return service.create_training_client_from_state(start)
    return service.create_lora_training_client(
        settings.base_model,
        rank=settings.rank,
        seed=settings.seed,
        train_mlp=settings.train_mlp,
        train_attn=settings.train_attn,
        train_unembed=settings.train_unembed,
        adapter=start,
    )


# The data


@attrs.frozen
class _Prepared:
    """The examples to train on and to evaluate on, and what was left out, in words."""

    examples: list[datums.Example]
    held_out: list[datums.Example]
    notes: str


def _prepare(
    data: files.DataFile,
    eval_data: files.DataFile | None,
    settings: Settings,
    tokenizer: Any,
    folder: Path,
    report: Report,
) -> _Prepared:
    """Render the data, or take what an earlier start of this run rendered."""
    rendered = _rendered(data, settings, tokenizer, folder, report)
    if eval_data is not None:
        examples = rendered.examples
        held_out = _rendered(eval_data, settings, tokenizer, folder / "eval", report).examples
    else:
        # Whole conversations are held out: examples of one conversation share most of their tokens.
        owners = sorted({example.record for example in rendered.examples})
        held = {owners[i] for i in split(len(owners), settings.eval_fraction, settings.seed)[1]}
        examples = [e for e in rendered.examples if e.record not in held]
        held_out = [e for e in rendered.examples if e.record in held]
    counts = [
        (len(data.bad) + len(rendered.bad), "bad lines left out"),
        (rendered.truncated, f"cut to --max-length {settings.max_length} tokens"),
        (rendered.dropped, "left out: no token of theirs counts"),
        (rendered.split, "conversations became several examples (see docs/train.md)"),
    ]
    notes = "".join(f"; {count} {what}" for count, what in counts if count)
    return _Prepared(examples, held_out, notes)


def _rendered(
    data: files.DataFile, settings: Settings, tokenizer: Any, folder: Path, report: Report
) -> datums.Rendered:
    folder.mkdir(parents=True, exist_ok=True)
    total = len(data.records)
    rendered = datums.cached(
        folder, data, tokenizer, settings.rendering, lambda done: report.rendered(done, total)
    )
    if rendered.bad and not settings.skip_bad_lines:
        raise files.refuse(data.name, rendered.bad)
    datums.check_some_are_left(rendered, total, settings.max_length)
    return rendered


class _Stopped(Exception):
    """Raised inside the training loop to end it early."""


# What is submitted, and what to do with its results once they are all there.
_Job = tuple[Sequence[Future[Any]], Callable[[list[Any]], None]]


class _Trainer:
    """One run: submits its jobs, `IN_FLIGHT` at a time, and records their results."""

    def __init__(
        self,
        training: TrainingClient,
        tokenizer: Any,
        prepared: _Prepared,
        state: State,
        folder: Path,
        report: Report,
    ) -> None:
        settings = state.settings
        self.tokenizer = tokenizer
        self.examples, self.held_out = prepared.examples, prepared.held_out
        self.plan = Plan(
            len(self.examples),
            settings.batch_size,
            settings.epochs,
            settings.seed,
            settings.max_steps,
        )
        self.total = self.plan.total_steps
        part = max(1, self.total // PARTS)
        self.save_every = settings.save_every or part
        self.eval_every = settings.eval_every or part
        self.training, self.settings, self.folder, self.report = training, settings, folder, report
        self.state = attrs.evolve(state, total_steps=self.total)
        self.trained = state.step  # the last step submitted
        self.metrics = Metrics(folder, state.step)
        self._row: dict[str, float] | None = None  # of a step whose evaluation is under way
        self._eval_sum = 0.0
        self._clock = time.monotonic()
        report.say(
            f"{len(self.examples)} examples to train on, {len(self.held_out)} held out"
            f"{prepared.notes}."
        )

    def run(self, is_stopped: Callable[[], bool]) -> bool:
        """Train; True at the end, False if stopped before it (after saving a checkpoint)."""
        in_flight: deque[_Job] = deque()
        self.report.begin(self.state.step, self.total)
        try:
            if self.state.before is None:
                self._show_before(is_stopped)
            for job in self._jobs():
                in_flight.append(job)
                if is_stopped():
                    raise _Stopped
                if len(in_flight) >= IN_FLIGHT:
                    self._settle(in_flight, is_stopped)
            while in_flight:
                self._settle(in_flight, is_stopped)
        except _Stopped:
            self._save_what_there_is(in_flight)
            return False
        finally:
            self._close_row()
            self.report.end()
            self.metrics.close()
        return True

    # Jobs, in the order in which the server runs them

    def _jobs(self) -> Iterator[_Job]:
        """The jobs in order; taking one from the iterator submits it."""
        done = self.state.step
        if self._evaluates(done) and self._reopened_row(done):
            yield from self._evaluate()
        for step in range(done + 1, self.total + 1):
            yield self._train(step)
            if self._evaluates(step):
                yield from self._evaluate()
            if step % self.save_every == 0 or step == self.total:
                yield self._save(step)

    def _evaluates(self, step: int) -> bool:
        return bool(self.held_out) and (step % self.eval_every == 0 or step == self.total)

    def _reopened_row(self, step: int) -> bool:
        """True if *step* still has to be evaluated: at the start, or after a stop right there."""
        if not self.metrics.rows:
            self._row = {"step": step}
        elif "eval_loss" not in self.metrics.rows[-1]:
            self._row = self.metrics.pop()
        return self._row is not None

    def _train(self, step: int) -> _Job:
        batch = [self.examples[i] for i in self.plan.batch(step)]
        # The mean over the batch's counted tokens: the learning rate then means the same whatever
        # the batch size and the lengths.
        counted = datums.counted_tokens(batch)
        learning_rate = self.settings.learning_rate_at(step, self.total)
        data = [example.datum(1 / counted) for example in batch]
        futures = (
            self.training.forward_backward(data, "cross_entropy"),
            self.training.optim_step(types.AdamParams(learning_rate=learning_rate)),
        )
        self.trained = step

        def settled(results: list[Any]) -> None:
            row = {"step": step, "train_loss": _loss_sum(results[0], batch) / counted}
            seconds = self._lap()
            row["tokens_per_second"] = sum(len(e.tokens) - 1 for e in batch) / seconds
            row["learning_rate"] = learning_rate
            self._row = row
            if not self._evaluates(step):
                self._close_row()
            self._check_convergence(row)

        return futures, settled

    def _evaluate(self) -> Iterator[_Job]:
        """Evaluate the held-out loss, of the weights after the jobs submitted so far."""
        counted = datums.counted_tokens(self.held_out)
        parts = list(datums.slices(self.held_out, EVALUATED_AT_ONCE))

        for number, part in enumerate(parts):
            future = self.training.forward([e.datum() for e in part], "cross_entropy")

            def settled(results: list[Any], number: int = number, part: Any = part) -> None:
                self._eval_sum = (self._eval_sum if number else 0.0) + _loss_sum(results[0], part)
                self._lap()
                if number == len(parts) - 1 and self._row is not None:
                    self._row["eval_loss"] = self._eval_sum / counted
                    self._close_row()

            yield (future,), settled

    def _save(self, step: int) -> _Job:
        future = self.training.save_state(f"step-{step:06d}")

        def settled(results: list[Any]) -> None:
            self._lap()
            self._note(step=step, checkpoint=results[0].path)

        return (future,), settled

    # Results

    def _settle(self, in_flight: deque[_Job], is_stopped: Callable[[], bool]) -> None:
        futures, settled = in_flight[0]
        results = [_result(future, is_stopped) for future in futures]
        in_flight.popleft()
        settled(results)

    def _lap(self) -> float:
        """Seconds since the previous job finished."""
        before, self._clock = self._clock, time.monotonic()
        return max(self._clock - before, 1e-9)

    def _close_row(self) -> None:
        """Write the open row: it is complete, or the run ends."""
        if self._row is not None and len(self._row) > 1:
            self.metrics.append(self._row)
            self.report.row(self._row)
        self._row = None

    def _check_convergence(self, row: dict[str, float]) -> None:
        """
        DivergedError if the loss is not finite, or was far above the first one for long.

        No checkpoint follows, so that the last one is still good.
        """
        losses = [r["train_loss"] for r in [*self.metrics.rows, row] if "train_loss" in r]
        is_high = [loss > DIVERGED_FACTOR * losses[0] for loss in losses[-DIVERGED_STEPS:]]
        if math.isfinite(row["train_loss"]) and not (
            len(is_high) == DIVERGED_STEPS and all(is_high)
        ):
            return
        where = f"; the last checkpoint is of step {self.state.step}" if self.state.step else ""
        raise DivergedError(
            f"the training diverged: loss {row['train_loss']:.4g} at step {row['step']:.0f}, "
            f"{losses[0]:.4g} at the start. The learning rate is "
            f"{self.settings.learning_rate:g}; start again with a tenth of it{where}."
        )

    def _note(self, **changes: Any) -> None:
        self.state = attrs.evolve(self.state, **changes)
        save_state(self.folder, self.state)

    def _save_what_there_is(self, in_flight: deque[_Job]) -> None:
        """Save a checkpoint of the last submitted step, if the server does so in time."""
        deadline = time.monotonic() + STOP_SECONDS
        try:
            while in_flight or self.state.step < self.trained:
                if not in_flight:
                    in_flight.append(self._save(self.trained))
                self._settle(in_flight, lambda: time.monotonic() > deadline)
        except _Stopped:
            self.report.say(
                f"The server did not save step {self.trained} within {STOP_SECONDS} s; "
                f"the last checkpoint is of step {self.state.step}."
            )

    # Samples

    def _show_before(self, is_stopped: Callable[[], bool]) -> None:
        if not self.held_out:
            return
        sampler = self.training.save_weights_and_get_sampling_client_sync()
        self._note(before=self._say(sampler, is_stopped))

    def _say(self, sampler: SamplingClient, is_stopped: Callable[[], bool]) -> list[str]:
        # Half-way to the likeliest token: of a small model that alone is a word over and over.
        params = types.SamplingParams(max_tokens=SHOWN_TOKENS, temperature=0.5, seed=0)
        futures = [
            sampler.sample(example.prompt, num_samples=1, sampling_params=params)
            for example in self.held_out[:SHOWN_EXAMPLES]
        ]
        responses = [_result(future, is_stopped) for future in futures]
        return [self._decode(response.sequences[0].tokens) for response in responses]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def finish(self, service: ServiceClient) -> Outcome:
        """Download the adapter and sample from the trained model."""
        saved = self.training.save_weights_for_sampler("final").result()
        if saved.path is None:
            raise errors.APIResponseValidationError("the server did not say where it saved to.")
        sampler_path = saved.path
        shown = []
        if self.held_out:
            sampler = service.create_sampling_client(model_path=sampler_path)
            after = self._say(sampler, lambda: False)
            prompts = [self._decode(e.prompt.to_ints()) for e in self.held_out]
            shown = [Shown(*words) for words in zip(prompts, self.state.before or [], after)]
        adapter = service.create_rest_client().download_checkpoint(
            sampler_path, self.folder / "adapter", force=True
        )
        self._note(sampler_path=sampler_path)
        evaluated = [row["eval_loss"] for row in self.metrics.rows if "eval_loss" in row]
        losses = (evaluated[0], evaluated[-1]) if evaluated else None
        return Outcome(self.state, adapter=Path(adapter), shown=shown, losses=losses)


def _result(future: Future[Any], is_stopped: Callable[[], bool]) -> Any:
    while not wait([future], timeout=LOOK_SECONDS).done:
        if is_stopped():
            raise _Stopped
    return future.result()


def _loss_sum(output: types.ForwardBackwardOutput, batch: Sequence[datums.Example]) -> float:
    """
    Negative log-likelihood of the counted tokens, summed, in nats.

    From the log-probabilities rather than from `loss:sum`, which some servers leave out of
    forward's answer, and which is weighted.
    """
    return -sum(
        float(np.dot(out["logprobs"].to_numpy().astype(np.float64), example.counted[1:]))
        for out, example in zip(output.loss_fn_outputs, batch)
    )
