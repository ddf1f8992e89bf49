"""
Reports coverage per package, and fails where too few branches are reached.

Usage: python -m tests.coverage_figures JSON_FILE (after `pytest --cov`; `make coverage` does both)
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

#: The least share of branches that the tests must reach, by package.
REQUIRED = {"runtime": 0.92, "server": 0.92, "engine": 0.92}
COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def figures(report: dict) -> dict[str, Counter[str]]:
    """Sums by package; the modules at the top level of tinkex/ are "tinkex"."""
    found: dict[str, Counter[str]] = {}
    for path, entry in report["files"].items():
        parts = Path(path).parts
        inside = parts[parts.index("tinkex") + 1 :]
        package = inside[0] if len(inside) > 1 else "tinkex"
        summary = entry["summary"]
        found.setdefault(package, Counter()).update({name: summary[name] for name in COUNTS})
    return found


def share(covered: int, total: int) -> float:
    return covered / total if total else 1.0


def main(path: str) -> int:
    coverage = [sys.executable, "-m", "coverage"]
    # pytest-cov has combined what all processes wrote; those that ended later are added here.
    subprocess.run([*coverage, "combine", "--append", "--quiet"], capture_output=True)
    subprocess.run([*coverage, "json", "--quiet", "-o", path], check=True)
    packages = figures(json.loads(Path(path).read_text()))
    reached = {}
    print(f"{'package':<14}{'lines':>9}{'branches':>10}")
    for package, counts in sorted(packages.items()):
        lines = share(counts["covered_lines"], counts["num_statements"])
        reached[package] = share(counts["covered_branches"], counts["num_branches"])
        print(f"{package:<14}{lines:>9.1%}{reached[package]:>10.1%}")
    too_low = [name for name, least in REQUIRED.items() if reached.get(name, 0.0) < least]
    if too_low:
        named = ", ".join(f"{name} ({REQUIRED[name]:.0%} required)" for name in too_low)
        print(f"Too few branches are covered in {named}.")
        print(f"Which lines: {sys.executable} -m coverage report --include='tinkex/{too_low[0]}/*'")
    return 1 if too_low else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
