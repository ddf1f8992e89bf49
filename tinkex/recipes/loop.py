"""The training loop that the recipes share: steps, evaluations, samples and checkpoints.

All are jobs in one queue; the next job is submitted before the previous one is awaited, so the
server never idles. A step depends only on its number, so a run resumed from a checkpoint ends with
the same weights as an uninterrupted one. Does not know what is trained: that is the recipe's
`Objective`. Does not know about the command line, the terminal or signals.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import Any, Protocol

import attrs

from tinkex import errors, types
from tinkex.data.split import Plan
from tinkex.recipes.callbacks import Callbacks, Checkpoint, Sample
from tinkex.recipes.page_metrics import PageMetrics
from tinkex.recipes.run import Run
from tinkex.recipes.run_folder import RowFile, State, save_state
from tinkex.sampling import SamplingClient
from tinkex.service import ServiceClient
from tinkex.training import TrainingClient

#: Jobs submitted but not yet awaited.
IN_FLIGHT = 2
#: Tokens of each shown completion.
SHOWN_TOKENS = 64
#: Default number of checkpoints and evaluations in a run.
PARTS = 10
#: Steps over which the speed is averaged: the results of two steps can arrive together.
SPEED_STEPS = 8
#: Time limit, in seconds, for the checkpoint when the run is stopped.
STOP_SECONDS = 3.5
#: Seconds between two checks whether to stop the run.
LOOK_SECONDS = 0.1
#: A run has diverged when its loss exceeds the first one by this factor for this many steps.
DIVERGED_FACTOR, DIVERGED_STEPS = 3.0, 20

Guard = Callable[[], AbstractContextManager[Callable[[], bool]]]

logger = logging.getLogger("tinkex")


class DivergedError(ArithmeticError, ValueError):
    """The training loss diverged. The message names the step and the learning rate."""


class Stopped(Exception):
    """Raised inside the training loop to end it early."""


class Report(Protocol):
    """Displays the progress of a run. Events come in this order; `say` at any time."""

    def say(self, text: str) -> None: ...

    def rendered(self, done: int, total: int) -> None: ...

    def begin(self, step: int, total_steps: int) -> None: ...

    def row(self, row: dict[str, float]) -> None: ...

    def end(self) -> None: ...


@attrs.frozen
class Work:
    """Requests that were submitted, and how their results become metrics.

    Attributes:
        read: turns the results of *futures*, in order, into metrics of the row.
        tokens: number of tokens in the requests, for tokens_per_second.
    """

    futures: Sequence[Future[Any]]
    read: Callable[[list[Any]], dict[str, float]]
    tokens: int = 0


@attrs.frozen
class Prompt:
    """Tokens to continue, and their text for display."""

    tokens: types.ModelInput
    text: str
    stop: Any = None


class Objective(Protocol):
    """What a recipe trains and evaluates; recipes differ only in this.

    Attributes:
        examples: number of training examples; steps receive their positions, from 0.
        is_evaluated: True if there are held-out examples.
        falls: True if the loss falls as the model learns, so that a loss far above the first one
            means divergence.
        shown: held-out prompts whose completions are stored, before and after training.
        prompts: the settings' prompts, sampled during training.
    """

    examples: int
    is_evaluated: bool
    falls: bool
    shown: Sequence[Prompt]
    prompts: Sequence[Prompt]

    def train(self, training: TrainingClient, batches: Sequence[Sequence[int]]) -> Work:
        """Submit forward and backward passes of *batches*, which make one optimizer step.

        `read` returns "train_loss" and the other metrics of the step's row.
        """

    def evaluate(self, training: TrainingClient) -> Iterator[Work]:
        """Submit the evaluation in parts. `read` of the last part returns "eval_loss" and more."""


# Submitted requests, and what to do with their results once all have arrived.
_Job = tuple[Sequence[Future[Any]], Callable[[list[Any]], None]]


class Loop:
    """One run: submits its jobs, `IN_FLIGHT` at a time, and records their results."""

    def __init__(
        self,
        service: ServiceClient,
        training: TrainingClient,
        tokenizer: Any,
        objective: Objective,
        state: State,
        run: Run,
        report: Report,
        callbacks: Callbacks,
    ) -> None:
        self.service, self.training, self.tokenizer = service, training, tokenizer
        self.objective, self.settings, self.folder = objective, state.settings, run.folder
        self.run_object, self.report, self.callbacks = run, report, callbacks
        self.page = PageMetrics(service, training.model_id)
        settings = state.settings
        self.plan = Plan(
            objective.examples,
            settings.batch_size * settings.gradient_accumulation,
            settings.epochs,
            settings.seed,
            settings.max_steps,
        )
        self.total = self.plan.total_steps
        part = max(1, self.total // PARTS)
        self.save_every = settings.save_every or part
        self.eval_every = settings.eval_every or part
        self.generate_every = settings.generate_every or part
        self.state = attrs.evolve(state, total_steps=self.total)
        self.trained = state.step  # the last step submitted
        self.metrics = RowFile(self.folder, state.step)
        self.samples = RowFile(self.folder, state.step, "samples.jsonl")
        self._row: dict[str, float] | None = None  # of a step whose evaluation is in progress
        self._clock = time.monotonic()
        self._speed: deque[tuple[int, float]] = deque(maxlen=SPEED_STEPS)
        self._is_stopped: Callable[[], bool] = lambda: False
        self.is_over = self._has_lost_patience()

    def run(self, is_stopped: Callable[[], bool]) -> bool:
        """Train; return True at the end, False if stopped earlier (after saving a checkpoint)."""
        in_flight: deque[_Job] = deque()
        self.report.begin(self.state.step, self.total)
        self._note()
        self.callbacks.start(self.run_object)
        try:
            self._is_stopped = is_stopped
            if self.state.before is None:
                self._show_before()
            for job in self._jobs():
                in_flight.append(job)
                if is_stopped():
                    raise Stopped
                if len(in_flight) >= IN_FLIGHT:
                    self._settle(in_flight)
            while in_flight:
                self._settle(in_flight)
        except Stopped:
            self._save_what_there_is(in_flight)
            return False
        finally:
            self._close_row()
            self.report.end()
            self.metrics.close()
            self.samples.close()
        self.page.flush()
        return True

    # Jobs, in the order in which the server runs them

    def _jobs(self) -> Iterator[_Job]:
        """The jobs in order; taking one from the iterator submits it."""
        done = self.state.step
        if self._evaluates(done) and self._reopened_row(done):
            yield from self._evaluate()
        if self._generates(done) and all(row["step"] != done for row in self.samples.rows):
            yield self._generate(done)
        for step in range(done + 1, self.total + 1):
            if self.is_over:
                return
            yield self._train(step)
            if self._evaluates(step):
                yield from self._evaluate()
            if self._generates(step):
                yield self._generate(step)
            if self._saves(step):
                yield self._save(step)

    def _evaluates(self, step: int) -> bool:
        return self.objective.is_evaluated and (step % self.eval_every == 0 or step == self.total)

    def _generates(self, step: int) -> bool:
        is_due = step % self.generate_every == 0 or step == self.total
        return bool(self.objective.prompts) and is_due

    def _saves(self, step: int) -> bool:
        is_due = step % self.save_every == 0 or step == self.total
        return is_due or (self.settings.tracks_best and self._evaluates(step))

    def _reopened_row(self, step: int) -> bool:
        """True if *step* must still be evaluated: at the start, or after a stop at that step."""
        if not self.metrics.rows:
            self._row = {"step": step}
        elif "eval_loss" not in self.metrics.rows[-1]:
            self._row = self.metrics.pop()
        return self._row is not None

    def _train(self, step: int) -> _Job:
        size = self.settings.batch_size
        chosen = self.plan.batch(step)
        batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        adam = self.settings.adam_at(step, self.total)
        work = self.objective.train(self.training, batches)
        futures = (*work.futures, self.training.optim_step(adam))
        self.trained = step

        def settled(results: list[Any]) -> None:
            if self.is_over:
                return  # submitted before the evaluation that ended the run had arrived
            row = {"step": step, **work.read(results[:-1])}
            self._speed.append((work.tokens, self._lap()))
            tokens, seconds = map(sum, zip(*self._speed))
            row["tokens_per_second"] = tokens / seconds
            row["learning_rate"] = adam.learning_rate
            self._row = row
            if not self._evaluates(step):
                self._close_row()
            self._check_convergence(row)

        return futures, settled

    def _evaluate(self) -> Iterator[_Job]:
        """Evaluate the held-out examples, with the weights after the jobs submitted so far."""
        for work in self.objective.evaluate(self.training):

            def settled(results: list[Any], work: Work = work) -> None:
                found = work.read(results)
                self._lap()
                if found and self._row is not None:
                    self._row.update(found)
                    self._close_row()
                    self.is_over = self._has_lost_patience()
                    if self.is_over:
                        self._say_it_ends_early()

            yield work.futures, settled

    def _generate(self, step: int) -> _Job:
        future = self.training.save_weights_and_get_sampling_client()

        def settled(results: list[Any]) -> None:
            sampler = results[0]
            if not self.is_over:
                prompts = self.objective.prompts
                self._record_samples(step, prompts, self._say(sampler, prompts))
            sampler.close()
            self._lap()

        return (future,), settled

    def _save(self, step: int) -> _Job:
        future = self.training.save_state(f"step-{step:06d}")

        def settled(results: list[Any]) -> None:
            self._lap()
            self._note_checkpoint(step, results[0].path)

        return (future,), settled

    # Results

    def _settle(self, in_flight: deque[_Job]) -> None:
        futures, settled = in_flight[0]
        results = [result_of(future, self._is_stopped) for future in futures]
        in_flight.popleft()
        settled(results)

    def _lap(self) -> float:
        """Seconds since the previous job finished."""
        before, self._clock = self._clock, time.monotonic()
        return max(self._clock - before, 1e-9)

    def _close_row(self) -> None:
        """Write the open row, when it is complete or the run ends."""
        row, self._row = self._row, None
        if row is None or len(row) == 1:
            return
        self.metrics.append(row)
        self.report.row(row)
        self.page.add(row)
        evaluated = {key: value for key, value in row.items() if key.startswith("eval_")}
        trained = {key: value for key, value in row.items() if key not in evaluated}
        if len(trained) > 1:
            self.callbacks.step(self.run_object, trained)
        if evaluated:
            self.callbacks.eval(self.run_object, {"step": row["step"], **evaluated})

    def _record_samples(self, step: int, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
        said = [Sample(step, prompt.text, text) for prompt, text in zip(prompts, texts)]
        for sample in said:
            self.samples.append(attrs.asdict(sample))
        self.page.add_samples([types.RunSample(step, one.prompt, one.text) for one in said])
        self.callbacks.sample(self.run_object, said)

    def _check_convergence(self, row: dict[str, float]) -> None:
        """
        Raise DivergedError if the loss is not finite, or far above the first one for many steps.

        No checkpoint follows, so that the last one stays usable.
        """
        losses = [r["train_loss"] for r in [*self.metrics.rows, row] if "train_loss" in r]
        recent = losses[-DIVERGED_STEPS:] if self.objective.falls else []
        is_high = [loss > DIVERGED_FACTOR * losses[0] for loss in recent]
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

    # Early stopping, and which checkpoints are kept

    def _evaluated(self) -> dict[int, float]:
        """Step -> held-out loss, without the untrained model's."""
        rows = self.metrics.rows
        return {int(r["step"]): r["eval_loss"] for r in rows if "eval_loss" in r and r["step"]}

    def _has_lost_patience(self) -> bool:
        losses = list(self._evaluated().values())
        if self.settings.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.settings.patience

    def _say_it_ends_early(self) -> None:
        losses = self._evaluated()
        best = min(losses, key=losses.__getitem__)
        self.report.say(
            f"The held-out loss has not fallen for {self.settings.patience} evaluations; the run "
            f"ends with the weights of step {best} (loss {losses[best]:.4f})."
        )

    def _note_checkpoint(self, step: int, path: str) -> None:
        """Record the checkpoint, and delete those beyond the `keep` setting."""
        saved = [*map(tuple, self.state.checkpoints), (step, path)]
        known = dict(saved)
        if self.state.best is not None:
            known[self.state.best["step"]] = self.state.best["path"]
        losses = {s: loss for s, loss in self._evaluated().items() if s in known}
        best = None
        if losses:
            best_step = min(losses, key=losses.__getitem__)
            best = {"step": best_step, "path": known[best_step], "eval_loss": losses[best_step]}
        newest = saved[-self.settings.keep :] if self.settings.keep else saved
        kept = [[s, p] for s, p in saved if (s, p) in newest or (best and p == best["path"])]
        self._note(step=step, checkpoint=path, checkpoints=kept, best=best)
        self.callbacks.save(self.run_object, Checkpoint(step, path))
        for _, old in saved:
            if all(old != p for _, p in kept):
                self._delete(old)

    def _delete(self, path: str) -> None:
        """Delete a checkpoint that state.json no longer names. A failure does not end the run."""
        try:
            self.service.create_rest_client().delete_checkpoint_from_tinker_path(path)
        except errors.TinkexError as exc:
            logger.warning("The old checkpoint %s could not be deleted: %s", path, exc)

    def _note(self, **changes: Any) -> None:
        self.state = attrs.evolve(self.state, **changes)
        save_state(self.folder, self.state)

    def _save_what_there_is(self, in_flight: deque[_Job]) -> None:
        """Save a checkpoint of the last submitted step, if the server manages it in time."""
        deadline = time.monotonic() + STOP_SECONDS
        self._is_stopped = lambda: time.monotonic() > deadline
        try:
            while in_flight or self.state.step < self.trained:
                if not in_flight:
                    in_flight.append(self._save(self.trained))
                self._settle(in_flight)
        except Stopped:
            if self.state.step < self.trained:
                self.report.say(
                    f"The server did not save step {self.trained} within {STOP_SECONDS} s; "
                    f"the last checkpoint is of step {self.state.step}."
                )

    # Samples

    def _show_before(self) -> None:
        if self.objective.shown:
            sampler = self.training.save_weights_and_get_sampling_client_sync()
            self._note(
                before=self._say(sampler, self.objective.shown),
                prompts=[prompt.text for prompt in self.objective.shown],
            )

    def _say(self, sampler: SamplingClient, prompts: Sequence[Prompt]) -> list[str]:
        # A temperature between 0 and 1: greedy samples of a small model repeat one word.
        futures = [
            sampler.sample(
                prompt.tokens,
                num_samples=1,
                sampling_params=types.SamplingParams(
                    max_tokens=SHOWN_TOKENS, temperature=0.5, seed=0, stop=prompt.stop
                ),
            )
            for prompt in prompts
        ]
        responses = [result_of(future, self._is_stopped) for future in futures]
        return [decode(self.tokenizer, response.sequences[0].tokens) for response in responses]

    def finish(self) -> None:
        """Save the final weights, download the adapter, and sample from the trained model."""
        self._is_stopped = lambda: False
        best = self.state.best
        if self.settings.tracks_best and best is not None and best["step"] != self.trained:
            self.training.load_state(best["path"]).result()
        saved = self.training.save_weights_for_sampler("final").result()
        if saved.path is None:
            raise errors.APIResponseValidationError(
                "the server's answer to a save contains no path."
            )
        after: list[str] = []
        if self.objective.shown:
            sampler = self.service.create_sampling_client(model_path=saved.path)
            after = self._say(sampler, self.objective.shown)
        adapter = self.service.create_rest_client().download_checkpoint(
            saved.path, self.folder / "adapter", force=True
        )
        self._note(sampler_path=saved.path, after=after)
        self.callbacks.save(
            self.run_object, Checkpoint(self.state.step, saved.path, "sampler", str(adapter))
        )


def result_of(future: Future[Any], is_stopped: Callable[[], bool]) -> Any:
    """The result of *future*; raises `Stopped` if the run is stopped before it arrives."""
    while not wait([future], timeout=LOOK_SECONDS).done:
        if is_stopped():
            raise Stopped
    return future.result()


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of *tokens*, without special tokens."""
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text
