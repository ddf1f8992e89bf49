"""Options that several commands share. Does not know what the commands do."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Duration(click.ParamType):
    """A whole number of seconds, or with a unit: 90, 90s, 15m, 12h, 7d, 2w."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Seconds, at least 1."""
        match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", str(value).strip())
        if match is None or int(match[1]) == 0:
            self.fail(
                f"{value!r} is not a duration; give seconds, or a number with s, m, h, d or w, "
                "such as 12h or 30d.",
                param,
                ctx,
            )
        return int(match[1]) * _UNITS[match[2]]


class Size(click.ParamType):
    """A number of bytes, with or without a unit: 500000, 500MB, 20GB, 1.5TB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, at least 1."""
        match = re.fullmatch(
            r"([0-9]{1,15}(?:\.[0-9]{1,3})?) ?([KMGT]?)B?", str(value).strip().upper()
        )
        size = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
        if size == 0:
            self.fail(
                f"{value!r} is not a size; give bytes, or a number with KB, MB, GB or TB, such as "
                "20GB.",
                param,
                ctx,
            )
        return size


def key_option(command: Command) -> Command:
    """--api-key."""
    return click.option(
        "--api-key",
        help="Key for the server. Other users cannot see it if you set TINKER_API_KEY instead.",
    )(command)


def server_options(command: Command) -> Command:
    """--base-url and --api-key."""
    url = click.option(
        "--base-url", help="URL of the server. Default: TINKER_BASE_URL, or the embedded engine."
    )
    return url(key_option(command))


#: Number types of base weights, as the engine takes them.
DTYPES = ("auto", "float32", "bfloat16")


def dtype_option(help: str, default: str | None = None) -> Callable[[Command], Command]:
    """--dtype, or TINKEX_DTYPE."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=default,
        show_default=default is not None,
        envvar="TINKEX_DTYPE",
        show_envvar=True,
        help=help,
    )


def sampling_options(
    max_tokens: int,
    temperature: float,
    *,
    max_tokens_help: str,
    temperature_help: str,
    seed_help: str,
) -> Callable[[Command], Command]:
    """--max-tokens, --temperature and --seed, with a command's own defaults and help texts."""
    options = [
        click.option(
            "--max-tokens",
            type=click.IntRange(1),
            default=max_tokens,
            show_default=True,
            help=max_tokens_help,
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0),
            default=temperature,
            show_default=True,
            help=temperature_help,
        ),
        click.option("--seed", type=click.IntRange(0), help=seed_help),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


class Mapping(click.ParamType):
    """Key names as wanted=given,wanted=given."""

    name = "mapping"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, dict):
            return value
        pairs = [part.partition("=") for part in str(value).split(",")]
        if not all(wanted.strip() and given.strip() for wanted, _, given in pairs):
            self.fail(
                f"{value!r} is not a mapping; write it like prompt=question,completion=answer.",
                param,
                ctx,
            )
        return {wanted.strip(): given.strip() for wanted, _, given in pairs}


#: The names of `tinkex.data.records.SHAPES`, which is not imported for --help.
SHAPES = (
    "messages",
    "sharegpt",
    "alpaca",
    "preference",
    "openai-preference",
    "prompt-completion",
    "text",
    "tokens",
)


def data_options(command: Command) -> Command:
    """How data is read and rendered: --format, --map, --skip-bad-lines, --train-on and others."""
    options = [
        click.option(
            "--format",
            "data_format",
            type=click.Choice(SHAPES),
            help="Format of the rows. Default: detected from their keys.",
        ),
        click.option(
            "--map",
            "data_map",
            type=Mapping(),
            metavar="WANTED=GIVEN,...",
            help="Names of the keys in the data, such as prompt=question,completion=answer.",
        ),
        click.option(
            "--skip-bad-lines", is_flag=True, help="Skip invalid rows instead of stopping."
        ),
        click.option(
            "--train-on",
            type=click.Choice(["assistant", "last", "all"]),
            default="assistant",
            show_default=True,
            help="What is learnt of a conversation: all messages of the assistant, "
            "the last one, or every token.",
        ),
        click.option(
            "--split-turns/--no-split-turns",
            default=True,
            show_default=True,
            help="Split a conversation into several examples where the chat template shortens "
            "earlier turns.",
        ),
        click.option(
            "--date",
            metavar="YYYY-MM-DD",
            help="Date for chat templates that contain one. Default: the day of the start.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def method_options(command: Command) -> Command:
    """What is learnt: --method and the settings of preference methods."""
    options = [
        click.option(
            "--method",
            type=click.Choice(["sft", "dpo", "ipo", "simpo", "orpo"]),
            default="sft",
            show_default=True,
            help="sft imitates the examples; the others learn from rows with chosen and rejected.",
        ),
        click.option(
            "--beta",
            type=click.FloatRange(0, min_open=True),
            default=0.1,
            show_default=True,
            help="dpo, ipo: strength of the pull to the base model; simpo: scale of the rewards "
            "(try 2); orpo: weight of the odds.",
        ),
        click.option(
            "--label-smoothing",
            type=click.FloatRange(0, 0.5, max_open=True),
            default=0.0,
            show_default=True,
            help="dpo: fraction of pairs assumed to be the wrong way round.",
        ),
        click.option(
            "--margin",
            type=click.FloatRange(0),
            default=0.5,
            show_default=True,
            help="simpo: by how much the chosen answer should be better.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def format_option(command: Command) -> Command:
    """--format, which the command receives as the bool *as_json*."""
    return click.option(
        "--format",
        "-f",
        "as_json",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        callback=lambda context, option, value: value == "json",
        help="Output format; json prints nothing else to standard output.",
    )(command)


def add_verbosity(command: click.Command) -> None:
    """Add -v and -q to *command* and to all commands below it."""
    command.params += [
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            callback=_set_verbosity,
            help="Log milestones to stderr; -vv logs every operation and retry.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            callback=_set_quiet,
            help="No progress and no warnings; results and errors only.",
        ),
    ]
    if isinstance(command, click.Group):
        for below in command.commands.values():
            add_verbosity(below)


def is_quiet() -> bool:
    """True if the running command was given -q."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


_QUIET = "tinkex.quiet"


def _set_verbosity(context: click.Context, option: click.Parameter, value: int) -> None:
    if value:
        _set_level(logging.INFO if value == 1 else logging.DEBUG)


def _set_quiet(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        context.meta[_QUIET] = True
        _set_level(logging.ERROR)


def _set_level(level: int) -> None:
    from tinkex.runtime import log_setup  # here, so that --help is quick

    log_setup.set_level(level)
