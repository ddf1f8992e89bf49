"""What the commands that list stored things have in common: whom they ask, how many, in what words.

The clients are imported when a command runs, so that `tinkex --help` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tinkex.cli import formatting

if TYPE_CHECKING:  # for annotations alone: neither numpy nor requests is loaded for --help
    from tinkex import types
    from tinkex.rest import RestClient

T = TypeVar("T")

#: Things listed unless --limit says otherwise.
LISTED = 20
#: Things asked for at once, at most.
PAGE = 100
#: Seconds that a server may be away in the middle of a command: somebody waits for it.
NO_ANSWER = 30.0

limit_option = click.option(
    "--limit",
    type=click.IntRange(0),
    default=LISTED,
    show_default=True,
    help="List so many, the newest; 0 lists all.",
)
scope_option = click.option(
    "--access-scope",
    type=click.Choice(["owned", "accessible"]),
    default="owned",
    show_default=True,
    help="Yours, or all that you may see.",
)


@contextmanager
def open_rest(base_url: str | None, api_key: str | None) -> Iterator[RestClient]:
    """A client of what is stored on the server that is named, or in the embedded home."""
    from tinkex import config
    from tinkex.rest import RestClient
    from tinkex.runtime.session import Connection, connect

    patience = config.Patience(no_answer=NO_ANSWER)
    settings, engine = connect(base_url, api_key, patience=patience)
    with closing(Connection(settings, engine=engine)) as connection:
        yield RestClient(connection=connection)


def first(things: Iterator[T], limit: int) -> tuple[list[T], bool]:
    """At most *limit* of them (0: all), and whether there are more."""
    if not limit:
        return list(things), False
    found = list(islice(things, limit + 1))
    return found[:limit], len(found) > limit


def page_for(limit: int) -> int:
    """How many to ask for at once, if *limit* and one more are wanted."""
    return min(limit + 1, PAGE) if limit else PAGE


def say_how_many(thing: str, number: int, more: bool) -> None:
    """On stderr, if there is anything to say: that there are none, or more than are listed."""
    if not number:
        click.echo(f"There is no {thing}.", err=True)
    elif more:
        click.echo(f"The newest {formatting.plural(number, thing)}; --limit 0 lists all.", err=True)


def lora(of: types.TrainingRun | types.WeightsInfoResponse) -> str:
    """Its rank, in words."""
    if not of.is_lora:
        return "no"
    return f"rank {of.lora_rank}" if of.lora_rank else "yes"


def metadata_rows(metadata: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The line on the user's own notes, if there are any."""
    if not metadata:
        return []
    return [("Metadata", ", ".join(f"{key}={value}" for key, value in metadata.items()))]
