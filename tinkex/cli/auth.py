"""`tinkex auth`: the key for the official service, in the credentials file of the official SDK.

Keys of other servers are not stored: give them to each command, or in TINKER_API_KEY.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from tinkex.cli import formatting
from tinkex.cli.listing import open_rest
from tinkex.cli.options import format_option, option, server_options


@click.group()
def auth() -> None:
    """Store the key for the official service, and see which key is used."""


@auth.command()
@click.option("--api-key", help="The key. Default: it is asked for, and not shown.")
@option("--name", None, "tinkex", "Name of the key in the file.")
@click.option(
    "--base-url", help="Server that is asked whether it takes the key. Default: the official one."
)
@click.option("--no-check", is_flag=True, help="Store the key without asking a server.")
def login(api_key: str | None, name: str, base_url: str | None, no_check: bool) -> None:
    """Store a key for the official service."""
    from tinkex import config

    key = (api_key or click.prompt("API key", hide_input=True)).strip()
    if not key.startswith("tml-") or any(c.isspace() for c in key):
        raise click.UsageError("A key of the official service begins with 'tml-', without spaces.")
    record: dict[str, Any] = {"type": "manual", "key": key, "name": name}
    if not no_check:
        with open_rest(base_url=base_url or config.OFFICIAL_URL, api_key=key) as rest:
            owner = rest.whoami()
        record["details"] = {
            "org_details": {"name": owner.organization or ""},
            "user_details": {"email": owner.email or ""},
        }
    stored = _read()
    stored["keys"][name] = record
    stored["default"] = name
    _write(stored)
    formatting.say(f"Stored the key {_masked(key)} as {name!r} in {_path()}.")


@auth.command()
@click.option("--name", help="Name of the key in the file. Default: the one that is used.")
def logout(name: str | None) -> None:
    """Remove a stored key."""
    stored = _read()
    name = name or stored["default"]
    if name is None or name not in stored["keys"]:
        there = ", ".join(map(repr, stored["keys"])) or "none"
        raise click.ClickException(f"There is no such key in {_path()}; stored are: {there}.")
    del stored["keys"][name]
    if stored["default"] == name:
        stored["default"] = None
    _write(stored)
    formatting.say(f"Removed the key {name!r} from {_path()}.")


@auth.command()
@format_option
def status(as_json: bool) -> int:
    """Show which key the official service would get; exit status 1 if there is none."""
    from tinkex import config

    source, key = config.found_key()
    if as_json:
        formatting.say_json({"source": source or None, "key": _masked(key) if key else None})
    elif source:
        formatting.say(f"{_masked(key)} from {source}" if key else f"A key from {source}")
    else:
        formatting.say("There is no key. Store one with `tinkex auth login`.")
    return 0 if source else 1


@auth.command()
@format_option
@server_options
def whoami(as_json: bool, **server: str | None) -> None:
    """Ask the server whom the key belongs to."""
    with open_rest(**server) as rest:
        owner = rest.whoami()
    if as_json:
        formatting.say_json({"user": owner.email, "organization": owner.organization})
    else:
        formatting.say(f"{owner.email or 'unknown'}, {owner.organization or 'unknown'}")


def _path() -> Path:
    from tinkex import config

    return config.CREDENTIALS_FILE.expanduser()


def _read() -> dict[str, Any]:
    """The stored keys. Raises ClickException if the file has another format."""
    empty: dict[str, Any] = {"version": 1, "default": None, "keys": {}}
    try:
        stored = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return empty
    except ValueError:
        stored = None
    if not isinstance(stored, dict) or not isinstance(stored.get("keys"), dict):
        raise click.ClickException(
            f"{_path()} is not a file of keys; move it away, or repair it, and try again."
        )
    return {**empty, **stored}


def _write(stored: dict[str, Any]) -> None:
    """Replace the file as a whole; only its owner may read it."""
    path = _path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({k: v for k, v in stored.items() if v is not None}, file, indent=2)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _masked(key: str) -> str:
    return f"{key[:4]}...{key[-4:]}" if len(key) > 12 else "..."


COMMANDS = (auth,)
