"""What a run is asked for: its settings, checked, and the learning rate that follows from them."""

from __future__ import annotations

import math
from datetime import date as Date
from typing import Any, Literal

import attrs

from tinkex.data import datums
from tinkex.text.messages import TrainOn

Schedule = Literal["constant", "linear", "cosine"]

#: The highest learning rate that is accepted. LoRA trains with 1e-5 to 1e-3.
MAX_LEARNING_RATE = 1.0


def _check_learning_rate(instance: object, attribute: Any, value: Any) -> None:
    if not 0 < value <= MAX_LEARNING_RATE:  # also refuses NaN
        raise ValueError(
            f"learning_rate must be above 0 and at most {MAX_LEARNING_RATE:g}, got {value}; "
            "usual for LoRA are 1e-5 to 1e-3."
        )


def _check_date(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        try:
            Date.fromisoformat(value)
        except (ValueError, TypeError) as exc:
            raise ValueError(f"date must be like 2024-07-26, got {value!r}.") from exc


@attrs.frozen
class Settings:
    """What a run was asked for. A resumed run must have the same, but for what is in `FREE`.

    Args:
        base_model: name, or absolute path of a folder: see `tinkex.text.tokenizer`.
        learning_rate: the highest of the run, for AdamW; at most 1.
        schedule: "constant", or falling to 0 at the last step, "linear"ly or as a "cosine".
        warmup_steps: over which the learning rate first rises from 0.
        max_steps: where to stop if the epochs are not over; None lets them end.
        max_length: tokens of an example that are read.
        eval_fraction: of the examples, held out and never trained on. Unused with eval_data.
        skip_bad_lines: of the data file, instead of refusing it.
        eval_every, save_every: steps between two evaluations, two checkpoints; None is a tenth
            of the run. The end of the run has both in any case.
        train_on: what counts of a conversation: see `tinkex.render`.
        split_turns: make several examples of a conversation whose template writes earlier turns
            differently once later ones follow.
        date: today for chat templates that write it, as 2024-07-26. None is the day of the start.
        data_format: shape of the rows, a name of `records.SHAPES`; None decides by their keys.
        data_map: wanted key -> key in the data.
        start_from: tinker:// path, or the PEFT adapter folder, of the weights that the run starts
            with; None is a new adapter.
    """

    base_model: str
    rank: int = 32
    learning_rate: float = attrs.field(default=1e-4, validator=_check_learning_rate)
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
    train_on: TrainOn = "assistant"
    split_turns: bool = True
    date: str | None = attrs.field(default=None, validator=_check_date)
    data_format: str | None = None
    data_map: dict[str, str] | None = None
    start_from: str | None = None

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The rate of *step*, from 1. Depends on nothing else: a resumed run has the same."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        factors = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }
        return self.learning_rate * factors[self.schedule]

    @property
    def rendering(self) -> datums.Options:
        """What decides how the data is rendered."""
        date = None if self.date is None else Date.fromisoformat(self.date)
        return datums.Options(self.max_length, self.train_on, self.split_turns, date)


#: Settings that do not decide the result.
FREE = {"eval_every", "save_every"}
