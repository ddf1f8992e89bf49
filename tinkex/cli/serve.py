"""`tinkex serve`: run the training server in this process.

Knows only the options; the server is imported when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0 is a free one."
)
@click.option(
    "--base-model",
    "base_models",
    multiple=True,
    help="Load this model at once. May be repeated; others are loaded when asked for.",
)
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where runs and checkpoints are kept. Default: TINKEX_HOME, or ~/.tinkex.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="TINKEX_SERVE_KEYS",
    show_envvar=True,
    help="Key of a user; each sees only what is theirs. May be repeated. Without one, who comes "
    "on loopback is let in, and for any other --host a key is made up and printed.",
)
@click.option(
    "--dialect",
    type=click.Choice(["both", "json"]),
    default="both",
    show_default=True,
    help="What is spoken: JSON and protobuf, or JSON alone.",
)
@click.option("--announce", type=click.Path(path_type=Path), hidden=True)
@click.option("--parent-pid", type=int, hidden=True)
def serve(**options: Any) -> int:
    """Run the training server.

    Serves the Tinker API until it is stopped: for other processes, machines (with --api-key) and
    the official SDK. Prints its address.
    """
    from tinkex import errors

    try:
        from tinkex.server import app
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"the training server needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    status: int = app.main(**options)
    return status
