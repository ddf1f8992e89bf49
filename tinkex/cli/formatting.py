"""Formatting of command output: tables, JSON, relative times, sizes.

Results go to stdout. Does not know what the results mean.
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
#: Times further away than this are shown as a date.
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
    """Parse an ISO 8601 time, in UTC by default; None if *text* is not one."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def when(text: str | None, missing: str = "?", now: datetime | None = None) -> str:
    """An ISO 8601 time relative to now: "3 hours ago", "in 2 days", or the date if it is far away.

    Args:
        missing: returned if there is no time.
        now: for tests.
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
    """A duration in the largest unit that expresses it exactly: 30 days, 90 minutes."""
    for unit, length in _TIMES:
        if seconds and seconds % length == 0:
            return plural(seconds // length, unit)
    return plural(seconds, "second")


def plural(number: int, thing: str) -> str:
    """1 checkpoint, 2 checkpoints."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns as wide as their content; nothing is cut, so that it can be copied."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()

    return "\n".join([click.style(line(headings), bold=True), *map(line, rows)])


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair per line."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{click.style(name.ljust(width), bold=True)}  {value}" for name, value in rows
    )


def say(text: str) -> None:
    """Print a result on stdout. A closed pipe, as in `tinkex ... | head`, is not an error."""
    try:
        click.echo(text)
    except BrokenPipeError:
        # Discard the rest of the output, also what is still in Python's buffers.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_json(value: Any) -> None:
    """Print plain data as JSON on stdout."""
    say(json.dumps(value, indent=2, ensure_ascii=False))
