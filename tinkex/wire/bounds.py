"""Counts the objects in a body before any of them is created.

A few kilobytes can encode millions of empty lists or messages, each of which costs a hundred bytes
and a microsecond. Counting reads only the bytes, and stops as soon as a bound is exceeded.
"""

from __future__ import annotations

import attrs

#: Bytes scanned at a time; other threads can run in between.
PIECE = 1 << 20


@attrs.frozen
class JsonSize:
    """Upper bounds of the values and containers in a JSON text, including characters in strings."""

    values: int
    containers: int


def json_size(body: bytes, most_values: int, most_containers: int) -> JsonSize:
    """Count until the end, or until one of the two bounds is exceeded."""
    values, containers = 1, 0
    for start in range(0, len(body), PIECE):
        piece = body[start : start + PIECE]
        containers += piece.count(b"[") + piece.count(b"{")
        values += piece.count(b",")
        if values + containers > most_values or containers > most_containers:
            break
    return JsonSize(values + containers, containers)


#: Fields that may be repeated, by message: number -> inner message. Other fields need no more
#: memory than their bytes.
_Tree = dict[int, "_Tree"]
_TENSOR: _Tree = {4: {}}
_ENTRY: _Tree = {1: {}, 2: _TENSOR}
_DATUM: _Tree = {1: {}, 2: _ENTRY}
_BATCH: _Tree = {3: _DATUM}


@attrs.frozen
class BatchSize:
    """The size of a protobuf ForwardBackwardRequest: datums, and fields at all levels."""

    datums: int
    fields: int


def batch_size(body: bytes, most_datums: int, most_fields: int) -> BatchSize:
    """Count until the end, or until one of the two bounds is exceeded.

    A malformed body is counted as far as it can be read; the parser refuses it later.
    """
    datums = fields = 0
    todo = [(0, len(body), _BATCH)]
    while todo:
        at, end, tree = todo.pop()
        while at < end and datums <= most_datums and fields <= most_fields:
            tag, at = _varint(body, at, end)
            number, kind = tag >> 3, tag & 7
            fields += 1
            if kind == 0:
                _, at = _varint(body, at, end)
            elif kind == 2:
                length, at = _varint(body, at, end)
                inside = tree.get(number)
                if inside is not None and at + length <= end:
                    if tree is _BATCH:
                        datums += 1
                    if tree is _TENSOR:  # packed numbers of at least a byte each
                        fields += length
                    elif inside:
                        todo.append((at, at + length, inside))
                at += length
            elif kind in (1, 5):
                at += 8 if kind == 1 else 4
            else:  # groups; the parser refuses them or ignores them
                continue
    return BatchSize(datums, fields)


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    """A number and its end, which is at most *end*."""
    value = shift = 0
    while at < end and shift < 70:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    return value, end
