"""How results are written: tables and JSON, times in words, sizes in units.

Results go to stdout. Knows nothing of what the results mean.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import click

_TIMES = (("day", 86400), ("hour", 3600), ("minute", 60))
#: Beyond this a date says more than a number of days.
_DATE_AFTER = 60 * 86400  # seconds


def size(count: int | None) -> str:
    """Bytes in units of 1024: 512 B, 4.0 KB, 1.3 GB."""
    if count is None:
        return "?"
    if count < 1024:
        return f"{count} B"
    value, units = count / 1024, ["KB", "MB", "GB", "TB"]
    while value >= 1023.95 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.1f} {units[0]}"


def moment(text: str | None) -> datetime | None:
    """An ISO 8601 time, in UTC unless it says otherwise; None if it is none."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def when(text: str | None, missing: str = "?", now: datetime | None = None) -> str:
    """An ISO 8601 time as seen from now: "3 hours ago", "in 2 days", or its date if that is far.

    Args:
        missing: what a time that is not there means.
    """
    if not text:
        return missing
    found = moment(text)
    if found is None:
        return text
    seconds = (found - (now or datetime.now(timezone.utc))).total_seconds()
    if abs(seconds) >= _DATE_AFTER:
        return f"{found:%Y-%m-%d}"
    for unit, length in _TIMES:
        number = int(abs(seconds) // length)
        if number:
            return f"in {plural(number, unit)}" if seconds > 0 else f"{plural(number, unit)} ago"
    return "just now" if seconds <= 0 else "in less than a minute"


def duration(seconds: int) -> str:
    """A length of time, exactly, in the largest unit that does it: 30 days, 90 minutes."""
    for unit, length in _TIMES:
        if seconds and seconds % length == 0:
            return plural(seconds // length, unit)
    return plural(seconds, "second")


def plural(number: int, thing: str) -> str:
    """1 checkpoint, 2 checkpoints."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what is in them; nothing is cut, so that it can be copied."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()

    return "\n".join([click.style(line(headings), bold=True), *map(line, rows)])


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, one to a line."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{click.style(name.ljust(width), bold=True)}  {value}" for name, value in rows
    )


def say(text: str) -> None:
    """A result, on stdout. That nobody reads on, as in `tinkex ... | head`, is no error."""
    try:
        click.echo(text)
    except BrokenPipeError:
        # What is still to come, and what is left in Python's buffers, is written into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_json(value: Any) -> None:
    """Plain data, as a result."""
    say(json.dumps(value, indent=2, ensure_ascii=False))
