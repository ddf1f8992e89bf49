"""JSON text: plain data to UTF-8 bytes and back, with an error for what JSON cannot express."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from tinkex.wire import large_json
from tinkex.wire.problems import DecodeError

#: Texts with more characters are parsed in pieces.
_LARGE_TEXT = 1 << 18


def dumps(payload: Any) -> bytes:
    """Write *payload* as compact JSON.

    Raises:
        ValueError: If JSON cannot express it: NaN, infinity, or objects of other types.
    """
    try:
        return json.dumps(payload, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (ValueError, TypeError, RecursionError) as exc:
        raise ValueError(f"this cannot be sent as JSON: {exc}") from exc


def loads(body: bytes) -> Any:
    """Read JSON from *body*; the inverse of `dumps`.

    Raises:
        DecodeError: If *body* is not UTF-8, not JSON (NaN and Infinity are not), or nested too
            deeply to read.
    """
    try:
        text = body.decode("utf-8")
        if len(text) > _LARGE_TEXT:
            return large_json.loads(text, _refuse_constant)
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise DecodeError("the body is not readable JSON: it is nested too deeply.") from exc
    except ValueError as exc:  # also JSONDecodeError and UnicodeDecodeError
        raise DecodeError(f"the body is not JSON ({exc}); it begins with {body[:40]!r}.") from exc


def _refuse_constant(name: str) -> NoReturn:
    """Called by the json module for NaN, Infinity and -Infinity."""
    raise ValueError(f"{name} is not JSON")
