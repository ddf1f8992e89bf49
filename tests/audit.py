"""
Looks for known vulnerabilities of the dependencies, and for dangerous calls in tinkex itself.

Usage: python -m tests.audit BUILD_DIR

pip-audit asks the advisory database of PyPI for each pinned package; the last line names those that
it could not look up. If it could look up none, the audit was not done, and fails. bandit reads the
source; what it
finds of medium or high severity must stand in ACCEPTED, with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.check_core_install import ROOT

TOOLS = ("bandit", "pip-audit")

_HUB = "the user names the model or data; only safetensors and rows are read, no code is run"
_SQL = "the text that is put in is constants of ours and question marks; values are parameters"
#: (bandit's id, file) -> why it is no fault.
ACCEPTED = {
    ("B108", "tinkex/conformance/checkpoints.py"): "a bad name, to see it refused",
    ("B602", "tinkex/config.py"): "TINKER_CREDENTIAL_CMD is a command of the user's own shell",
    ("B602", "tinkex/conformance/checkpoints.py"): "--restart is a command of the user's own shell",
    ("B608", "tinkex/server/checkpoint_store.py"): _SQL,
    ("B608", "tinkex/server/database.py"): _SQL,
    ("B608", "tinkex/server/recorded.py"): _SQL,
    ("B608", "tinkex/server/store.py"): _SQL,
    ("B615", "tinkex/checkpoints/export.py"): _HUB,
    ("B615", "tinkex/data/files.py"): _HUB,
    ("B615", "tinkex/engine/fetch.py"): _HUB,
    ("B615", "tinkex/engine/generic/loading.py"): "config.json of a folder on this machine",
    ("B615", "tinkex/engine/loading.py"): _HUB,
}


def main(build: Path) -> int:
    bin = install(build)
    return max(code(bin), dependencies(bin))


def install(build: Path) -> Path:
    """The folder with the tools' programs; they are installed in an environment of their own."""
    bin = build / "bin"
    if not all((bin / tool).exists() for tool in TOOLS):
        venv.create(build, clear=True, with_pip=True)
        pip = [bin / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *TOOLS], check=True)
    return bin


def code(bin: Path) -> int:
    """1 if bandit finds something new, or no longer finds what is accepted."""
    command = [bin / "bandit", "--quiet", "--recursive", "tinkex", "--format", "json"]
    done = subprocess.run(
        [*command, "--severity-level", "medium"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (0, 1):
        print(done.stderr)
        return 1
    problems = judged(json.loads(done.stdout))
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"bandit: {len(problems)} problems, {len(ACCEPTED)} kinds of findings are accepted")
    return 1 if problems else 0


def judged(report: dict[str, Any]) -> list[str]:
    """What is wrong, a line each, given bandit's report."""
    found = {(r["test_id"], r["filename"].removeprefix("./")) for r in report["results"]}
    new = [r for r in report["results"] if (r["test_id"], r["filename"]) not in ACCEPTED]
    lines = [
        f"{r['filename']}:{r['line_number']}: {r['test_id']} {r['issue_text']}"
        " Change it, or accept it with its reason in tests/audit.py."
        for r in new
    ]
    lines += [f"{file}: {id} is accepted, but not there" for id, file in ACCEPTED.keys() - found]
    return lines + [f"{error['filename']}: {error['reason']}" for error in report["errors"]]


def dependencies(bin: Path) -> int:
    """1 if an advisory is known for a package that is installed beside tinkex, or nothing is."""
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    pins = [pinned(line) for line in frozen.splitlines() if "==" in line]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins))
        file.flush()
        command = [bin / "pip-audit", "--no-deps", "--disable-pip", "--format", "json"]
        done = subprocess.run([*command, "-r", file.name], capture_output=True, text=True)
    if not done.stdout.strip():
        print(done.stderr.strip()[-500:])
        return verdict([pin.partition("==")[0] for pin in pins], [], len(pins))
    return verdict(*sorted_out(json.loads(done.stdout)), len(pins))


def verdict(skipped: Sequence[str], vulnerable: Sequence[str], packages: int) -> int:
    """Print what is known of so many packages; 1 if that is bad, or nothing."""
    if len(skipped) == packages:
        print(f"pip-audit: NOT DONE. None of {packages} packages could be looked up; nothing is")
        print("known of them. It needs access to https://pypi.org.")
        return 1
    print(*vulnerable, sep="\n", end="\n" if vulnerable else "")
    print(f"pip-audit: {len(vulnerable)} advisories, {packages - len(skipped)} packages", end="")
    print(f"; could NOT be looked up: {', '.join(skipped)}" if skipped else "")
    return 1 if vulnerable else 0


def pinned(line: str) -> str:
    """A line of pip freeze without a local version: advisories are about torch 2.13.0, not +cpu."""
    return line.partition("+")[0]


def sorted_out(report: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(packages that could not be looked up, advisories), given pip-audit's report."""
    skipped = [d["name"] for d in report["dependencies"] if "skip_reason" in d]
    vulnerable = [
        f"{d['name']} {d['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'none'}"
        for d in report["dependencies"]
        for v in d.get("vulns", [])
    ]
    return skipped, vulnerable


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
