"""Short reprs of values for a REPL and a notebook, whatever their size."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

#: Most items and tokens shown of a list, and characters of a text.
MOST_ITEMS, MOST_TOKENS, MOST_TEXT = 5, 8, 60


def count(number: int, thing: str) -> str:
    """`1 token`, `1,200 tokens`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def tokens(ids: np.ndarray) -> str:
    """The number of tokens, and the first ones: `200 tokens: 5 8 13 ...`."""
    if not len(ids):
        return "0 tokens"
    more = " ..." if len(ids) > MOST_TOKENS else ""
    return f"{count(len(ids), 'token')}: {' '.join(map(str, ids[:MOST_TOKENS].tolist()))}{more}"


def text(value: str) -> str:
    """*value* in quotes, cut to one short line."""
    return repr(value if len(value) <= MOST_TEXT else value[: MOST_TEXT - 3] + "...")


def lines(title: str, items: Sequence[Any], show: Any = str) -> str:
    """A title and a line for each of the first items."""
    shown = [f"  {show(item)}" for item in items[:MOST_ITEMS]]
    if len(items) > MOST_ITEMS:
        shown.append(f"  ... and {len(items) - MOST_ITEMS:,} more")
    return "\n".join([title, *shown])


def numbers(values: Mapping[str, float]) -> str:
    """Metrics in one line: `loss:sum=1.25, tokens=8`."""
    shown = [f"{name}={value:.6g}" for name, value in list(values.items())[:MOST_ITEMS]]
    more = [f"... {len(values) - MOST_ITEMS} more"] if len(values) > MOST_ITEMS else []
    return ", ".join(shown + more)


def html_fields(title: str, fields: Mapping[str, object]) -> str:
    """A table with a row for each name and value; None is omitted."""
    return _table(title, [], [[k, v] for k, v in fields.items() if v is not None])


def html_rows(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a header."""
    return _table(title, header, rows)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = f"<tr>{''.join(_cell('th', name) for name in header)}</tr>" if header else ""
    body = "".join(f"<tr>{''.join(_cell('td', value) for value in row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption>{head}{body}</table>"


def _cell(tag: str, value: object) -> str:
    shown = "" if value is None else html.escape(str(value))
    return f"<{tag} style='text-align:left'>{shown}</{tag}>"
