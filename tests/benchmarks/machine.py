"""This machine: its processor, its load, and its performance limits.

A limit is the best of many short tries, measured in the same run as the figures compared with it.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Seconds of one measurement of a limit.
SECONDS = 0.15


def describe() -> str:
    """The processor, cores, Python and system."""
    model = platform.processor() or platform.machine()
    cpuinfo, widest = Path("/proc/cpuinfo"), ""
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        found = re.search(r"model name\s*: (.*)", text)
        model = found[1] if found else model
        flags = set(text.split())
        widest = next((f" ({flag})" for flag in ("avx512f", "avx2") if flag in flags), "")
    python = platform.python_version()
    return f"{model}{widest}, {os.cpu_count()} cores, Python {python}, {platform.system()}"


def has_gpu() -> bool:
    """True if torch finds a GPU for the part "gpu"."""
    import torch

    return torch.cuda.is_available()


def load() -> float:
    """The load average of the last minute; 0 if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def best(work: Callable[[], Any], seconds: float = SECONDS, least: int = 3) -> float:
    """Seconds of the fastest of as many tries as fit into *seconds*."""
    tries: list[float] = []
    end = time.perf_counter() + seconds
    while len(tries) < least or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        tries.append(time.perf_counter() - start)
    return min(tries)


def matmul_peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """Floating-point operations a second of the fastest of some large products, by either
    library, with as many threads as torch has in this thread."""
    import torch

    from tinkex.engine import matmul

    size = 1024 if device == "cpu" else 8192
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    multiply = (torch.mm, matmul.product)
    return 2 * size**3 / min(best(lambda f=f: _wait_for(f(a, b)), SECONDS / 2) for f in multiply)


def _wait_for(result: torch.Tensor) -> None:
    """Wait until an accelerator has computed *result*."""
    if result.device.type != "cpu":
        import torch

        torch.cuda.synchronize()


def read_bandwidth(size: int, device: str = "cpu") -> float:
    """Bytes a second of all threads reading *size* bytes from memory repeatedly.

    The size matters because a small model's weights fit in the processor's caches, which are
    faster.
    """
    import torch

    room = torch.ones(max(size // 4, 2**16), device=device)
    return room.numel() * 4 / best(lambda: _wait_for(room.sum()))
