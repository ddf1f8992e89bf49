"""Checkpoint downloads: a ticket first, then the tar archive, whole or in ranges."""

from __future__ import annotations

import base64
import re
import secrets
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import attrs
from starlette.responses import Response, StreamingResponse

from tinkex import wire
from tinkex.server.archive import Archive
from tinkex.server.auth import LOOPBACK, host_name
from tinkex.server.database import CheckpointRow, iso
from tinkex.server.http_errors import Refusal, not_found, shown
from tinkex.server.request_context import Call, reply
from tinkex.server.routes.checkpoints import CHECKPOINT, checkpoint_path

#: Seconds during which a ticket can start or resume a download.
TICKET_SECONDS = 3600


@attrs.frozen
class Ticket:
    row: CheckpointRow
    expires_at: float


async def give_ticket(call: Call) -> Response:
    """Redirect (302) to a download URL that needs no key; the URL is also in the JSON body."""
    row = await call.site.in_pool(
        call.site.store.checkpoints.find, checkpoint_path(call), call.owner
    )
    await call.site.in_pool(call.site.store.checkpoints.verify, Path(row.directory))
    now = time.time()
    tickets = call.site.tickets
    for token in [token for token, ticket in tickets.items() if ticket.expires_at < now]:
        del tickets[token]
    token = secrets.token_urlsafe(24)
    tickets[token] = Ticket(row, now + TICKET_SECONDS)
    # The ticket is in the query, which clients and proxies tend not to log.
    url = f"{base_url(call)}{wire.PREFIX}archives/{_file_name(row)}?ticket={token}"
    expires = formatdate(now + TICKET_SECONDS, usegmt=True)
    return reply(
        {"url": url, "expires": iso(now + TICKET_SECONDS)},
        302,
        {"Location": url, "Expires": expires, "Cache-Control": "no-store"},
    )


def base_url(call: Call) -> str:
    """The server's address for the client: the configured one, or a name of this machine.

    Other Host headers are not repeated; "" makes the URL relative to the requested one.
    """
    if call.site.public_url is not None:
        return call.site.public_url
    host = call.request.headers.get("host", "")
    own = {*LOOPBACK, (call.request.scope.get("server") or ("",))[0]}
    if host_name(f"//{host}") not in own or not _HOST.match(host):
        return ""
    scheme = call.request.headers.get("x-forwarded-proto", call.request.url.scheme)
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


#: A host name or address, with a port or without.
_HOST = re.compile(r"[A-Za-z0-9.\[\]:-]+\Z")


def _file_name(row: CheckpointRow) -> str:
    return row.checkpoint_id.replace("/", "-") + ".tar"


async def download(call: Call) -> Response:
    """The tar archive. Supports a single Range, If-Range, If-None-Match and HEAD."""
    ticket = call.site.tickets.get(call.request.query_params.get("ticket", ""))
    if ticket is None or ticket.expires_at < time.time():
        raise not_found("this download link (it may have expired; request a new one), named", "")
    row: CheckpointRow = ticket.row
    archive = await call.site.in_pool(_open, row)
    digest = row.sha256
    if digest is None:
        digest = await call.site.in_pool(_hash, call, archive, row)
    etag = f'"{digest}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(digest)).decode()}:",
        "Content-Disposition": f'attachment; filename="{_file_name(row)}"',
    }
    if call.request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    start, end = _range(call, archive.size, etag)
    partial = (start, end) != (0, archive.size)
    if partial:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{archive.size}"
    headers["Content-Length"] = str(end - start)
    body = iter(()) if call.request.method == "HEAD" else archive.read(start, end)
    return StreamingResponse(
        body, 206 if partial else 200, headers=headers, media_type="application/x-tar"
    )


def _open(row: CheckpointRow) -> Archive:
    try:
        return Archive.of(Path(row.directory), row.created_at)
    except FileNotFoundError as exc:
        raise not_found("checkpoint", row.path) from exc


def _hash(call: Call, archive: Archive, row: CheckpointRow) -> str:
    digest = archive.sha256()
    call.site.store.checkpoints.set_sha256(row.path, row.directory, digest)
    for token, ticket in list(call.site.tickets.items()):
        if ticket.row.directory == row.directory:
            known = attrs.evolve(ticket.row, sha256=digest)
            call.site.tickets[token] = attrs.evolve(ticket, row=known)
    return digest


_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z")


def _range(call: Call, size: int, etag: str) -> tuple[int, int]:
    """The requested half-open range; everything if there is none, or if the archive has changed.

    Raises:
        Refusal: 416 for a range outside of the archive.
    """
    text = call.request.headers.get("range")
    if text is None or call.request.headers.get("if-range", etag) != etag:
        return 0, size
    match = _RANGE.match(text)
    if match is None or match.groups() == ("", ""):
        return 0, size  # several ranges or another unit: HTTP allows sending everything
    first, last = match.groups()
    if first:
        start, end = int(first), int(last) + 1 if last else size
    else:
        start, end = max(0, size - int(last)), size
    if start >= min(end, size):
        raise Refusal(
            416,
            f"the range {shown(text)} is outside of the archive of {size} bytes.",
            {"Content-Range": f"bytes */{size}"},
        )
    return start, min(end, size)


ENDPOINTS: list[tuple[str, str, Any]] = [("GET", f"{CHECKPOINT}/archive", give_ticket)]
#: These need no key: the ticket in the URL is enough.
PUBLIC: list[tuple[str, str, Any]] = [
    ("GET", "archives/{name}", download),
    ("HEAD", "archives/{name}", download),
]
