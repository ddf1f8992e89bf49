"""The settings of a run, checked, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date as Date
from typing import Any, Literal, get_args

import attrs

from tinkex import types
from tinkex.data import datums
from tinkex.text.messages import TrainOn

Schedule = Literal["constant", "linear", "cosine"]
#: Training methods: imitation of examples ("sft"), or pairs of a chosen and a rejected answer.
Method = Literal["sft", "dpo", "ipo", "simpo", "orpo"]
RewardLoss = Literal["importance_sampling", "ppo", "cispo", "gspo"]

#: The highest accepted learning rate. LoRA trains with 1e-5 to 1e-3.
MAX_LEARNING_RATE = 1.0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_learning_rate(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 < value <= MAX_LEARNING_RATE:  # also refuses NaN
        raise ValueError(
            f"learning_rate must be above 0 and at most {MAX_LEARNING_RATE:g}, got {value!r}; "
            "usual for LoRA are 1e-5 to 1e-3."
        )


def _check_date(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        try:
            Date.fromisoformat(value)
        except (ValueError, TypeError) as exc:
            raise ValueError(f"date must be like 2024-07-26, got {value!r}.") from exc


def _whole(least: int) -> Callable[[object, Any, Any], None]:
    """A validator of integers; None is accepted if it is the default."""

    def check(instance: object, attribute: Any, value: Any) -> None:
        if value is None and attribute.default is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{attribute.name} must be a whole number of at least {least}, got {value!r}."
            )

    return check


def _not_negative(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(f"{attribute.name} must be a number of at least 0, got {value!r}.")


def _positive(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{attribute.name} must be a number above 0, got {value!r}.")


def _below_half(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 0.5:
        raise ValueError(f"{attribute.name} must be from 0 to below 0.5, got {value!r}.")


def _below_one(instance: object, attribute: Any, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must be from 0 to below 1, got {value!r}.")


def _one_of(literal: Any) -> Callable[[object, Any, Any], None]:
    names = get_args(literal)

    def check(instance: object, attribute: Any, value: Any) -> None:
        if value not in names:
            raise ValueError(
                f"{attribute.name} must be {' or '.join(map(str, names))}, got {value!r}."
            )

    return check


def _texts(instance: object, attribute: Any, value: Any) -> None:
    is_list = isinstance(value, list) and all(isinstance(text, str) for text in value)
    if value is not None and not is_list:
        raise ValueError(f"{attribute.name} must be a list of texts, got {value!r}.")


def _names(value: Any) -> Any:
    """A list of names from comma-separated text; other values are passed to the validator."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    return list(value) if isinstance(value, tuple) else value


@attrs.frozen
class Settings:
    """The settings of a run. A resumed run must have the same, except those in `FREE`; those in
    `GROWING` may only grow.

    Args:
        base_model: name, or absolute path of a folder: see `tinkex.text.tokenizer`.
        learning_rate: the highest of the run, for AdamW; at most 1.
        schedule: "constant", or "linear" or "cosine", which fall to 0 at the last step.
        warmup_steps: steps over which the learning rate rises from 0.
        max_steps: limit of the steps; None runs all epochs.
        max_length: most tokens of an example; the rest is cut off.
        eval_fraction: fraction of the examples that is held out. Unused with eval_data.
        skip_bad_lines: skip invalid lines of the data file instead of refusing the file.
        eval_every, save_every: steps between two evaluations, and two checkpoints; None is a tenth
            of the run. The run always ends with both.
        train_on: which parts of a conversation have weight: see `tinkex.render`.
        split_turns: make several examples of a conversation if its template renders earlier turns
            differently once later ones follow.
        date: the date for chat templates that use it, such as 2024-07-26. None is the day of the
            start.
        data_format: shape of the rows, a name in `records.SHAPES`; None detects it from their keys.
        data_map: expected key -> key in the data.
        train_unembed: None lets the server choose: see `types.LoraConfig`.
        start_from: tinker:// path or PEFT adapter folder of the initial weights; None is a new
            adapter.
        weight_decay, beta1, beta2: of AdamW.
        method: "sft" imitates examples; "dpo", "ipo", "simpo" and "orpo" learn from pairs of a
            chosen and a rejected answer.
        beta, label_smoothing, margin: for the preference methods: see `preference_losses.Options`.
        grad_clip_norm: largest L2 norm of a step's gradient; 0 does not clip.
        gradient_accumulation: batches per optimizer step, each of batch_size examples.
        patience: evaluations without a lower held-out loss after which the run ends early, with the
            weights of the best evaluation. None never ends early.
        load_best: end with the weights of the lowest held-out loss instead of the last ones.
        keep: how many of the newest checkpoints stay on the server, besides the best; None keeps
            all.
        generate_every: steps between two samples of *prompts*; None is a tenth of the run.
        prompts: texts that the model continues during training (as user messages if the training
            data is conversations).
        report_to: names of trackers, as a list or "tensorboard,wandb".
    """

    base_model: str
    rank: int = attrs.field(default=32, validator=_whole(1))
    learning_rate: float = attrs.field(default=1e-4, validator=_check_learning_rate)
    schedule: Schedule = attrs.field(default="constant", validator=_one_of(Schedule))
    warmup_steps: int = attrs.field(default=0, validator=_whole(0))
    batch_size: int = attrs.field(default=32, validator=_whole(1))
    epochs: int = attrs.field(default=1, validator=_whole(1))
    max_steps: int | None = attrs.field(default=None, validator=_whole(1))
    max_length: int = attrs.field(default=1024, validator=_whole(2))
    seed: int = attrs.field(default=0, validator=_whole(0))
    eval_fraction: float = attrs.field(default=0.05, validator=_below_one)
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool | None = None
    skip_bad_lines: bool = False
    eval_every: int | None = attrs.field(default=None, validator=_whole(1))
    save_every: int | None = attrs.field(default=None, validator=_whole(1))
    train_on: TrainOn = attrs.field(default="assistant", validator=_one_of(TrainOn))
    split_turns: bool = True
    date: str | None = attrs.field(default=None, validator=_check_date)
    data_format: str | None = None
    data_map: dict[str, str] | None = None
    start_from: str | None = None
    weight_decay: float = attrs.field(default=0.0, validator=_not_negative)
    beta1: float = attrs.field(default=0.9, validator=_below_one)
    beta2: float = attrs.field(default=0.95, validator=_below_one)
    grad_clip_norm: float = attrs.field(default=0.0, validator=_not_negative)
    gradient_accumulation: int = attrs.field(default=1, validator=_whole(1))
    patience: int | None = attrs.field(default=None, validator=_whole(1))
    load_best: bool = False
    keep: int | None = attrs.field(default=None, validator=_whole(1))
    generate_every: int | None = attrs.field(default=None, validator=_whole(1))
    prompts: list[str] | None = attrs.field(default=None, validator=_texts)
    report_to: list[str] | None = attrs.field(default=None, converter=_names, validator=_texts)
    method: Method = attrs.field(default="sft", validator=_one_of(Method))
    beta: float = attrs.field(default=0.1, validator=_positive)
    label_smoothing: float = attrs.field(default=0.0, validator=_below_half)
    margin: float = attrs.field(default=0.5, validator=_not_negative)

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The learning rate of *step*, from 1. Depends on nothing else, also in a resumed run."""
        if step <= self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        done = (step - 1 - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        factors = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }
        return self.learning_rate * factors[self.schedule]

    def adam_at(self, step: int, total_steps: int) -> types.AdamParams:
        """The optimizer settings of *step*."""
        return types.AdamParams(
            learning_rate=self.learning_rate_at(step, total_steps),
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            grad_clip_norm=self.grad_clip_norm,
        )

    @property
    def tracks_best(self) -> bool:
        """True if every evaluated step is saved, so that the best one can be restored."""
        return self.load_best or self.patience is not None

    @property
    def rendering(self) -> datums.Options:
        """The settings that affect how the data is rendered."""
        date = None if self.date is None else Date.fromisoformat(self.date)
        return datums.Options(self.max_length, self.train_on, self.split_turns, date)


def _clip(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and (not _is_number(value) or not 0 <= value < math.inf):
        raise ValueError(f"{attribute.name} must be a number of at least 0 or None, got {value!r}.")


@attrs.frozen
class RewardSettings(Settings):
    """Additional settings of a run that trains on sampled answers.

    Args:
        method: "rl" learns from rewards, "distill" from a teacher.
        batch_size: prompts per step.
        group_size: answers per prompt, which are compared with each other.
        max_tokens: limit of an answer.
        temperature: for sampling training answers; evaluation is greedy.
        stop: strings that end an answer, besides the model's own end tokens.
        plain: continue text prompts without the chat template.
        advantage: see `policy_gradient.advantages`.
        loss: the server's loss function: "importance_sampling", "ppo", "cispo" or "gspo".
        clip_low, clip_high: bounds of the ratio, for the last three; None uses the server's
            defaults.
        kl: coefficient of the KL penalty to the base model (or the teacher), in reward per nat and
            token.
        off_policy_steps: 1 samples the next step's answers, from the weights before this step,
            while the server trains on this step.
        deterministic: sample one prompt after the other instead of all at once. Runs with the same
            seed are then bitwise equal on an otherwise idle server; steps take longer.
        reward, env: names of the functions, for information.
        reward_timeout: time limit, in seconds, of a reward function or a step of an environment.
        reward_workers: how many of them run at a time.
        max_turns: limit of an episode in an environment.
        teacher: base model or tinker:// path of the teacher.
    """

    method: Any = attrs.field(default="rl", validator=_one_of(Literal["rl", "distill"]))
    batch_size: int = attrs.field(default=8, validator=_whole(1))
    data_format: str | None = "task"
    group_size: int = attrs.field(default=8, validator=_whole(1))
    max_tokens: int = attrs.field(default=256, validator=_whole(1))
    temperature: float = attrs.field(default=1.0, validator=_positive)
    stop: list[str] | None = attrs.field(default=None, converter=_names, validator=_texts)
    plain: bool = False
    advantage: str = attrs.field(
        default="grpo", validator=_one_of(Literal["grpo", "centered", "rloo"])
    )
    loss: str = attrs.field(default="ppo", validator=_one_of(RewardLoss))
    clip_low: float | None = attrs.field(default=None, validator=_clip)
    clip_high: float | None = attrs.field(default=None, validator=_clip)
    kl: float = attrs.field(default=0.0, validator=_not_negative)
    off_policy_steps: int = attrs.field(default=0, validator=_one_of(Literal[0, 1]))
    deterministic: bool = False
    reward: str | None = None
    env: str | None = None
    reward_timeout: float = attrs.field(default=60.0, validator=_positive)
    reward_workers: int = attrs.field(default=16, validator=_whole(1))
    max_turns: int = attrs.field(default=8, validator=_whole(1))
    teacher: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.group_size == 1 and self.method == "rl" and self.kl == 0:
            raise ValueError(
                "group_size must be at least 2: the rewards of one prompt's answers are compared "
                "with one another, and a single answer teaches nothing."
            )


def of_values(values: dict[str, Any]) -> Settings:
    """Recreate settings from stored *values*.

    Raises:
        TypeError, ValueError: If the values are not valid settings.
    """
    is_reward = values.get("method") in ("rl", "distill")
    return RewardSettings(**values) if is_reward else Settings(**values)


#: Settings that do not affect the result.
FREE = {
    *("eval_every", "save_every", "keep", "generate_every", "prompts", "report_to"),
    *("reward", "env", "reward_timeout", "reward_workers"),
}
#: Settings that a resumed run may increase: it then continues further.
GROWING = {"epochs", "max_steps"}
