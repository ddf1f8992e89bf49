"""The supervised fine-tuning loop: a data file and settings in, a PEFT adapter out.

Steps, evaluations and checkpoints are jobs in one line; the next is submitted before the one
before it is awaited, so the server never waits for us. What a step does depends on its number
alone, so a run that goes on from a checkpoint ends in the weights of one that was never stopped.
Knows nothing of the command line, the terminal or signals: it is handed a Report and a guard.

In the run's folder:
  metrics.jsonl   one object a step, from step 0, the evaluation before training
  state.json      the settings, and the last checkpoint (replaced as a whole, never half-written)
  adapter/        at the end: adapter_config.json and adapter_model.safetensors, as PEFT has them
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

import attrs
import numpy as np

from tinkex import errors, types
from tinkex.data import records
from tinkex.sampling import SamplingClient
from tinkex.service import ServiceClient
from tinkex.training import TrainingClient

Schedule = Literal["constant", "linear", "cosine"]

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

Guard = Callable[[], AbstractContextManager[Callable[[], bool]]]


@attrs.frozen
class Settings:
    """What a run was asked for. A resumed run must have the same, but for what is `_FREE`.

    Args:
        learning_rate: of AdamW, at its highest.
        schedule: "constant", or falling to 0 at the last step, "linear"ly or as a "cosine".
        warmup_steps: over which the learning rate first rises from 0.
        max_steps: where to stop if the epochs are not over; None lets them end.
        max_length: tokens of an example that are read.
        eval_fraction: of the examples, held out and never trained on.
        skip_bad_lines: of the data file, instead of refusing it.
        eval_every, save_every: steps between two evaluations, two checkpoints; None is a tenth
            of the run. The end of the run has both in any case.
    """

    base_model: str
    rank: int = 32
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    batch_size: int = 32
    epochs: int = 1
    max_steps: int | None = None
    max_length: int = 1024
    seed: int = 0
    eval_fraction: float = 0.05
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    skip_bad_lines: bool = False
    eval_every: int | None = None
    save_every: int | None = None

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Of *step*, from 1. Depends on nothing else, so that a resumed run has the same."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        factors = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }
        return self.learning_rate * factors[self.schedule]


#: Settings that do not decide the result.
_FREE = {"eval_every", "save_every"}


@attrs.frozen
class State:
    """Where a run stands: what state.json holds.

    Attributes:
        checkpoint: path on the server of the last checkpoint; None before the first.
        step: after which it was saved.
        before: what the untrained model said to the shown prompts; None until it was asked.
        sampler_path: path on the server of the final weights; None until the run is finished.
    """

    settings: Settings
    data: str
    data_sha256: str
    total_steps: int = 0
    step: int = 0
    checkpoint: str | None = None
    before: list[str] | None = None
    sampler_path: str | None = None

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to go on with: the server had taken the model."""
        return self.total_steps > 0

    @property
    def is_finished(self) -> bool:
        return self.sampler_path is not None


@attrs.frozen
class Shown:
    """A held-out prompt and what the model said to it, at most `SHOWN_TOKENS` tokens."""

    prompt: str
    before: str
    after: str


@attrs.frozen
class Outcome:
    """How a run ended: with an adapter, or stopped (adapter None) and to be gone on with."""

    state: State
    adapter: Path | None = None
    shown: Sequence[Shown] = ()
    losses: tuple[float, float] | None = None  # held out, per token: before, after


class Report(Protocol):
    """Who hears how the run goes."""

    def say(self, text: str) -> None: ...

    def begin(self, step: int, total_steps: int) -> None: ...

    def row(self, row: dict[str, float]) -> None: ...

    def end(self) -> None: ...


# The run's folder


def load_state(folder: Path) -> State | None:
    """
    The state of the run in *folder*, or None if there is none.

    Raises:
        ValueError: If state.json is not what this version writes.
    """
    path = folder / "state.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return State(**{**value, "settings": Settings(**value["settings"])})
    except (ValueError, TypeError, KeyError) as exc:
        raise ValueError(
            f"{path} is not a run's state that this version of tinkex can read ({exc}); "
            "use another --output, or remove it to start again."
        ) from exc


def save_state(folder: Path, state: State) -> None:
    """Replace state.json as a whole: a crash leaves the old one or the new one."""
    new = folder / "state.json.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(attrs.asdict(state), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / "state.json")


class Metrics:
    """metrics.jsonl: rows appended in the order of their steps, each flushed at once."""

    def __init__(self, folder: Path, upto: int) -> None:
        """Keep the rows up to step *upto*, cut off those beyond; `rows` holds what is kept."""
        self.rows: list[dict[str, float]] = []
        self._path = folder / "metrics.jsonl"
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break  # the run was killed in the middle of this line
            if row["step"] <= upto:
                self.rows.append(row)
        self._file = self._rewritten()

    def append(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        print(json.dumps(row), file=self._file, flush=True)

    def pop(self) -> dict[str, float]:
        """Take back the last row, to append it again with more in it."""
        row = self.rows.pop()
        self._file.close()
        self._file = self._rewritten()
        return row

    def close(self) -> None:
        self._file.close()

    def _rewritten(self) -> TextIO:
        """The file, replaced as a whole by one that holds `rows`, open at its end."""
        new = self._path.with_name("metrics.jsonl.new")
        new.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        os.replace(new, self._path)
        return self._path.open("a", encoding="utf-8")


# The run


def run(
    service: ServiceClient,
    data: records.DataFile,
    settings: Settings,
    folder: Path,
    report: Report,
    state: State | None = None,
    guard: Guard = lambda: nullcontext(lambda: False),
) -> Outcome:
    """
    Train, and put the adapter into *folder*.

    Args:
        state: of the run to go on with, from `load_state`; None starts one.
        guard: entered around the training loop, gives what says whether to stop. When it says
            so, a checkpoint is saved within `STOP_SECONDS` and the outcome is not finished.

    Raises:
        ValueError: If the settings or the data are not those of *state*.
        TinkexError: Whatever the server has to say.
    """
    if state is None:
        state = State(settings, str(data.path.absolute()), data.sha256)
    check_same(state, settings, data)
    state = attrs.evolve(state, settings=settings)
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder, state)
    training = _open(service, state)
    try:
        trainer = _Trainer(training, data, state, folder, report)
        with guard() as is_stopped:
            if not trainer.run(is_stopped):
                return Outcome(trainer.state)
        return trainer.finish(service)
    finally:
        training.close()


def check_same(state: State, settings: Settings, data: records.DataFile) -> None:
    """ValueError, naming the flag, if going on from *state* would not be the same run."""
    for field in attrs.fields(Settings):
        was, now = getattr(state.settings, field.name), getattr(settings, field.name)
        if was != now and field.name not in _FREE:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is {now}, but the run to resume has {was}; "
                "leave it away, or start a new run in another --output."
            )
    if state.data_sha256 != data.sha256:
        raise ValueError(
            f"{data.path} is not the data that the run to resume was started with ({state.data}); "
            "bring that back, or start a new run in another --output."
        )


def _open(service: ServiceClient, state: State) -> TrainingClient:
    """Of a new model, or of one with the checkpoint's weights and optimizer."""
    if state.checkpoint is not None:
        return service.create_training_client_from_state_with_optimizer(state.checkpoint)
    settings = state.settings
    return service.create_lora_training_client(
        settings.base_model,
        rank=settings.rank,
        seed=settings.seed,
        train_mlp=settings.train_mlp,
        train_attn=settings.train_attn,
        train_unembed=settings.train_unembed,
    )


class _Stopped(Exception):
    """The run is to stop."""


# What is submitted, and what to do with its results once they are all there.
_Job = tuple[Sequence[Future[Any]], Callable[[list[Any]], None]]


class _Trainer:
    """One run: makes its jobs, keeps `IN_FLIGHT` of them going, and notes what comes back."""

    def __init__(
        self,
        training: TrainingClient,
        data: records.DataFile,
        state: State,
        folder: Path,
        report: Report,
    ) -> None:
        settings = state.settings
        self.tokenizer = training.get_tokenizer()
        rendered = records.render(data.records, self.tokenizer, settings.max_length)
        train, held_out = records.split(
            len(rendered.examples), settings.eval_fraction, settings.seed
        )
        self.examples = [rendered.examples[i] for i in train]
        self.held_out = [rendered.examples[i] for i in held_out]
        self.plan = records.Plan(
            len(train), settings.batch_size, settings.epochs, settings.seed, settings.max_steps
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
        self._describe(data, rendered)

    def _describe(self, data: records.DataFile, rendered: records.Rendered) -> None:
        counts = [
            (len(data.bad), "bad lines left out"),
            (rendered.truncated, f"cut to --max-length {self.settings.max_length} tokens"),
            (rendered.dropped, "left out: no token of theirs counts"),
            (
                rendered.partly_counted,
                "count with their last turn only (see docs/train.md)",
            ),
        ]
        notes = "".join(f"; {count} {what}" for count, what in counts if count)
        self.report.say(
            f"{len(self.examples)} examples to train on, {len(self.held_out)} held out{notes}."
        )

    def run(self, is_stopped: Callable[[], bool]) -> bool:
        """Train to the end: True. If told to stop before: False, after saving what there is."""
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
        """Each is submitted by being asked for."""
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
        """Whether *step* is still to be evaluated: the run begins, or was stopped just there."""
        if not self.metrics.rows:
            self._row = {"step": step}
        elif "eval_loss" not in self.metrics.rows[-1]:
            self._row = self.metrics.pop()
        return self._row is not None

    def _train(self, step: int) -> _Job:
        batch = [self.examples[i] for i in self.plan.batch(step)]
        # The mean over the batch's counted tokens: the learning rate then means the same whatever
        # the batch size and the lengths.
        counted = float(sum(example.counted.sum() for example in batch))
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

        return futures, settled

    def _evaluate(self) -> Iterator[_Job]:
        """The held-out loss of the weights as they are at this place in the line."""
        counted = float(sum(example.counted.sum() for example in self.held_out))
        parts = list(records.slices(self.held_out, EVALUATED_AT_ONCE))

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

    # What comes back

    def _settle(self, in_flight: deque[_Job], is_stopped: Callable[[], bool]) -> None:
        futures, settled = in_flight[0]
        results = [_result(future, is_stopped) for future in futures]
        in_flight.popleft()
        settled(results)

    def _lap(self) -> float:
        """Seconds since the job before this one came back."""
        before, self._clock = self._clock, time.monotonic()
        return max(self._clock - before, 1e-9)

    def _close_row(self) -> None:
        """The open row is complete, or gets no more."""
        if self._row is not None and len(self._row) > 1:
            self.metrics.append(self._row)
            self.report.row(self._row)
        self._row = None

    def _note(self, **changes: Any) -> None:
        self.state = attrs.evolve(self.state, **changes)
        save_state(self.folder, self.state)

    def _save_what_there_is(self, in_flight: deque[_Job]) -> None:
        """A checkpoint of the last step submitted, if the server makes one in time."""
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

    # What the model says

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
        """The adapter in its folder, and what the trained model says."""
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


def _loss_sum(output: types.ForwardBackwardOutput, batch: Sequence[records.Example]) -> float:
    """
    Negative log-likelihood of the counted tokens, summed, in nats.

    From the log-probabilities rather than from `loss:sum`, which some servers leave out of
    forward's answer, and which is weighted.
    """
    return -sum(
        float(np.dot(out["logprobs"].to_numpy().astype(np.float64), example.counted[1:]))
        for out, example in zip(output.loss_fn_outputs, batch)
    )
