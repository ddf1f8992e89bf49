"""What `make chaos` found, as a table: from the facts that the tests wrote to CHAOS_REPORT.

python -m tests.chaos.summary FILE [PAGE]
    prints it; with PAGE, puts it between the marks in that page, too.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

BEGIN, END = "<!-- make chaos -->", "<!-- end -->"


def yes(claims: list[bool]) -> str:
    return "yes" if all(claims) else "NO"


def total(facts: list[dict], what: str) -> str:
    """A sum; "-" where it was not counted."""
    return str(sum(fact[what] for fact in facts)) if what in facts[0] else "-"


def summary(facts: list[dict]) -> str:
    """In Markdown."""
    by_kind: dict[str, list[dict]] = {}
    for fact in facts:
        by_kind.setdefault(fact["kind"], []).append(fact)
    lines = ["| What | Runs | Operations | Hit by | Lost | Twice | Bit-identical |"]
    lines += ["|---|---|---|---|---|---|---|"]
    faults: Counter[str] = Counter()
    for kind, found in by_kind.items():
        same = yes([fact["identical"] for fact in found])
        runs = sum(fact.get("runs", 1) for fact in found)
        operations = sum(fact.get("operations", 0) for fact in found)
        hit = f"{sum(fact.get('kills', 0) for fact in found)} kills"
        if kind == "network":
            for fact in found:
                faults.update(fact["faults"])
            requests = sum(fact["requests"] for fact in found)
            hit = f"{faults.total():,} faults in {requests:,} requests"
        lost, twice = (total(found, what) for what in ("lost", "twice"))
        cells = [kind, str(runs), f"{operations:,}" if operations else "-", hit, lost, twice, same]
        lines.append("| " + " | ".join(cells) + " |")
    checkpoints = sum(fact.get("checkpoints", 0) for fact in facts)
    lines += ["", f"Servers that were killed had acknowledged {checkpoints} checkpoints: all load."]
    if faults:
        lines += ["", "Faults: " + ", ".join(f"{k} {n}" for k, n in faults.most_common()) + "."]
    return "\n".join(lines)


def main() -> int:
    facts = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    text = summary(facts)
    print(text)
    if len(sys.argv) > 2:
        page = Path(sys.argv[2])
        before, _, rest = page.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
