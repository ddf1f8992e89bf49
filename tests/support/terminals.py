"""The other end of a pseudo-terminal."""

from __future__ import annotations

import os


def read_all(terminal: int) -> str:
    """Everything written to the other end, until it is closed."""
    written = b""
    try:
        while more := os.read(terminal, 4096):
            written += more
    except OSError:  # on Linux, the other end is closed
        pass
    os.close(terminal)
    return written.decode()
