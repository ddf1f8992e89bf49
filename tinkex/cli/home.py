"""`tinkex home`: maintain the folder in which the local server stores its files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.options import format_option

Command = Callable[..., Any]


def _home_option(command: Command) -> Command:
    return click.option(
        "--home",
        "folder",
        type=click.Path(path_type=Path, file_okay=False),
        help="The home. Default: TINKEX_HOME, or ~/.tinkex.",
    )(command)


@contextlib.contextmanager
def _home_errors() -> Iterator[None]:
    """Turn exceptions of the server's modules into errors of the command line."""
    from tinkex import errors

    try:
        from tinkex.server.home import HomeError
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"`tinkex home` needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    try:
        yield
    except HomeError as exc:
        raise errors.TinkexError(str(exc)) from exc
    except OSError as exc:
        raise errors.TinkexError(f"{exc.filename}: {exc.strerror or exc}") from exc


@click.group()
def home() -> None:
    """Maintain the folder of the local server."""


@home.command()
@_home_option
@format_option
def check(folder: Path | None, as_json: bool) -> int:
    """Compare the files of all checkpoints with the hashes recorded at saving.

    Changes nothing; servers may be running. The exit status is 1 if a checkpoint is damaged.
    """
    from tinkex import config

    with _home_errors():
        from tinkex.server.home_check import check_home

        found = check_home(folder or config.home())
    damaged = [one for one in found if one.status == "damaged"]
    if as_json:
        checked = [attrs.asdict(one) for one in found]
        formatting.say_json({"ok": not damaged, "checkpoints": checked})
        return 1 if damaged else 0
    for one in damaged:
        formatting.say(f"damaged  {one.path}: {one.detail} (in {one.directory})")
    unknown = sum(one.status == "unknown" for one in found)
    formatting.say(
        f"{len(found)} checkpoints checked: {len(damaged)} damaged, {unknown} without hashes."
    )
    return 1 if damaged else 0


@home.command()
@_home_option
@format_option
def owners(folder: Path | None, as_json: bool) -> None:
    """List whose work a home holds: users, "local" without a key, key-... for a key without a name.

    Changes nothing; servers may be running.
    """
    from tinkex import config

    with _home_errors():
        from tinkex.server.home_owners import owners

        found = owners(folder or config.home())
    if as_json:
        formatting.say_json({"owners": [attrs.asdict(one) for one in found]})
        return
    for one in found:
        formatting.say(
            f"{one.name}  {one.sessions} sessions, {one.runs} runs, {one.checkpoints} checkpoints, "
            f"{formatting.size(one.bytes)}"
        )


@home.command()
@click.argument("owner")
@click.option("--as", "user", required=True, metavar="USER", help="The new owner's name, or local.")
@_home_option
def adopt(owner: str, user: str, folder: Path | None) -> None:
    """Give all work of OWNER to another user: sessions, runs, checkpoints, live models.

    For work from before there were keys (OWNER is local), or of a replaced key (key-...); `tinkex
    home owners` lists the names. No server may use the home meanwhile.
    """
    from tinkex import config

    with _home_errors():
        from tinkex.server.home_owners import adopt

        count = adopt(folder or config.home(), owner, user)
    formatting.say(f"{count} objects of {owner} belong to {user} now.")


@home.command()
@click.argument("key_id", required=False)
@_home_option
def revoke(key_id: str | None, folder: Path | None) -> None:
    """Revoke an API key: the servers of the home accept it no more, at once.

    KEY_ID is the id in a server's log and audit log. Without it, the key is asked for. The user's
    other keys and work are not affected.
    """
    from tinkex import config

    key = None if key_id else click.prompt("Key to revoke", hide_input=True)
    with _home_errors():
        from tinkex.server.home_owners import revoke

        revoked = revoke(folder or config.home(), key_id=key_id, key=key)
    formatting.say(f"The key {revoked} is revoked.")


@home.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_home_option
def backup(file: Path, folder: Path | None) -> None:
    """Write a backup of a home to FILE (a tar); servers may be running.

    It holds everything that is stored: checkpoints, runs, sessions. Live models are not in it.
    """
    from tinkex import config

    with _home_errors():
        from tinkex.server.home_backup import backup

        made = backup(folder or config.home(), file)
    formatting.say(f"{file}: {made.checkpoints} checkpoints, {formatting.size(made.bytes)}.")


@home.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_home_option
def restore(file: Path, folder: Path | None) -> None:
    """Make a home of the backup FILE, and check its checkpoints.

    The folder must be empty or new.
    """
    from tinkex import config

    with _home_errors():
        from tinkex.server.home_backup import restore

        place = folder or config.home()
        count = restore(file, place)
    formatting.say(f"{place}: {count} checkpoints, all whole.")


@home.command()
@_home_option
def gc(folder: Path | None) -> None:
    """Delete expired checkpoints and what servers that were killed left; servers may be running."""
    from tinkex import config

    with _home_errors():
        from tinkex.server.home_backup import collect_garbage

        count = collect_garbage(folder or config.home())
    formatting.say(f"{count} expired checkpoints and folders deleted.")


COMMANDS = (home,)
