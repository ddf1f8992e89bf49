"""`make bench`: every figure side by side in one run, and the page that shows them.

Usage: python -m tests.benchmarks [client] [engine] [whole] [profile] [--rounds N];
without names, all. Writes docs/benchmarks.md and the picture beside it; parts that were not run
keep what they had.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot

from tests.benchmarks import client
from tests.benchmarks.rows import HEAD, Row

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Ratios of two things that ran one after the other in the same run, medians over rounds. Absolute
times are shown to give a feeling; they mean nothing on another machine. Command: `make bench`.
"""


def client_part(rounds: int) -> str:
    """The client against the official SDK, and an operation's cost against their number."""
    rows = client.rows(rounds)
    with client.null_server() as url:
        curves = client.growth(url)
    plot(curves, "number of operations", "client processor time per operation (ms)", "growth.svg")
    lines = [
        "## The client, against the official SDK",
        f"`tinker` {client.OFFICIAL} and tinkex on the same server that computes nothing; floor: "
        "bare `http.client`. Ratio: tinkex / official.",
        "",
        HEAD,
        *(row.markdown() for row in rows),
        "",
        "What an operation costs does not grow with how many are queued or in flight:",
        "",
        "| operations | " + " | ".join(f"{n:,}" for n in client.GROWTH) + " |",
        "|---" * (len(client.GROWTH) + 1) + "|",
        *(
            f"| {name} (ms each) | " + " | ".join(f"{ms:.2f}" for _, ms in curve) + " |"
            for name, curve in curves.items()
        ),
        "",
        "![cost per operation against their number](growth.svg)",
        "",
        "What limits it: 200 samples of 1,000 ms take at least that second with any client, which "
        f"is {_share_of_the_floor(rows)} of the official SDK's time here; the time on top of it "
        "has its own row. One exchange takes 55 us of "
        "processor time in requests' adapter with the quick path of `http_adapter.py`; 190 us "
        "without it, 67 us in bare `http.client`, 8 us for the system calls alone. "
        "`requests.Session.send` on top of it, so that hooks and instrumentation see every "
        "exchange, takes about 15 us: a whole exchange of the client took 103 us with it and 88 us "
        "without, `requests.Session.post` itself 590 us (measured once on a busy machine, not in "
        "this run).",
    ]
    return "\n".join(lines)


def _share_of_the_floor(rows: Sequence[Row]) -> str:
    """Of the latency of 200 samples in the time that they take with the official SDK."""
    name = f"{client.NAMES['samples_200']}: wall"
    [row] = [row for row in rows if row.name == name]
    return f"{(row.floor or 0) / (row.theirs or 1):.2f}"


def engine_part(rounds: int) -> str:
    """The engine against transformers and PEFT."""
    from tests.benchmarks import engine  # torch: only where it is measured

    rows, curves = engine.run(growth=True)
    plot_growth(curves)
    lines = [
        "## The engine, against transformers and PEFT",
        "Padded batches and `generate`, the same numbers on the same data, in a process of their "
        "own with torch's own settings. Ratio: how many times better ours is. Limit: what the "
        "machine could do at most, had it nothing to compute but the products with the model's "
        "matrices, all at the speed of its best product; and the ratio that this would be.",
        "",
        "| case | model | unit | tinkex | instead | limit | ratio | at the limit | target |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        limit, at_limit = "", ""
        if row.limit is not None:
            limit, at_limit = f"{row.limit:,.4g}", f"{row.limit / row.theirs:.2f}"
        cells = [row.case, row.model, row.unit, f"{row.ours:,.4g}", f"{row.theirs:,.4g}", limit]
        lines.append("| " + " | ".join([*cells, f"{row.ratio:.2f}", at_limit, row.target]) + " |")
    lines += [
        "",
        "What limits it: no program can exceed the ratio at the limit on this machine. The limit "
        "does not include attention, which is a quarter of the work for prompt log-probabilities "
        "of *tiny*. Adapters that are sampled together are each read from memory at every step; "
        "a single one is folded into the base model.",
        "",
        "![tokens a second against batch size and length](tokens.svg)",
    ]
    return "\n".join(lines)


def whole_part(rounds: int) -> str:
    """The whole way against the engine alone, and first times."""
    from tests.benchmarks import whole

    lines = [
        "## The whole way",
        "SDK, HTTP, scheduler and engine together; instead: the engine alone, or the time allowed.",
        "",
        HEAD,
        *(row.markdown() for row in whole.rows(rounds)),
    ]
    return "\n".join(lines)


def profile_part(rounds: int) -> str:
    """Where the time of a training step and of a decode step goes."""
    from tests.benchmarks import profiles

    words = (
        "Matrix products dominate both, and must: they are the model's arithmetic. What is not "
        "a product is kept to a few passes over the activations."
    )
    return f"## Where the time goes\n\n{words}\n\n{profiles.tables()}"


def plot(curves: dict[str, list[tuple[int, float]]], x: str, y: str, name: str) -> None:
    """Curves over a logarithmic axis, as an SVG in docs/."""
    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", xlabel=x, ylabel=y, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(DOCS / name, metadata={"Date": None})
    pyplot.close(figure)


def plot_growth(curves: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    """Tokens a second of each model in docs/tokens.svg: a panel a kind of growth."""
    kinds = list(next(iter(curves.values())))
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(4 * len(kinds), 3.2), layout="constrained"
    )
    for kind, axes in zip(kinds, panels, strict=True):
        for model, curve in curves.items():
            axes.plot(*zip(*curve[kind], strict=True), marker="o", label=model)
        axes.set(xscale="log", yscale="log", xlabel=kind)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("tokens a second")
    panels[0].legend(frameon=False)
    figure.savefig(DOCS / "tokens.svg", metadata={"Date": None})
    pyplot.close(figure)


PARTS: dict[str, Callable[[int], str]] = {
    "client": client_part,
    "engine": engine_part,
    "whole": whole_part,
    "profile": profile_part,
}


def machine() -> str:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        model = found[1] if found else model
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores, Python {python}, {platform.system()}"


def write(parts: dict[str, str]) -> None:
    """Put the parts that were run into the page."""
    old = PAGE.read_text() if PAGE.exists() else ""
    sections = [INTRODUCTION]
    for name in PARTS:
        marked = f"<!-- {name} -->\n"
        found = re.search(f"{re.escape(marked)}(.*?)<!-- end -->", old, re.DOTALL)
        if name in parts:
            when = time.strftime("%Y-%m-%d")
            sections.append(f"{marked}{parts[name]}\n\n{when}, {machine()}.\n\n<!-- end -->\n")
        elif found:
            sections.append(f"{marked}{found[1]}<!-- end -->\n")
    PAGE.write_text("\n".join(sections))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", choices=list(PARTS), default=[])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    made = {}
    for name in arguments.part or PARTS:
        made[name] = PARTS[name](arguments.rounds)
        print(made[name], flush=True)
        write(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
