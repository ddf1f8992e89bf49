"""`make scaling`: tinkex with other training servers, and the tables of docs/scaling.md.

python -m tests.scaling [NAME ...]
    installs each server in build/scaling, starts it on a small model, runs `tinkex train`, a DPO
    step and `tinkex conformance --write` against it, and prints what came out. Without names it
    writes docs/scaling.md, too. A server that cannot be installed or started has the reason in its
    row. Ends with 1 if tinkex cannot train on a server that runs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs

from tests.scaling.servers import KEYS, SERVERS, Server, Unavailable, install, running
from tests.support import hf_reference

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BEGIN, END = "<!-- make scaling -->", "<!-- end -->"

TEXTS = [{"text": f"Sentence number {i % 8} about the sea."} for i in range(64)]
PAIRS = [
    {"prompt": f"Question {i % 4}:", "chosen": " yes indeed", "rejected": " no thanks"}
    for i in range(8)
]
#: Seconds that one command may take: JAX compiles for every new shape.
PATIENCE = 1500.0


@attrs.define
class Found:
    """What was seen of a server.

    Attributes:
        train, pair: what `tinkex train` reported, and the same for a step of DPO.
        checks: name -> (outcome, reason) of the conformance checks.
        problem: why it could not be tried at all.
    """

    server: Server
    train: str = ""
    pair: str = ""
    checks: dict[str, tuple[str, str]] = attrs.field(factory=dict)
    problem: str = ""
    failed: bool = False

    def counts(self) -> str:
        counted = Counter(outcome for outcome, _ in self.checks.values())
        return ", ".join(f"{counted[name]} {name}" for name in ("pass", "fail", "not offered"))


def tinkex(*arguments: str, key: str = KEYS[0]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinkex", *arguments, "--api-key", key],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


def train(url: str, model: Path, rows: Sequence[object], output: Path, *options: str) -> str:
    """What a run reports, in a few words. Raises RuntimeError if it took no step to its end."""
    data = output.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = time.monotonic()
    done = tinkex(
        *("train", str(data), "--base-url", url, "--base-model", str(model)),
        *("--output", str(output), "--rank", "8", "--learning-rate", "1e-2", *options),
    )
    said = done.stdout + done.stderr
    steps = re.findall(r"step (\d+)/(\d+), loss ([\d.]+)", said)
    if not steps or steps[-1][0] != steps[-1][1]:
        raise RuntimeError(last_line(said))
    figures = f"loss {steps[0][2]} -> {steps[-1][2]} in {steps[-1][0]} steps"
    if len(steps) == 1:
        figures = f"loss {steps[0][2]}"
    figures += f", {time.monotonic() - start:.0f} s"
    return figures if done.returncode == 0 else f"{figures}; then: {last_line(said)}"


def checks(url: str, model: Path) -> dict[str, tuple[str, str]]:
    done = tinkex(
        *("conformance", url, "--write", "--base-model", str(model), "--format", "json"),
        *("--other-api-key", KEYS[1], "--patience", "300"),
    )
    found = json.loads(done.stdout)
    rows = found if isinstance(found, list) else found["checks"]
    return {row["name"]: (row["outcome"], row["reason"] or "") for row in rows}


def look_at(server: Server, model: Path, folder: Path) -> Found:
    """Install, start and try a server."""
    found = Found(server)
    try:
        programs = install(server)
        with running(server, programs, model, folder) as url:
            steps = (
                ("train", TEXTS, ("--batch-size", "16", "--epochs", "2")),
                ("pair", PAIRS, ("--batch-size", "8", "--max-steps", "1", "--eval-fraction", "0")),
            )
            for name, rows, options in steps:
                more = ("--method", "dpo") if name == "pair" else ()
                try:
                    setattr(found, name, train(url, model, rows, folder / name, *options, *more))
                except (RuntimeError, subprocess.TimeoutExpired) as exc:
                    setattr(found, name, f"fails: {exc}")
                    found.failed = True
            found.checks = checks(url, model)
    except Unavailable as exc:
        found.problem = str(exc)
    return found


def cell(text: str) -> str:
    text = re.sub(r"/tmp/[\w/.-]+|/\S*/build/scaling", "...", text)
    return text.replace("|", "\\|").replace("\n", " ")


def table(found: Sequence[Found]) -> str:
    """In Markdown: a row for each server, and each check that fails on one of them."""
    lines = ["| Server | `tinkex train` | a DPO step | `tinkex conformance --write` |"]
    lines += ["|---|---|---|---|"]
    for one in found:
        name = f"{one.server.title} ({one.server.note})"
        cells = [one.train, one.pair, one.counts()]
        if one.problem:
            cells = [f"not run here: {one.problem}", "-", "-"]
        lines.append(f"| {' | '.join(map(cell, [name, *cells]))} |")
    tried = [one for one in found if one.checks]
    names = list(dict.fromkeys(name for one in tried for name in one.checks))
    lines += ["", "| Check | " + " | ".join(one.server.title for one in tried) + " |"]
    lines += ["|---|" + "---|" * len(tried)]
    for name in names:
        outcomes = [one.checks.get(name, ("-", ""))[0] for one in tried]
        if "fail" in outcomes or "not offered" in outcomes:
            lines.append(f"| {' | '.join(map(cell, [name, *outcomes]))} |")
    return "\n".join(lines)


def write(text: str, page: Path = PAGE) -> None:
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no place for the tables: {BEGIN} and {END} are missing.")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(names: Sequence[str]) -> int:
    chosen = [one for one in SERVERS if not names or one.name.lower() in map(str.lower, names)]
    found = []
    with tempfile.TemporaryDirectory(prefix="tinkex-scaling-") as place:
        model = hf_reference.make_base(Path(place) / "model", "qwen3")
        for server in chosen:
            folder = Path(place) / server.name
            folder.mkdir()
            found.append(look_at(server, model, folder))
            one = found[-1]
            seen = one.problem or " | ".join([one.train, one.pair, one.counts()])
            print(f"{server.title}: {seen}", flush=True)
            for name, (outcome, reason) in one.checks.items():
                print(f"  {outcome:12} {name}{f': {reason}' if reason else ''}", flush=True)
    if not names:
        write(table(found))
    return int(any(one.failed for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
