"""`tinkex ui`: open the web page of a server in the browser.

Finds a server and opens its page. Does not know what the page shows.
"""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from tinkex.cli import formatting
from tinkex.cli.options import server_options

#: Timeout, in seconds, of the only request of this module.
_TIMEOUT = 10.0


@click.command()
@server_options
@click.option(
    "--home",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the server that is started if none runs. Default: TINKEX_HOME, or ~/.tinkex.",
)
@click.option("--no-browser", is_flag=True, help="Only print the address.")
def ui(base_url: str | None, api_key: str | None, home: Path | None, no_browser: bool) -> int:
    """Open the page that shows runs, curves, checkpoints, and a chat.

    It is the page of the server at --base-url; without one, of the embedded engine of a running
    program; if there is none, a server is started here and runs until Ctrl-C.
    """
    from tinkex import config

    settings = None if base_url is None else config.load(base_url=base_url, api_key=api_key)
    candidates = [settings.base_url] if settings is not None else config.engine_addresses()
    for address in candidates:
        key = config.load(base_url=address, api_key=api_key).api_key
        path = _entrance(address, key, required=base_url is not None)
        if path is not None:
            _open(address + path, no_browser)
            return 0
    return _serve(home, no_browser)


def _entrance(address: str, key: str, *, required: bool) -> str | None:
    """The path for signing in once; None if no server answers and none is required."""
    import requests

    from tinkex import errors

    headers = {"X-API-Key": key} if key else {}
    try:
        response = requests.post(f"{address}/ui/token", headers=headers, timeout=_TIMEOUT)
    except requests.RequestException as exc:
        if not required:
            return None
        raise errors.TinkexError(f"no server answers at {address}: {exc}") from exc
    if response.status_code == 404:
        raise errors.TinkexError(
            f"the server at {address} has no page; that of `tinkex serve` has one."
        )
    if not response.ok:
        reason = (
            response.json().get("error", "")
            if "json" in response.headers.get("content-type", "")
            else ""
        )
        raise errors.TinkexError(f"{address} answers {response.status_code}: {reason}")
    return str(response.json()["path"])


def _serve(home: Path | None, no_browser: bool) -> int:
    from tinkex import errors

    try:
        from tinkex.server import app
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"the training server needs {exc.name}, which is not installed. "
            "Install it with: pip install 'tinkex[local]'"
        ) from exc
    status: int = app.main(home=home, on_ready=lambda url: _open(f"{url}/", no_browser))
    return status


def _open(url: str, no_browser: bool) -> None:
    if no_browser or not webbrowser.open(url):
        formatting.say(f"Open this address in a browser: {url}")
    else:
        formatting.say(f"Opened {url.partition('?')[0]} in the browser.")


COMMANDS = (ui,)
