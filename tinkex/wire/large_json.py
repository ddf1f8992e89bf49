"""Parsing of large JSON texts in short pieces, so that other threads get their turn.

The standard library's C parser holds the interpreter lock until it is done: 0.2 s for a million
numbers. Here lists of numbers are parsed in pieces, and everything else by the standard library's
Python parser, which lets other threads run.
"""

from __future__ import annotations

import json
import json.decoder
import json.scanner
from collections.abc import Callable
from typing import Any

#: Characters of a list of numbers that are parsed at a time: about 2 ms.
PIECE = 1 << 16

_ParseConstant = Callable[[str], Any]


class _Decoder(json.JSONDecoder):
    """Like JSONDecoder, with lists of numbers in pieces and the rest in Python."""

    parse_array: Any

    def __init__(self, parse_constant: _ParseConstant) -> None:
        super().__init__(parse_constant=parse_constant)
        self._numbers = json.JSONDecoder(parse_constant=parse_constant)
        self._python_array = self.parse_array
        self.parse_array = self._array
        python_scanner: Any = json.scanner
        self.scan_once = python_scanner.py_make_scanner(self)

    def _array(self, place: tuple[str, int], scan_once: Any) -> tuple[list[Any], int]:
        """Parse the list at a place in a text; return the list, and its end."""
        text, start = place
        end = text.find("]", start)
        if end < 0 or any(text.find(mark, start, end) >= 0 for mark in '[{"'):
            found: tuple[list[Any], int] = self._python_array(place, scan_once)
            return found
        values: list[Any] = []
        while end - start > PIECE:
            comma = text.rfind(",", start, start + PIECE)
            if comma < 0:  # not a list of numbers: the parser gives the reason
                break
            values += self._numbers.decode(f"[{text[start:comma]}]") or self._empty(text, comma)
            start = comma + 1
        rest = self._numbers.decode(f"[{text[start:end]}]")
        if values and not rest:
            self._empty(text, end)
        return values + rest, end + 1

    def _empty(self, text: str, at: int) -> list[Any]:
        """Raise JSONDecodeError: a value is missing before or after a comma."""
        raise json.JSONDecodeError("Expecting value", text, at)


def loads(text: str, parse_constant: _ParseConstant) -> Any:
    """The same as `json.loads`. Raises ValueError (also JSONDecodeError) or RecursionError."""
    return _Decoder(parse_constant).decode(text)
