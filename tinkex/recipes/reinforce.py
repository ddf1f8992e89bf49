"""Training on sampled answers: with rewards (`tinkex rl`), or with a teacher (`tinkex distill`).

A run in a folder, like a supervised one; policy_gradient.py computes the steps. Does not know about
the command line, the terminal or signals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from tinkex.data import files, records
from tinkex.data.split import split
from tinkex.recipes import rewards, supervised
from tinkex.recipes.callbacks import Callbacks
from tinkex.recipes.finetune import Recipe, UsageError, call
from tinkex.recipes.loop import Guard, Loop, Report
from tinkex.recipes.policy_gradient import PolicyGradient
from tinkex.recipes.rollouts import MakeEnv, Options, Reward, Rollouts
from tinkex.recipes.run import Run
from tinkex.recipes.run_folder import State, save_state
from tinkex.recipes.settings import RewardSettings
from tinkex.sampling import SamplingClient
from tinkex.service import ServiceClient

#: Settings that apply to imitation only.
UNUSED = frozenset(
    {
        *("method", "data_format", "max_length", "train_on", "split_turns", "date", "prompts"),
        *("beta", "label_smoothing", "margin", "generate_every", "gradient_accumulation"),
    }
)
#: Settings that distillation does not use: the above, and those about rewards.
UNUSED_BY_DISTILLATION = UNUSED | {
    *("reward", "env", "reward_timeout", "reward_workers", "advantage", "kl", "max_turns"),
}
#: A text that both tokenizers of a distillation must encode identically.
PROBE = "Tokens 12,345 of α → “β”\n\n\tdef f(x): return x**2  # 你好 🙂"


def reinforce(
    prompts: Any = None,
    reward: Reward | str | None = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    env: MakeEnv | str | None = None,
    eval_prompts: Any = None,
    resume: bool = False,
    base_url: str | None = None,
    api_key: str | None = None,
    service: ServiceClient | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """
    Reinforcement learning: the model answers prompts, and better answers become likelier.

    Args:
        prompts: rows with "prompt" (text or messages) and the keys that *reward* needs; in the
            forms of the data of `tinkex.finetune`.
        reward: `reward(answer, row)` returns a number, or a dict with "reward" and other numbers
            that become metrics; plain or async, or "my_rewards.py:score". Called on several
            threads at once.
        env: instead of *reward*: `env(row)` creates a `tinkex.Env`, a conversation of several
            turns.
        eval_prompts: held-out prompts; None holds out a part of *prompts*.
        settings: fields of `tinkex.recipes.settings.RewardSettings`: group_size, max_tokens,
            advantage, loss, kl, off_policy_steps and others; see docs/reinforcement.md.

    The other arguments are those of `tinkex.finetune`.

    Raises:
        RewardError: If the reward or the environment raises, hangs or returns no finite number; a
            ValueError. A checkpoint is saved first, so that the run can be resumed.
        ValueError, TypeError, TinkexError, KeyboardInterrupt: As `tinkex.finetune`.
    """
    return call(
        recipe(reward, env),
        prompts,
        _named(settings, base_model=base_model, reward=reward, env=env),
        output,
        eval_data=eval_prompts,
        resume=resume,
        base_url=base_url,
        api_key=api_key,
        service=service,
        callbacks=callbacks,
        progress=progress,
    )


def distill(
    prompts: Any = None,
    teacher: str | SamplingClient | None = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    eval_prompts: Any = None,
    resume: bool = False,
    base_url: str | None = None,
    api_key: str | None = None,
    service: ServiceClient | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """
    On-policy distillation: the model answers prompts and learns from its teacher's
    log-probabilities.

    Each token's advantage is its log-probability under the teacher minus that under the model, so a
    step lowers the divergence KL(model || teacher) on the model's own answers.

    Args:
        prompts: rows with "prompt"; given like the data of `tinkex.finetune`.
        teacher: base model or tinker:// path on the same server, or a sampling client of any; it
            must have the tokenizer of *base_model*.
        settings: as for `tinkex.reinforce`.

    Raises:
        ValueError, TypeError, TinkexError, KeyboardInterrupt: As `tinkex.finetune`.
    """
    return call(
        distillation(teacher),
        prompts,
        _named(
            {"loss": "importance_sampling", "group_size": 1, "kl": 1.0, **settings},
            base_model=base_model,
            method="distill",
            teacher=teacher if isinstance(teacher, str) else None,
        ),
        output,
        eval_data=eval_prompts,
        resume=resume,
        base_url=base_url,
        api_key=api_key,
        service=service,
        callbacks=callbacks,
        progress=progress,
    )


def _named(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The settings, with functions replaced by their names."""
    found = {
        key: rewards.name_of(value) if key in ("reward", "env") else value
        for key, value in more.items()
    }
    return {**settings, **{key: value for key, value in found.items() if value is not None}}


def recipe(reward: Reward | str | None, env: MakeEnv | str | None) -> Recipe:
    """
    The recipe of `tinkex rl`.

    Raises:
        UsageError: Unless exactly one of *reward* and *env* is given.
        ValueError: If the file or the function in it does not exist.
    """
    if (reward is None) == (env is None):
        raise UsageError("give one of reward and env: what judges an answer.")
    judge = rewards.load(reward) if isinstance(reward, str) else reward
    make_env = rewards.load(env) if isinstance(env, str) else env
    return Recipe(
        "rl", "reinforce", RewardSettings, partial(run, reward=judge, make_env=make_env), UNUSED
    )


def distillation(teacher: str | SamplingClient | None) -> Recipe:
    """
    The recipe of `tinkex distill`.

    Raises:
        UsageError: If there is no teacher.
    """
    if teacher is None:
        raise UsageError("give a teacher: a model that is distilled.")
    return Recipe(
        "distill",
        "distill",
        RewardSettings,
        partial(run, teacher=teacher),
        UNUSED_BY_DISTILLATION,
    )


# The run


def _options(settings: RewardSettings) -> Options:
    return Options(
        settings.group_size,
        settings.max_tokens,
        settings.temperature,
        settings.stop or (),
        settings.plain,
        settings.max_turns,
        settings.deterministic,
    )


def run(
    service: ServiceClient,
    data: files.DataFile,
    settings: RewardSettings,
    folder: Path,
    report: Report,
    state: State | None = None,
    guard: Guard = lambda: nullcontext(lambda: False),
    *,
    eval_data: files.DataFile | None = None,
    tokenizer: Any = None,
    callbacks: Callbacks | None = None,
    reward: Reward | None = None,
    make_env: MakeEnv | None = None,
    teacher: str | SamplingClient | None = None,
) -> Run:
    """
    Train, and write the adapter to *folder*. Arguments and errors as for `supervised.run`, and:

    Args:
        reward, make_env, teacher: as for `reinforce` and `distill`; one of them.

    Raises:
        RewardError: If *reward* or *make_env* fails; a checkpoint is saved first.
    """
    before = state
    state = supervised.begun(settings, state, data, eval_data)
    complete = state.settings
    if not isinstance(complete, RewardSettings):
        raise ValueError(f"the run to resume has method {complete.method}, not rl or distill.")
    tasks, held_out = _tasks(data, eval_data, complete)
    folder.mkdir(parents=True, exist_ok=True)
    save_state(folder, state)
    with ExitStack() as stack:
        training = supervised.open_training(service, state)
        stack.callback(training.close)
        pool = rewards.Pool(complete.reward_workers, complete.reward_timeout)
        stack.callback(pool.close)
        theirs = training.get_tokenizer()
        rollouts = Rollouts(theirs, _options(complete), pool, reward, make_env)
        reference = _reference(service, complete, teacher, theirs, stack)
        objective = PolicyGradient(tasks, held_out, complete, rollouts, state.step, reference)
        what = f"{len(tasks)} prompts to train on, {len(held_out)} held out"
        report.say(f"{what}; {complete.group_size} answers to each.")
        supervised.say_reach(training, complete, report)
        counts = {"examples": len(tasks), "held_out": len(held_out), "bad": len(data.bad)}
        trainer = Loop(
            service,
            training,
            theirs,
            objective,
            attrs.evolve(state, counts=counts),
            Run(folder),
            report,
            callbacks or Callbacks(),
        )
        if before is not None and before.goes_further(complete):
            report.say(supervised.further(before, complete, trainer.total))
        with guard() as is_stopped:
            objective.is_stopped = is_stopped
            is_complete = trainer.run(is_stopped)
        if objective.failure is not None:
            raise _located(objective.failure, Run(folder))
        if is_complete:
            trainer.finish()
        return Run(folder)


def _located(failure: rewards.RewardError, run: Run) -> rewards.RewardError:
    found = rewards.RewardError(
        f"{failure}. Fix that, and continue with --resume: {run.description}."
    )
    found.__cause__ = failure
    return found


def _tasks(
    data: files.DataFile, eval_data: files.DataFile | None, settings: RewardSettings
) -> tuple[list[records.Task], list[records.Task]]:
    """The tasks to train on, and the held-out ones."""
    tasks, held_out = (
        [record for record in (part.records if part else []) if isinstance(record, records.Task)]
        for part in (data, eval_data)
    )
    if eval_data is not None:
        return tasks, held_out
    trained, held = split(len(tasks), settings.eval_fraction, settings.seed)
    return [tasks[i] for i in trained], [tasks[i] for i in held]


def _reference(
    service: ServiceClient,
    settings: RewardSettings,
    teacher: str | SamplingClient | None,
    tokenizer: Any,
    stack: ExitStack,
) -> SamplingClient | None:
    """The model of the reference log-probabilities: the teacher, or the base model if needed."""
    if isinstance(teacher, SamplingClient):
        client = teacher
    elif teacher is not None or settings.kl > 0:
        source = teacher or settings.base_model
        if source.startswith("tinker://"):
            client = service.create_sampling_client(model_path=source)
        else:
            client = service.create_sampling_client(base_model=source)
        stack.callback(client.close)
    else:
        return None
    if teacher is not None:
        _check_tokenizers(tokenizer, client.get_tokenizer())
    return client


def _check_tokenizers(ours: Any, theirs: Any) -> None:
    if list(ours.encode(PROBE)) != list(theirs.encode(PROBE)):
        raise ValueError(
            "the teacher's tokenizer is not that of the model: log-probabilities of the same "
            "tokens cannot be compared. Choose a teacher of the same family."
        )
