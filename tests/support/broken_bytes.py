"""Bytes that no reader may crash on."""

from __future__ import annotations

import random


def broken_bodies(*whole: bytes) -> list[bytes]:
    """Truncated and altered forms of *whole*, random bytes, and answers of other programs."""
    cut = [body[:n] for body in whole for n in range(0, len(body), 3)]
    rng = random.Random(0)
    flipped = []
    for body in whole:
        for _ in range(300):
            broken = bytearray(body)
            broken[rng.randrange(len(body))] = rng.randrange(256)
            flipped.append(bytes(broken))
    noise = [rng.randbytes(n) for n in range(1, 200)]
    return [*cut, *flipped, *noise, b'{"detail":"Not Found"}', b"<html></html>", b"\x0a" * 10_000]
