"""What a training step and a decode step spend their time on, by torch's own profiler."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks import engine
from tinkex import types

TOP = 8


def tables() -> str:
    """Two Markdown tables: operations by their own time, on the small model."""
    folder = Path(tempfile.mkdtemp(prefix="tinkex-bench-"))
    try:
        bench = engine.Bench("small", folder)
        data = engine.data_of(engine.chats(32, bench.vocab))
        prompts = engine.prompts_of([32] * 8, bench.vocab)

        def train() -> None:
            engine.drive(bench.engine.forward_backward("m", data, "cross_entropy", None))
            bench.engine.optim_step("m", types.AdamParams())

        def decode() -> None:
            engine.ask(bench, prompts, 8, 32)

        parts = [
            _table("A training step of *small* (32 texts like chats)", train),
            _table("Decoding with *small* (8 prompts x 8 samples x 32 tokens)", decode),
        ]
        return "\n\n".join(parts)
    finally:
        shutil.rmtree(folder)


def _table(title: str, work: Callable[[], None]) -> str:
    work()
    with profile(activities=[ProfilerActivity.CPU]) as measured:
        work()
    events = measured.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    lines = [f"{title}:", "", "| operation | calls | own time | share |", "|---|---|---|---|"]
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:TOP]:
        own = event.self_cpu_time_total
        lines.append(
            f"| `{event.key}` | {event.count:,} | {own / 1e3:,.1f} ms | {own / whole:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(tables())
