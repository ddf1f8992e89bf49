"""Errors of memory allocation, explained; and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

#: M_ARENA_MAX of malloc.h.
_ARENA_MAX = -8

#: Messages of torch's allocators, which raise RuntimeError, on a GPU a subclass of it.
_ON_CPU = re.compile(r"tried to allocate (\d+) bytes")
_ON_GPU = re.compile(r"[Tt]ried to allocate ([\d.]+) (KiB|MiB|GiB)")
_FREE_ON_GPU = re.compile(r"of which ([\d.]+) (KiB|MiB|GiB) is free")
_MIB = {"KiB": 1 / 1024, "MiB": 1.0, "GiB": 1024.0}
#: Parts of the messages of other allocation failures.
_MARKS = ("can't allocate memory", "out of memory", "not enough memory", "Cannot allocate memory")


def out_of_memory(exc: BaseException) -> str | None:
    """A sentence for an out-of-memory exception; None for any other."""
    text = str(exc)
    is_torch = isinstance(exc, RuntimeError) and any(mark in text for mark in _MARKS)
    if not isinstance(exc, MemoryError) and not is_torch:
        return None
    needed, free = _needed(text), _free(text)
    if needed is None:
        amount = "more memory than there is"
    elif free is None:
        amount = f"{needed:.0f} MiB of memory at once, more than there is"
    else:
        amount = f"{needed:.0f} MiB of memory at once, and {free:.0f} MiB were free"
    return (
        f"it needs {amount}; send fewer or shorter sequences in one request, or use a machine "
        "with more memory."
    )


def _needed(text: str) -> float | None:
    """MiB that could not be allocated."""
    on_cpu, on_gpu = _ON_CPU.search(text), _ON_GPU.search(text)
    if on_cpu is not None:
        return int(on_cpu[1]) / 2**20
    return None if on_gpu is None else float(on_gpu[1]) * _MIB[on_gpu[2]]


def _free(text: str) -> float | None:
    """MiB that were free: on the GPU from the message, else on this machine now."""
    on_gpu = _FREE_ON_GPU.search(text)
    if on_gpu is not None:
        return float(on_gpu[1]) * _MIB[on_gpu[2]]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(lines.split("MemAvailable:")[1].split()[0]) / 1024
    except (OSError, IndexError, ValueError):  # another system
        return None


def use_one_arena() -> None:
    """Let all threads allocate from malloc's main arena, since `trim` cannot shrink the others.
    Call it before other threads start, which may get their own arenas.

    With several arenas, a freed body of 30 MB stayed allocated until its thread's next allocation.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is not None and sys.platform.startswith("linux"):
        mallopt(_ARENA_MAX, 1)


def trim() -> None:
    """Return freed memory to the system, if the C library supports it (glibc does)."""
    malloc_trim = _of_c_library("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_c_library(name: str) -> Callable[..., int] | None:
    """A malloc function of glibc; None with other C libraries."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return function
