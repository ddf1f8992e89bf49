"""`tinkex home`: maintain the folder in which the local server stores its files."""

from __future__ import annotations

from pathlib import Path

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.options import format_option


@click.group()
def home() -> None:
    """Maintain the folder of the local server."""


@home.command()
@click.option(
    "--home",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to check. Default: TINKEX_HOME, or ~/.tinkex.",
)
@format_option
def check(folder: Path | None, as_json: bool) -> int:
    """Compare the files of all checkpoints with the hashes recorded at saving.

    Changes nothing; servers may be running. The exit status is 1 if a checkpoint is damaged.
    """
    from tinkex import config, errors

    try:
        from tinkex.server.home import HomeError
        from tinkex.server.home_check import check_home
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"`tinkex home` needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    try:
        found = check_home(folder or config.home())
    except HomeError as exc:
        raise errors.TinkexError(str(exc)) from exc
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


COMMANDS = (home,)
