"""Memory of the machine: how much there is, how much is free, and how malloc reuses it.

Does not know what the memory is used for.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

#: Files that limit the memory of a container: cgroup version 2, then version 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_USAGES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def kind_of(device: torch.device) -> str:
    """ "cpu" or "cuda" (any accelerator): the key of tables of sizes."""
    return "cpu" if device.type == "cpu" else "cuda"


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the process may use: of the accelerator, or of the machine.

    On a CPU the container's limit counts where there is one.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _first_number(_LIMITS)
    return total if limit is None else min(total, limit)


def available_memory(device: torch.device) -> int:
    """Bytes that can be allocated now without swapping, including what the system caches."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = total_memory(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = min(free, 1024 * int(fields["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):  # not Linux: the total is the best known bound
        return free
    limit, usage = _first_number(_LIMITS), _first_number(_USAGES)
    if limit is not None and usage is not None:
        # The usage includes the page cache, which the system drops when memory is needed.
        cached = 1024 * int(fields.get("Cached", "0").split()[0])
        free = min(free, max(0, limit - max(0, usage - cached)))
    return free


def _first_number(paths: tuple[str, ...]) -> int | None:
    """The number in the first of the files that exists; None if it says "max" or none exists."""
    for path in paths:
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def gigabytes(size: int) -> str:
    """Format a number of bytes: "1.5 GB", "300 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def keep_freed_memory() -> None:
    """Make glibc's malloc keep what torch frees, for the next tensor of that size.

    By default malloc returns every large block to the system and requests a new one, whose pages
    the system fills with zeros one by one. For elementwise operations that takes longer than the
    computation. One arena, so that memory freed by one thread serves the others.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # names and numbers of malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)
