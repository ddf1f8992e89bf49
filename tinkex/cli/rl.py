"""`tinkex rl` and `tinkex distill`: train a model on its sampled answers to prompts.

They share the options of `tinkex train`, except those for imitation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import click

from tinkex.cli.options import Decorator, NameFrom, option, together
from tinkex.cli.train import launch, train

#: Options shared with `tinkex train`.
SHARED = {
    *("base_model", "output", "resume", "rank", "learning_rate", "schedule", "warmup_steps"),
    *("epochs", "max_steps", "seed", "eval_fraction", "eval_every", "save_every", "train_mlp"),
    *("train_attn", "train_unembed", "start_from", "eval_data", "weight_decay", "beta1", "beta2"),
    *("grad_clip_norm", "patience", "load_best", "keep", "report_to", "config", "dump_config"),
    *("dtype", "data_map", "skip_bad_lines", "base_url", "api_key"),
}


def _losses() -> Iterable[str]:
    from tinkex.recipes import settings

    return get_args(settings.RewardLoss)


_ANSWERS = together(
    option("--batch-size", click.IntRange(1), 8, "Prompts per step."),
    option("--group-size", click.IntRange(1), 8, "Answers to each."),
    option("--max-tokens", click.IntRange(1), 256, "Maximum tokens per answer."),
    option(
        "--temperature",
        click.FloatRange(0, min_open=True),
        1.0,
        "Sampling temperature of the answers that are trained on.",
    ),
    click.option("--stop", help="Texts that end an answer, separated by commas."),
    click.option(
        "--plain", is_flag=True, help="Continue prompts as plain text, without the chat template."
    ),
    option(
        "--loss",
        NameFrom(_losses),
        "ppo",
        "Loss function of the server.",
    ),
    click.option(
        "--clip-low", type=click.FloatRange(0), help="Lower bound of the probability ratio."
    ),
    click.option(
        "--clip-high", type=click.FloatRange(0), help="Upper bound of the probability ratio."
    ),
    option(
        "--off-policy-steps",
        click.IntRange(0, 1),
        0,
        "1 samples for the next step while this one is trained on.",
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        help="Sample prompt after prompt, so that runs with one seed are equal; slower.",
    ),
)
_RL = together(
    click.option(
        "--reward",
        metavar="FILE.py:FUNCTION",
        help="Judges an answer: FUNCTION(answer, row) returns a number.",
    ),
    click.option(
        "--env",
        metavar="FILE.py:FUNCTION",
        help="Instead of --reward: FUNCTION(row) makes an environment of several turns.",
    ),
    option(
        "--advantage",
        click.Choice(["grpo", "centered", "rloo"]),
        "grpo",
        "How the answers of a group are compared; grpo divides by the standard deviation.",
    ),
    option(
        "--kl", click.FloatRange(0), 0.0, "Pull to the base model, in reward per nat and token."
    ),
    option(
        "--reward-timeout",
        click.FloatRange(0, min_open=True),
        60.0,
        "Seconds that a reward function, or a step of an environment, may take.",
    ),
    option("--reward-workers", click.IntRange(1), 16, "Reward functions that run at a time."),
    option("--max-turns", click.IntRange(1), 8, "Maximum turns per episode, with --env."),
)
_DISTILL = click.option(
    "--teacher",
    metavar="MODEL|tinker://...",
    help="Base model or checkpoint on the server, with the tokenizer of --base-model.",
)


def _command(own: Decorator) -> Callable[[Callable[..., int]], click.Command]:
    """A command with the options *own*, and those of `tinkex train` in `SHARED`."""

    def decorate(function: Callable[..., int]) -> click.Command:
        function = together(own, _ANSWERS)(function)
        function = click.argument("data", nargs=-1, metavar="PROMPTS...")(function)
        command = click.command()(function)
        command.params += [option for option in train.params if option.name in SHARED]
        return command

    return decorate


@_command(_RL)
@click.pass_context
def rl(context: click.Context, **options: Any) -> int:
    """Train a model on its own answers to PROMPTS, judged by a function.

    PROMPTS are files like those of `tinkex train`; a row has "prompt" (text or messages) and
    whatever the function needs. Ctrl-C saves a checkpoint; --resume --output FOLDER continues.
    """
    from tinkex.recipes import finetune, reinforce

    def recipe() -> finetune.Recipe:
        return reinforce.recipe(_resumed(options, "reward"), _resumed(options, "env"))

    return launch(context, recipe, options)


@_command(_DISTILL)
@click.pass_context
def distill(context: click.Context, **options: Any) -> int:
    """Train a model on its own answers to PROMPTS, towards what a larger model finds likely.

    Each token's advantage is its log-probability under the teacher less that under the model.
    """
    from tinkex.recipes import finetune, reinforce

    def recipe() -> finetune.Recipe:
        return reinforce.distillation(_resumed(options, "teacher"))

    fixed = {"method": "distill", "kl": 1.0, "group_size": 1, "loss": "importance_sampling"}
    return launch(context, recipe, options, fixed)


def _resumed(options: dict[str, Any], name: str) -> str | None:
    """The option, or with --resume the resumed run's value."""
    from tinkex import Run

    given: str | None = options[name]
    if given is None and options["resume"] and options["output"] is not None:
        given = Run(options["output"]).settings.get(name)
    return given


COMMANDS = (rl, distill)
