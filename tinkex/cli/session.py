"""`tinkex session`: list sessions, and show the runs and samplers of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.listing import (
    first,
    limit_option,
    metadata_rows,
    open_rest,
    page_for,
    print_count,
    scope_option,
)
from tinkex.cli.options import format_option, server_options

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex.rest import RestClient

#: Sessions looked up at the same time.
AT_ONCE = 8


@click.group()
def session() -> None:
    """List sessions."""


@session.command("list")
@limit_option
@scope_option
@format_option
@server_options
def list_sessions(limit: int, access_scope: Any, as_json: bool, **server: str | None) -> None:
    """List sessions, newest first."""
    from concurrent.futures import ThreadPoolExecutor

    with open_rest(**server) as rest:
        ids, more = first(rest.iter_sessions(access_scope, page=page_for(limit)), limit)
        pool = ThreadPoolExecutor(AT_ONCE, "tinkex-lookup")
        try:
            found = list(pool.map(lambda one: _session(rest, one, access_scope), ids))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for the others
    if as_json:
        formatting.say_json({"sessions": found, "more": more})
        return
    print_count("session", len(found), more)
    if found:
        rows = [
            (
                one["session_id"],
                str(len(one.get("training_run_ids", []))),
                str(len(one.get("sampler_ids", []))),
                one.get("display_name") or "",
                ", ".join(f"{k}={v}" for k, v in (one.get("user_metadata") or {}).items()),
            )
            for one in found
        ]
        formatting.say(formatting.table(("Session", "Runs", "Samplers", "Name", "Metadata"), rows))


def _session(rest: RestClient, session_id: str, access_scope: Any) -> dict[str, Any]:
    """The session as a dict; only its id if it no longer exists or the server has no details."""
    from tinkex import errors

    try:
        return {
            "session_id": session_id,
            **attrs.asdict(rest.get_session(session_id, access_scope)),
        }
    except errors.NotFoundError:
        return {"session_id": session_id}


@session.command("info")
@click.argument("session_id", metavar="SESSION")
@scope_option
@format_option
@server_options
def session_info(session_id: str, access_scope: Any, as_json: bool, **server: str | None) -> None:
    """Show the training runs and samplers of a session."""
    with open_rest(**server) as rest:
        found = rest.get_session(session_id, access_scope)
    if as_json:
        formatting.say_json({"session_id": session_id, **attrs.asdict(found)})
        return
    rows = [("Session", session_id)]
    rows += [("Name", found.display_name)] if found.display_name else []
    rows += [("Run", run_id) for run_id in found.training_run_ids]
    rows += [("Sampler", sampler_id) for sampler_id in found.sampler_ids]
    formatting.say(formatting.facts([*rows, *metadata_rows(found.user_metadata)]))


COMMANDS = (session,)
