"""Shared by the commands on runs, sessions and checkpoints: the client, limits, common columns.

Imports happen when a command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tinkex.cli import formatting
from tinkex.cli.options import option

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex import types
    from tinkex.rest import RestClient

T = TypeVar("T")

#: Default of --limit.
LISTED = 20
#: Most items in one request.
PAGE = 100
#: Seconds that a server may be unreachable during a command: a user is waiting.
NO_ANSWER = 30.0

limit_option = option(
    "--limit", click.IntRange(0), LISTED, "List the newest entries up to this number; 0 lists all."
)
scope_option = option(
    "--access-scope",
    click.Choice(["owned", "accessible"]),
    "owned",
    "Your own, or all that you have access to.",
)


@contextmanager
def open_rest(base_url: str | None, api_key: str | None) -> Iterator[RestClient]:
    """Open a RestClient of the named server, or of the embedded engine."""
    from tinkex import config
    from tinkex.rest import RestClient
    from tinkex.runtime.connection import Connection, connect

    patience = config.Patience(no_answer=NO_ANSWER)
    settings, engine = connect(base_url, api_key, patience=patience)
    with closing(Connection(settings, engine=engine)) as connection:
        yield RestClient(connection=connection)


def first(things: Iterator[T], limit: int) -> tuple[list[T], bool]:
    """The first *limit* of *things* (0: all), and True if there are more."""
    if not limit:
        return list(things), False
    found = list(islice(things, limit + 1))
    return found[:limit], len(found) > limit


def page_for(limit: int) -> int:
    """The page size with which *limit* items and one more are fetched."""
    return min(limit + 1, PAGE) if limit else PAGE


def print_count(thing: str, number: int, more: bool) -> None:
    """Print a note on stderr if there are none, or more than are listed."""
    if not number:
        click.echo(f"No {thing}s found.", err=True)
    elif more:
        click.echo(
            f"Only the newest {formatting.plural(number, thing)} are shown; --limit 0 lists all.",
            err=True,
        )


def lora(of: types.TrainingRun | types.WeightsInfoResponse) -> str:
    """The LoRA rank for a table: "rank 8", "yes" if it is unknown, "no"."""
    if not of.is_lora:
        return "no"
    return f"rank {of.lora_rank}" if of.lora_rank else "yes"


def metadata_rows(metadata: dict[str, Any] | None) -> list[tuple[str, str]]:
    """A line with the user's metadata, if there is any."""
    if not metadata:
        return []
    return [("Metadata", ", ".join(f"{key}={value}" for key, value in metadata.items()))]
