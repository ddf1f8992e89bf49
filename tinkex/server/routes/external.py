"""External weights: files of a model that are fetched one by one, from URLs that need no key.

A URL is signed with the secret of the home. It is valid for one file until it expires, even across
a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from starlette.responses import FileResponse, Response

from tinkex import types, wire
from tinkex.server.database import CheckpointRow, iso
from tinkex.server.encryption import recipients_of
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.request_context import Call, reply
from tinkex.server.routes.archives import base_url
from tinkex.server.routes.checkpoints import CHECKPOINT, checkpoint_path
from tinkex.server.routes.training import check_name, check_ttl, numbered, submit

#: Lifetime of the URLs in seconds.
URL_SECONDS = 3600


async def save(call: Call) -> Response:
    request, body = await call.read(types.SaveWeightsExternalRequest)
    check_name(request.path)
    check_ttl(request.ttl_seconds)
    if request.age_encryption_recipients is not None:
        try:
            recipients_of(request.age_encryption_recipients)
        except (TypeError, ValueError) as exc:
            raise Refusal(400, str(exc)) from exc
    return await submit(call, "SaveWeightsExternal", request, body)


async def urls(call: Call) -> Response:
    """A URL for each file."""
    path = checkpoint_path(call)
    row = await call.site.in_pool(call.site.store.checkpoints.find, path, call.owner)
    if row.kind != "external":
        raise Refusal(
            400,
            f"{shown(path, 300)} has no URLs of single files; only external weights have. Save "
            "some with save_weights_external, or fetch the archive: tinkex checkpoint download.",
        )
    await call.site.in_pool(call.site.store.checkpoints.verify, Path(row.directory))
    base = base_url(call)
    if not base:
        raise Refusal(
            400,
            "this server does not know the address by which you reach it, so it cannot give URLs; "
            "set TINKEX_PUBLIC_URL where it is started.",
        )
    expires = int(time.time()) + URL_SECONDS
    names = await call.site.in_pool(_files, Path(row.directory))
    found = {name: f"{base}{_signed(call, row, name, expires)}" for name in names}
    answer = types.ExternalWeightsUrlsResponse(found, iso(expires))
    return reply(wire.dumps(wire.to_json(answer)), headers={"Cache-Control": "no-store"})


def _files(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
    )


def _signed(call: Call, row: CheckpointRow, name: str, expires: int) -> str:
    query = {"expires": expires, "signature": _signature(call, row, name, expires)}
    place = quote(f"{row.run_id}/{row.checkpoint_id}/{name}")
    return f"{wire.PREFIX}files/{place}?{urlencode(query)}"


def _signature(call: Call, row: CheckpointRow, name: str, expires: int) -> str:
    """The signature of one file of one save; a later save under the same name has another."""
    signed = "\n".join(["external weights", row.path, str(row.created_at), name, str(expires)])
    secret = call.site.store.home.secret()
    return hmac.new(secret, signed.encode(), hashlib.sha256).hexdigest()


async def download(call: Call) -> Response:
    """One file; the signed URL grants access. Supports Range, If-Range and HEAD."""
    run_id, checkpoint, name = (call.parameter(key) for key in ("run_id", "checkpoint", "name"))
    query = call.request.query_params
    expires, signature = query.get("expires", ""), query.get("signature", "")
    path = f"tinker://{run_id}/external_weights/{checkpoint}"
    row = await call.site.in_pool(call.site.store.checkpoints.named, path)
    is_number = expires.isdecimal() and len(expires) < 13
    good = row is not None and is_number and _signature(call, row, name, int(expires))
    if not good or not hmac.compare_digest(str(good), signature):
        raise Refusal(
            403,
            "this URL is not one that this server gave, or its file is gone; get new ones with "
            "get_external_weights_urls.",
        )
    if int(expires) < time.time():
        raise Refusal(403, "this URL has expired; get a new one with get_external_weights_urls.")
    file = Path(row.directory if row else "") / name
    return FileResponse(
        file, media_type="application/octet-stream", headers={"Cache-Control": "no-store"}
    )


ENDPOINTS: list[tuple[str, str, Any]] = [
    ("POST", "save_weights_external", numbered("SaveWeightsExternal", save)),
    ("GET", f"{CHECKPOINT}/external_weights_urls", urls),
]
_FILE = "files/{run_id}/external_weights/{checkpoint}/{name:path}"
#: These need no key: the signature in the URL is enough.
PUBLIC: list[tuple[str, str, Any]] = [("GET", _FILE, download), ("HEAD", _FILE, download)]
