"""`make bench`: measures all figures, writes their page, and prints which have changed.

Usage: python -m tests.benchmarks [client] [engine] [whole] [growth] [rendering] [llama] [gpu]
[--minutes M] [--model NAME] [--dtype TYPE] [--case NAME]; without names, all parts that this
machine can run. Writes docs/benchmarks.md, docs/benchmarks.json and the pictures beside them. Parts
that are not run, or of which only some rows are measured, are not changed. Prints which figures
have changed by more than noise since the last commit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from tests.benchmarks import client, figures, machine
from tests.benchmarks.rows import OF_LIMIT, Row, table

PAGE = figures.FILE.with_suffix(".md")

INTRODUCTION = """# Benchmarks

Command: `make bench` (a quarter of an hour; a part: `make bench ARGS=client`, others in `make bench
ARGS=--help`). All figures of a row were measured in turns in the same run: ours, the alternative
that a user would choose, and, where given, the **limit of this machine**. A ratio or share is the
median over the rounds, ± half the distance from the smallest to the largest. Absolute numbers are
only a rough guide; they mean nothing on another machine. The ratios are stored in
`benchmarks.json`; the command compares them with the last committed ones and prints those that
moved by more than both spreads.
"""


@attrs.frozen
class Options:
    """The options of a run: seconds for the part, and selected rows of the engine."""

    seconds: float
    models: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    cases: Sequence[str] = ()

    @property
    def is_whole(self) -> bool:
        """True if every row is measured, as required for the page and the file."""
        return not (self.models or self.dtypes or self.cases)


@attrs.frozen
class Part:
    """A section of the page, and the rows whose figures are stored."""

    text: str
    rows: Sequence[Row]


def client_part(options: Options) -> Part:
    """The client against the official SDK, and the cost of an operation by their number."""
    from tests.benchmarks.plots import plot  # matplotlib, which the tests of this do not need

    rows, curves = client.run_all(options.seconds)
    plot(curves, "number of operations", "client processor time per operation (ms)", "growth.svg")
    lines = [
        "## The client, against the official SDK",
        f"`tinker` {client.OFFICIAL} and tinkex on the same server that computes nothing; floor: "
        "bare `http.client`. Ratio: tinkex / official.",
        "",
        table(rows),
        "",
        "The cost of an operation does not grow with the number of queued or running operations:",
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
        "The limit: 200 samples of 1,000 ms take at least one second with any client; the "
        "additional time has its own row. It is the time to submit all 200: each sample is done "
        "one second after its own submit, and its result arrives a few ms later. Four threads "
        "submit, and more only if the server is slow to accept. On a server without "
        "retrieve_futures, each sample has a long poll with its own connection and thread; all "
        "but the first 4 polls begin when the 200 are submitted. The faster the official SDK is, "
        "the closer to 1 is the ratio of the total times.",
        "",
        _price_of_session(rows),
    ]
    return Part("\n".join(lines), rows)


def _price_of_session(rows: Sequence[Row]) -> str:
    [row] = [row for row in rows if client.OF_SESSION in row.case]
    ours, without = (statistics.median(values) for values in (row.ours, row.theirs))
    return (
        "The cost of `requests.Session`, which all traffic uses so that hooks, mocks and "
        f"instrumentation see every exchange: {ours - without:.0f} us of processor time for each, "
        f"{ours:.0f} with it and {without:.0f} with the adapter alone."
    )


def engine_part(options: Options, device: str = "cpu") -> Part:
    """The engine against transformers and PEFT, and against the machine."""
    from tests.benchmarks import engine  # torch: only where it is measured

    rows, left_out = engine.run(
        options.seconds,
        options.models or tuple(engine.MODELS),
        options.dtypes,
        options.cases,
        device,
    )
    title = "The engine" if device == "cpu" else "The engine on a GPU"
    lines = [
        f"## {title}, against transformers and PEFT, and against the machine",
        "Padded batches and `generate`, the same numbers on the same data, in a separate process "
        "with torch's own settings. Ratio: tinkex / alternative. Limit: only the products with "
        "the model's matrices, at the speed of the fastest product (1,024 cubed) measured in the "
        "same round. In decoding: these products for the prompts, then for each token of all "
        "streams the products or, if that takes longer, reading the weights once at the "
        "bandwidth measured in the same round for as many bytes.",
        "",
        table(rows, OF_LIMIT),
    ]
    if left_out:
        lines += ["", f"Not measured, because the time was over: {', '.join(left_out)}."]
    return Part("\n".join(lines), rows)


def whole_part(options: Options) -> Part:
    """The whole stack against the engine alone, and times from the start."""
    from tests.benchmarks import whole

    rows = whole.rows(options.seconds)
    lines = [
        "## The whole way",
        "SDK, HTTP, scheduler and engine together; alternative: the engine alone, or the allowed "
        "time. From nothing: a process that starts with its files in the system's cache; floor: "
        "`import torch`.",
        "",
        table(rows),
        "",
        "Time until the first loss and the first token, by stage:",
        "",
        whole.stages(),
    ]
    return Part("\n".join(lines), rows)


def growth_part(options: Options) -> Part:
    """Costs by numbers and sizes."""
    from tests.benchmarks import growth

    rows, found = growth.run()
    lines = [
        "## What grows with what",
        "A curve may rise proportionally (slope 1), but not bend upwards. The slope at the end "
        "is that of a line fitted to the last three points, on logarithmic axes. Dotted in the "
        "picture: proportional growth. Attention compares each token with all previous ones, so "
        "its cost per token grows with the length of the text; nothing else does.",
        "",
        growth.text_of(found),
        "",
        table(rows),
        "",
        "![costs against numbers and sizes](growth-of.svg)",
    ]
    return Part("\n".join(lines), rows)


def rendering_part(options: Options) -> Part:
    """Conversations to tokens."""
    from tests.benchmarks import rendering

    rows = rendering.rows(options.seconds)
    lines = [
        "## Conversations to tokens",
        "Processor time of all threads. Ours: tokens and weights of a batch; alternative: "
        "transformers' `apply_chat_template` for each conversation, without weights, or the "
        "allowed time.",
        "",
        table(rows),
    ]
    return Part("\n".join(lines), rows)


def llama_part(options: Options) -> Part:
    """Decoding compared with llama.cpp on the same weights."""
    from tests.benchmarks import llama

    rows = llama.rows(options.seconds)
    return Part(llama.page(rows), rows)


def gpu_part(options: Options) -> Part:
    """The engine's part on an accelerator."""
    return engine_part(options, "cuda")


#: Parts of the page in order, and the fraction of the time for each.
PARTS: dict[str, tuple[Callable[[Options], Part], float]] = {
    "client": (client_part, 0.2),
    "engine": (engine_part, 0.55),
    "whole": (whole_part, 0.1),
    "growth": (growth_part, 0.15),
    "rendering": (rendering_part, 0.1),
    "llama": (llama_part, 0.0),
    "gpu": (gpu_part, 0.0),
}
#: Run only on request, because they need special hardware or software.
ON_REQUEST = ("llama", "gpu")
#: Parts take a little longer than this: each case has a minimum number of rounds.
MINUTES = 13.0


def write_page(parts: dict[str, str]) -> None:
    """Insert the measured sections into the page."""
    old = PAGE.read_text() if PAGE.exists() else ""
    sections = [INTRODUCTION]
    for name in PARTS:
        marked = f"<!-- {name} -->\n"
        found = re.search(f"{re.escape(marked)}(.*?)<!-- end -->", old, re.DOTALL)
        if name in parts:
            sections.append(f"{marked}{parts[name]}\n\n<!-- end -->\n")
        elif found:
            sections.append(f"{marked}{found[1]}<!-- end -->\n")
    PAGE.write_text("\n".join(sections))


def run_part(name: str, options: Options, committed: dict[str, Any]) -> None:
    """Run one part, write it to the page and the file, and print what has changed."""
    load, started = machine.load(), time.perf_counter()
    part = PARTS[name][0](options)
    taken = time.perf_counter() - started
    when, where = time.strftime("%Y-%m-%d"), machine.describe()
    footer = f"{when}, {where}. Load before: {load:.1f}; took {taken:.0f} s."
    print(f"{part.text}\n\n{footer}", flush=True)
    if options.is_whole:
        _keep(name, part, footer, {"when": when, "machine": where, "load": round(load, 1)})
    before = committed.get(name)
    if before is None:
        print(f"-- {name}: no figures committed to compare with.\n", flush=True)
        return
    moves = figures.moved(before["figures"], figures.of_rows(part.rows))
    print(f"-- {name}, against the figures of {before['when']} (load {before['load']}):")
    if before["machine"] != where:
        print(f"   those are of another machine: {before['machine']}")
    print("\n".join(f"   {line}" for line in moves) or "   nothing moved by more than noise")
    print(flush=True)


def _keep(name: str, part: Part, footer: str, about: dict[str, Any]) -> None:
    """Write a part to the page and its figures to the file."""
    write_page({name: f"{part.text}\n\n{footer}"})
    figures.write({name: {**about, "figures": figures.of_rows(part.rows)}})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--model", action="append", help="of the engine's rows only this one's")
    parser.add_argument("--dtype", action="append", help="of the engine's rows only this type's")
    parser.add_argument("--case", action="append", help="of the engine's rows only this case's")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.part if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    names = arguments.part or [name for name in PARTS if name not in ON_REQUEST]
    committed = figures.committed()
    whole = sum(PARTS[name][1] for name in names) or 1.0
    chosen = (arguments.model or (), arguments.dtype or (), arguments.case or ())
    if "gpu" in names and not machine.has_gpu():
        print("-- gpu: there is no GPU here, not measured.")
        names = [name for name in names if name != "gpu"]
    for name in names:
        seconds = 60 * arguments.minutes * (PARTS[name][1] / whole if len(names) > 1 else 1.0)
        run_part(name, Options(seconds, *chosen), committed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
