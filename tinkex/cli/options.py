"""Options that several commands share. Does not know what the commands do."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, get_args

import click

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]

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


def option(flag: str, kind: click.ParamType | None, default: Any, help: str) -> Decorator:
    """An option whose default is shown by --help; *kind* is None for a pair of flags."""
    return click.option(flag, type=kind, default=default, show_default=True, help=help)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator, in the order in which --help lists them."""

    def add(command: Command) -> Command:
        for each in reversed(options):
            command = each(command)
        return command

    return add


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


#: Number types of base weights for the engine; for sampling also int8.
DTYPES = ("auto", "float32", "bfloat16")
SAMPLING_DTYPES = (*DTYPES, "int8")


def dtype_option(
    help: str, default: str | None = None, choices: Sequence[str] = DTYPES
) -> Decorator:
    """--dtype, or TINKEX_DTYPE."""
    return click.option(
        "--dtype",
        type=click.Choice(choices),
        default=default,
        show_default=default is not None,
        envvar="TINKEX_DTYPE",
        show_envvar=True,
        help=help,
    )


def set_dtype(dtype: str | None, base_url: str | None, is_explicit: bool) -> None:
    """Set the dtype from `dtype_option` for the embedded engine.

    Raises:
        click.UsageError: If it was given explicitly together with a server's address.
    """
    from tinkex import config

    if dtype is None:
        return
    if base_url is not None and is_explicit:
        raise click.UsageError(
            "--dtype applies to the embedded engine only; start the server at --base-url with "
            "`tinkex serve --dtype` instead."
        )
    config.set_engine_dtype(dtype)


def sampling_options(
    max_tokens: int,
    temperature: float,
    *,
    max_tokens_help: str,
    temperature_help: str,
    seed_help: str,
) -> Decorator:
    """--max-tokens, --temperature and --seed, with a command's own defaults and help texts."""
    return together(
        option("--max-tokens", click.IntRange(1), max_tokens, max_tokens_help),
        option("--temperature", click.FloatRange(0), temperature, temperature_help),
        click.option("--seed", type=click.IntRange(0), help=seed_help),
    )


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


class NameFrom(click.Choice[str]):
    """One of the names of a table in another module, which is imported only when needed.

    Args:
        load: returns the names.
    """

    def __init__(self, load: Callable[[], Iterable[str]]) -> None:
        self._load = load
        self.case_sensitive = True

    @cached_property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names, in the order of the table."""
        return tuple(self._load())


def _shapes() -> Iterable[str]:
    from tinkex.data import records

    return [name for name, shape in records.SHAPES.items() if shape.keys]


def _methods() -> Iterable[str]:
    from tinkex.recipes import settings

    return get_args(settings.Method)


def row_options(shape: str, renames: str) -> Decorator:
    """--format and --map, which the command receives under these names."""
    return together(
        click.option(
            "--format",
            shape,
            type=NameFrom(_shapes),
            help="Format of the rows. Default: detected from their keys.",
        ),
        click.option(
            "--map",
            renames,
            type=Mapping(),
            metavar="WANTED=GIVEN,...",
            help="Names of the keys in the data, such as prompt=question,completion=answer.",
        ),
    )


#: Options of reading and rendering data.
data_options = together(
    row_options("data_format", "data_map"),
    click.option("--skip-bad-lines", is_flag=True, help="Skip invalid rows instead of stopping."),
    option(
        "--train-on",
        click.Choice(["assistant", "last", "all"]),
        "assistant",
        "What is learned of a conversation: all messages of the assistant, the last one, or every "
        "token.",
    ),
    option(
        "--split-turns/--no-split-turns",
        None,
        True,
        "Split a conversation into several examples where the chat template shortens earlier "
        "turns.",
    ),
    click.option(
        "--date",
        metavar="YYYY-MM-DD",
        help="Date for chat templates that contain one. Default: the day of the start.",
    ),
)

#: Options of the training method, and settings of preference methods.
method_options = together(
    option(
        "--method",
        NameFrom(_methods),
        "sft",
        "sft imitates the examples; the others learn from rows with chosen and rejected.",
    ),
    option(
        "--beta",
        click.FloatRange(0, min_open=True),
        0.1,
        "dpo, ipo: strength of the pull to the base model; simpo: scale of the rewards (try 2); "
        "orpo: weight of the odds.",
    ),
    option(
        "--label-smoothing",
        click.FloatRange(0, 0.5, max_open=True),
        0.0,
        "dpo: fraction of pairs assumed to be the wrong way round.",
    ),
    option(
        "--margin",
        click.FloatRange(0),
        0.5,
        "simpo: by how much the chosen answer should be better.",
    ),
)


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
