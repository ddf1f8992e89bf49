"""Compile the C files with the machine's C compiler, once, and mirror their structs.

The libraries are stored in the user's cache under names that depend on the source, the compiler and
the processor. Without a compiler, or if the results differ from torch's, torch is used instead.
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

#: Of a decoding step, of attention, and of operations on rows.
SOURCE = Path(__file__).with_suffix(".c")
ATTENTION_SOURCE = SOURCE.with_name("cpu_attention.c")
ROWS_SOURCE = SOURCE.with_name("cpu_rows.c")

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

# The structs of the C files, where the fields are described.
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

ATTENTION = _struct(
    qkv=_P, bounds=_P, out=_P, ends=_P, dout=_P, dqkv=_P,
    sequences=_L, heads=_L, kv_heads=_L, size=_L, window=_L, is_half=_I, threads=_I,
    scale=_F, cap=_F,
)  # fmt: skip
GATE = _struct(
    gate_up=_P, dact=_P, out=_P, rows=_L, columns=_L, is_half=_I, activation=_I, threads=_I
)
NORM = _struct(
    x=_P, weight=_P, dy=_P, plus=_P, out=_P, rstd=_P, rows=_L, columns=_L,
    is_half=_I, weight_is_half=_I, threads=_I, eps=_F,
)  # fmt: skip
ROTATION = _struct(
    rows=_P, cosines=_P, sines=_P, count=_L, ld=_L, heads=_L, size=_L, half=_L,
    is_half=_I, interleaved=_I, back=_I, threads=_I,
)  # fmt: skip

BLOCK_SUMS = _struct(
    logits=_P, temperatures=_P, largest=_P, sums=_P, rows=_L, ld=_L, columns=_L, block=_L,
    threads=_I,
)  # fmt: skip

#: How many floats the widest vectors hold. `cpu_attention.c` and `cpu_rows.c` need whole vectors.
WIDEST = 16

#: Numbers of the enums.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}

#: Computes what a struct describes; raises MemoryError.
Kernel = Callable[[Array], None]


_loading = threading.Lock()


def load() -> Kernel | None:
    """The compiled step, compiled now if needed; None if this machine does not support it.

    May be called from any thread. Takes some seconds the first time on a machine.
    """
    return _loaded(SOURCE, "tinkex_decode_step", "a decoding step")[0]


def load_attention() -> Kernel | None:
    """The same of attention."""
    return _loaded(ATTENTION_SOURCE, "tinkex_attention", "attention")[0]


def load_rows(operation: str) -> Kernel | None:
    """The same of an operation on rows: gate, norm, rotate or block_sums."""
    return _loaded(ROWS_SOURCE, f"tinkex_{operation}", f"operations on rows ({operation})")[0]


def load_all() -> None:
    """Compile everything that is not in the cache."""
    load_attention()
    load_rows("norm")
    load()


def why_not() -> str:
    """Why there is no compiled step, as a clause; "" if there is one."""
    return _loaded(SOURCE, "tinkex_decode_step", "a decoding step")[1]


def _loaded(source: Path, name: str, what: str) -> tuple[Kernel | None, str]:
    with _loading:
        return _load(source, name, what)


@functools.cache
def _load(source: Path, name: str, what: str) -> tuple[Kernel | None, str]:
    """The function *name* of a C file, or the reason why there is none.

    Args:
        what: it computes, for messages.
    """
    try:
        library = ctypes.CDLL(str(_library(source)))
        function = getattr(library, name)
    except (OSError, AttributeError, subprocess.SubprocessError) as exc:
        reason = _reason(exc)
        logger.info("PyTorch alone computes %s: %s.", what, reason)
        return None, reason
    function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int

    def run(arguments: Array) -> None:
        if function(arguments.ctypes.data):
            raise MemoryError(f"there is not enough memory for {what}.")

    return run, ""


def is_close_enough(what: str, error: float, largest: float) -> bool:
    """True if what was compiled may be used; else warns the user.

    Args:
        what: it is, with its verb, as the start of a sentence.
        error: the relative difference of its results from torch's.
    """
    if error < largest:
        return True
    logger.warning(
        "%s not used: the results differ from PyTorch's by %.2g of their size. Please report this "
        "with the version of your C compiler.", what, error
    )  # fmt: skip
    return False


def _reason(exc: Exception) -> str:
    output = getattr(exc, "stderr", None)
    lines = output.strip().splitlines() if isinstance(output, str) else []
    return f"{exc} {lines[0]}" if lines else str(exc).rstrip(".")


def _library(source: Path) -> Path:
    """The shared library of a C file, compiled now unless it is in the cache.

    Raises:
        OSError: If there is no compiler, or the cache cannot be written.
            subprocess.SubprocessError: If the compiler fails.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"C is compiled on Linux only, not on {sys.platform}")
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang) in PATH")
    target = config.cache() / "kernels" / f"{_fingerprint(compiler, source)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, target)
    return target


def _fingerprint(compiler: str, source: Path) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS
    ).stdout
    flags = [line for line in _processor().splitlines() if line.startswith(("flags", "Features"))]
    headers = [path.read_text() for path in sorted(SOURCE.parent.glob("*.h"))]
    parts = [source.read_text(), *headers, *FLAGS, version, platform.machine(), *flags[:1]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Compile to *target*, which is created atomically."""
    logger.info("Compiling %s with %s, once on this machine.", source.name, compiler)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        code, library = Path(folder) / "code.o", Path(folder) / "code.so"
        wide = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()
        # Linked without -fopenmp: the functions of OpenMP are those of the runtime that torch has
        # loaded, so that both use the same threads.
        for command in (
            [compiler, *FLAGS, *wide, "-c", str(source), "-o", str(code)],
            [compiler, "-shared", str(code), "-o", str(library), "-lm"],
        ):
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS
            )
        os.replace(library, target)
