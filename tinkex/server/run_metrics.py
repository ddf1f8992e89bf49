"""The metrics of training runs, and the usage of each user.

Every optimizer step adds a point to its run: loss per token, tokens, tokens per second. Clients can
add points, such as a held-out loss, and samples. Both are JSON Lines files in the home, so that
they outlive the server. Nothing else depends on them: a full disk loses points, but no step fails.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from tinkex import types
from tinkex.server.live import Work

logger = logging.getLogger(__name__)

#: One point: numbers by name, including "step" and "time" (seconds since the epoch).
Point = dict[str, float]

#: No more points are added to a file larger than this.
_MOST_BYTES = 64 * 2**20
#: Most points in one response; if there are more, every n-th is sent.
MOST_POINTS = 2000
#: How many of a run's newest samples are kept, and how many characters of each text.
MOST_SAMPLES, _MOST_CHARACTERS = 200, 4000


@attrs.define
class Usage:
    """A user's usage since the server started."""

    operations: int = 0
    tokens_trained: int = 0
    tokens_sampled: int = 0


@attrs.define(eq=False)
class _Step:
    """The current step of a run."""

    number: int
    loss: float = 0.0
    weighted: int = 0
    tokens: int = 0
    began: float | None = None


class RunMetrics:
    """Safe to share between threads.

    Args:
        folder: created when the first point is written.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below, and the files
        self._steps: dict[str, _Step] = {}
        self._latest: dict[str, Point] = {}
        self._usage: dict[str, Usage] = {}
        self._sampled: dict[str, int] = {}
        self._written: dict[str, int] = {}
        self._failed = False

    # What the server itself sees.

    def observe(self, work: Work, result: Any) -> int:
        """Count a completed operation; an optimizer step makes a point.

        Operations that are repeated after a restart have been counted before.

        Returns:
            The tokens that it trained on.
        """
        tokens = 0
        if work.ended or work.request is None:
            return tokens
        with self._lock:
            usage = self._usage.setdefault(work.model.owner, Usage())
            usage.operations += 1
            if isinstance(result, types.ForwardBackwardOutput):
                tokens = self._add_batch(work, result)
                usage.tokens_trained += tokens
            elif isinstance(result, types.OptimStepResponse):
                self._end_step(work.model.model_id, result)
            elif isinstance(result, types.UnloadModelResponse):
                self._steps.pop(work.model.model_id, None)
        return tokens

    def sampled(self, owner: str, response: Any) -> None:
        """Count a completed sample request; failed ones do not count."""
        if isinstance(response, types.SampleResponse):
            with self._lock:
                usage = self._usage.setdefault(owner, Usage())
                usage.operations += 1
                usage.tokens_sampled += sum(len(s.tokens_np) for s in response.sequences)

    def usage(self, owner: str) -> Usage:
        with self._lock:
            return attrs.evolve(self._usage.get(owner, Usage()))

    def _add_batch(self, work: Work, result: types.ForwardBackwardOutput) -> int:
        tokens = sum(datum.model_input.length for datum in work.request.data)
        if work.name == "ForwardBackward":
            step = self._step(work.model.model_id)
            step.loss += result.metrics.get("loss:sum", 0.0)
            step.weighted += sum(_weighted_tokens(datum) for datum in work.request.data)
            step.tokens += tokens
        return tokens

    def _end_step(self, run_id: str, result: types.OptimStepResponse) -> None:
        step, now = self._step(run_id), self._clock()
        point: Point = {"step": step.number, "time": now, "tokens": step.tokens}
        if step.weighted:
            point["loss"] = step.loss / step.weighted
        if step.began is not None and now > step.began:
            point["tokens_per_second"] = step.tokens / (now - step.began)
        point |= {
            name: value for name, value in (result.metrics or {}).items() if _is_finite(value)
        }
        self._steps[run_id] = _Step(step.number + 1, began=now)
        self._write(run_id, [point])

    def _step(self, run_id: str) -> _Step:
        if run_id not in self._steps:
            last = self._last_of_file(run_id)
            self._steps[run_id] = _Step(int(last.get("step", 0)) + 1)
        return self._steps[run_id]

    # What clients add and read.

    def add(self, run_id: str, points: Sequence[Mapping[str, float]]) -> None:
        """Add points; those without a "time" get the current time."""
        with self._lock:
            self._write(run_id, [{"time": self._clock(), **point} for point in points])

    def add_samples(self, run_id: str, samples: Sequence[types.RunSample]) -> None:
        """Add samples of the run's model."""
        if not samples:
            return
        cut = [
            {
                "step": sample.step,
                "prompt": sample.prompt[:_MOST_CHARACTERS],
                "text": sample.text[:_MOST_CHARACTERS],
            }
            for sample in samples
        ]
        with self._lock:
            kept = [*self._samples(run_id), *cut][-MOST_SAMPLES:]
            self._sampled[run_id] = self._sampled.get(run_id, 0) + 1
            try:
                self._folder.mkdir(exist_ok=True)
                path = self._samples_path(run_id)
                draft = path.with_suffix(".new")
                draft.write_text("".join(f"{json.dumps(sample)}\n" for sample in kept))
                draft.replace(path)
            except OSError as exc:
                self._warn_once(exc)

    def samples(self, run_id: str) -> list[dict[str, Any]]:
        """The newest samples of a run, oldest first: "step", "prompt", "text"."""
        with self._lock:
            return self._samples(run_id)

    def sampled_at(self, run_id: str) -> int:
        """A number that changes whenever samples are added; 0 since the server started."""
        with self._lock:
            return self._sampled.get(run_id, 0)

    def written_at(self, run_id: str) -> int:
        """A number that changes whenever points are added; 0 since the server started."""
        with self._lock:
            return self._written.get(run_id, 0)

    def latest(self, run_id: str) -> Point:
        """The newest value of each metric; empty if there is none."""
        with self._lock:
            if run_id not in self._latest:
                self._latest[run_id] = self._last_of_file(run_id)
            return dict(self._latest[run_id])

    def read(self, run_id: str, after: int = 0) -> tuple[list[Point], int]:
        """Points in order of arrival.

        Args:
            after: the position returned by an earlier call; 0 for all points.

        Returns:
            At most `MOST_POINTS` evenly spaced points, including the newest; and where to continue.
        """
        with self._lock:
            data = self._bytes(run_id, after)
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        stride = -(-len(lines) // MOST_POINTS) or 1
        kept = lines[::-1][::stride][::-1]
        return [json.loads(line) for line in kept], after + len(whole)

    # Files.

    def _path(self, run_id: str) -> Path:
        return self._folder / f"{run_id.replace(':', '_').replace('/', '_')}.jsonl"

    def _samples_path(self, run_id: str) -> Path:
        return self._path(run_id).with_suffix(".samples.jsonl")

    def _samples(self, run_id: str) -> list[dict[str, Any]]:
        try:
            text = self._samples_path(run_id).read_text()
        except OSError:
            return []
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError:  # truncated by a power failure
            return []

    def _warn_once(self, exc: OSError) -> None:
        if not self._failed:
            logger.warning("Metrics of runs cannot be written: %s.", exc)
        self._failed = True

    def _bytes(self, run_id: str, start: int) -> bytes:
        try:
            with self._path(run_id).open("rb") as file:
                file.seek(start)
                return file.read()
        except OSError:
            return b""

    def _last_of_file(self, run_id: str) -> Point:
        """The newest value of each metric in the last points of the file."""
        path, latest = self._path(run_id), {}
        size = path.stat().st_size if path.exists() else 0
        start = max(0, size - 2**16)
        lines = self._bytes(run_id, start).splitlines()
        for line in lines[1 if start else 0 :]:
            latest.update(json.loads(line))
        return latest

    def _write(self, run_id: str, points: Sequence[Point]) -> None:
        path = self._path(run_id)
        text = "".join(f"{json.dumps(point, allow_nan=False)}\n" for point in points)
        if run_id not in self._latest:
            self._latest[run_id] = self._last_of_file(run_id)
        for point in points:
            self._latest[run_id].update(point)
        self._written[run_id] = self._written.get(run_id, 0) + 1
        try:
            if path.exists() and path.stat().st_size > _MOST_BYTES:
                return
            self._folder.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.write(text.encode())
        except OSError as exc:
            self._warn_once(exc)


def _weighted_tokens(datum: types.Datum) -> int:
    """The number of tokens with a nonzero weight, which the loss covers."""
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None:
        return datum.model_input.length
    return int(np.count_nonzero(weights.to_numpy()))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and bool(np.isfinite(value))
