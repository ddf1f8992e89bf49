"""Decoding compared with llama.cpp, on the same weights of SmolLM2 as GGUF.

llama-cpp-python is built first if it is missing: see `tests.support.llama_cpp`.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks import engine
from tests.benchmarks.rounds import Allowance, in_turns
from tests.benchmarks.rows import OF_LIMIT, Row, table
from tests.support import llama_cpp
from tinkex.engine import gguf_writer
from tinkex.engine.cpu_parallel import available_cores

HERE = Path(__file__).parent

#: Our type, and llama.cpp's type with as many bits.
KINDS = {"float32": "F32", "bfloat16": "F16"}
STREAMS, LENGTH = (1, 16, 64), 32


class Llama:
    """llama.cpp in a separate process, with a file and a number of streams."""

    def __init__(self, python: Path, file: Path, streams: int) -> None:
        command = [python, HERE / "llama_case.py", file, streams, LENGTH, available_cores()]
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> str:
        if self._process.stdout is None:
            raise RuntimeError("llama.cpp was started without a pipe.")
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self._process.wait()}.")
        return line

    def decode(self) -> float:
        """Seconds for `LENGTH` tokens of every stream."""
        if self._process.stdin is None:
            raise RuntimeError("llama.cpp was started without a pipe.")
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def rows(seconds: float) -> list[Row]:
    """Tokens a second of both, in turns."""
    python, found = llama_cpp.python(build=True), []
    allowance = Allowance(seconds, len(KINDS) * len(STREAMS))
    with tempfile.TemporaryDirectory(prefix="tinkex-bench-") as folder:
        for dtype, kind in KINDS.items():
            bench = engine.Bench("smollm2", Path(folder), dtype)
            bench.engine.open_sampler("bare", str(bench.base))
            file = Path(folder) / f"{kind}.gguf"
            gguf_writer.write(bench.base, file, kind)
            for streams in STREAMS:
                llama = Llama(python, file, streams)
                found.append(_row(bench, llama.decode, streams, kind, allowance.next()))
                llama.close()
            bench.close()
    return found


def _row(
    bench: engine.Bench, theirs: Callable[[], float], streams: int, kind: str, seconds: float
) -> Row:
    prompts = engine.prompts_of([engine.PROMPT] * streams, bench.vocab)
    a, b, limits = in_turns(
        (
            lambda: engine.ask(bench, prompts, 1, LENGTH, ["bare"]),
            theirs,
            lambda: bench.decoding_limit(streams, engine.PROMPT, LENGTH),
        ),
        seconds,
    )
    total = streams * LENGTH
    return Row(f"decoding, streams: {streams}; llama.cpp with {kind}", "tok/s",
               engine.speeds(total, a), engine.speeds(total, b), bench.label, at_least=True,
               limits=limits)  # fmt: skip


def page(found: list[Row]) -> str:
    """The section of the page."""
    return "\n".join(
        [
            "## Decoding beside llama.cpp",
            f"{llama_cpp.REQUIREMENT}, as many threads as there are cores; the bare base model of "
            "SmolLM2, 16-token prompts, 32 tokens of each stream. llama.cpp's F16 beside our "
            "bfloat16.",
            "",
            table(found, OF_LIMIT),
        ]
    )
