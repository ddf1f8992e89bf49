"""Compile `cpu_kernels.c` with the machine's C compiler, once, and mirror its structs.

The library is stored in the user's cache under a name that depends on the source, the compiler and
the processor. Without a compiler, or if its results differ from torch's, torch is used instead.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from tinkex import config

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".c")

#: -march=native, since it is compiled where it runs. No -ffast-math, to keep infinities and NaN.
FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp",
    "-fPIC",
)  # fmt: skip

#: Timeout of the compiler, in seconds.
COMPILE_SECONDS = 120.0

Array = npt.NDArray[np.void]


def _struct(**fields: object) -> np.dtype[np.void]:
    """A C struct with these fields, in order."""
    return np.dtype(list(fields.items()), align=True)


_P, _I, _L, _F = np.uintp, np.int32, np.int64, np.float32

# The structs of cpu_kernels.c, where the fields are described.
THIN = _struct(a=_P, b=_P, rank=_L)
MATRIX = _struct(
    weight=_P, scales=_P, bias=_P, ends=_P, thin=_P, rows=_L, columns=_L, parts=_L
)  # fmt: skip
HEAD_NORM = _struct(weight=_P, start=_L, stop=_L, size=_L)
LAYER = _struct(
    before_attention=_P, before_mlp=_P, after_attention=_P, after_mlp=_P,
    cosines=_P, sines=_P, half=_L, window=_L, heads=(HEAD_NORM, 2),
    qkv=MATRIX, o=MATRIX, gate_up=MATRIX, down=MATRIX,
)  # fmt: skip
SPAN = _struct(k=_P, v=_P, layer=_L, head=_L, length=_L)
STEP = _struct(
    layers=_P, sequences=_P, adapters=_P, final_norm=_P, x=_P, wanted=_P,
    wanted_adapters=_P, logits=_P, head=MATRIX,
    count=_L, depth=_L, width=_L, heads=_L, kv_heads=_L, head_dim=_L, mlp=_L, adapter_count=_L,
    wanted_count=_L, ld_logits=_L,
    weights=_I, cache=_I, activation=_I, interleaved=_I, threads=_I,
    eps=_F, scale=_F, cap=_F, residual=_F,
)  # fmt: skip

#: Numbers of the enums.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}

#: Computes a `STEP`; raises MemoryError.
Kernel = Callable[[Array], None]


_loading = threading.Lock()


def load() -> Kernel | None:
    """The compiled step, compiled now if needed; None if this machine does not support it.

    May be called from any thread. Takes some seconds the first time on a machine.
    """
    return _loaded()[0]


def why_not() -> str:
    """Why there is no compiled step, as a clause; "" if there is one."""
    return _loaded()[1]


def _loaded() -> tuple[Kernel | None, str]:
    with _loading:
        return _load()


@functools.cache
def _load() -> tuple[Kernel | None, str]:
    """The compiled step, or the reason why there is none."""
    try:
        library = ctypes.CDLL(str(_library()))
        function = library.tinkex_decode_step
    except (OSError, AttributeError, subprocess.SubprocessError) as exc:
        reason = _reason(exc)
        logger.info("Tokens are decoded by PyTorch alone: %s.", reason)
        return None, reason
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int

    def run(step: Array) -> None:
        if function(step.ctypes.data):
            raise MemoryError("there is not enough memory for a decoding step.")

    return run, ""


def _reason(exc: Exception) -> str:
    output = getattr(exc, "stderr", None)
    lines = output.strip().splitlines() if isinstance(output, str) else []
    return f"{exc} {lines[0]}" if lines else str(exc).rstrip(".")


def _library() -> Path:
    """The shared library, compiled now unless it is in the cache.

    Raises:
        OSError: If there is no compiler, or the cache cannot be written.
            subprocess.SubprocessError: If the compiler fails.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"the step is compiled on Linux only, not on {sys.platform}")
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang) in PATH")
    target = config.cache() / "kernels" / f"{_fingerprint(compiler)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, target)
    return target


def _fingerprint(compiler: str) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS
    ).stdout
    flags = [line for line in _processor().splitlines() if line.startswith(("flags", "Features"))]
    parts = [SOURCE.read_text(), *FLAGS, version, platform.machine(), *flags[:1]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def _compile(compiler: str, target: Path) -> None:
    """Compile to *target*, which is created atomically."""
    logger.info("Compiling the decoding step with %s, once on this machine.", compiler)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        code, library = Path(folder) / "step.o", Path(folder) / "step.so"
        wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
        # Linked without -fopenmp: the functions of OpenMP are those of the runtime that torch has
        # loaded, so that both use the same threads.
        for command in (
            [compiler, *FLAGS, *wide, "-c", str(SOURCE), "-o", str(code)],
            [compiler, "-shared", str(code), "-o", str(library), "-lm"],
        ):
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS
            )
        os.replace(library, target)
