"""The audit: what it reports, given what its tools say; and the pins of the demo."""

from __future__ import annotations

import configparser
import re

import pytest

from tests import audit
from tests.check_core_install import ROOT

LOCK = ROOT / "demo.lock"


def finding(test_id, filename, line=7):
    return {
        "test_id": test_id,
        "filename": filename,
        "line_number": line,
        "issue_text": "eval is dangerous.",
    }


@pytest.fixture
def accepted(monkeypatch):
    monkeypatch.setattr(audit, "ACCEPTED", {("B602", "tinkex/config.py"): "the user's own"})


def test_a_new_finding_is_a_problem_and_names_its_line(accepted):
    report = {
        "results": [finding("B602", "tinkex/config.py"), finding("B307", "tinkex/rest.py")],
        "errors": [],
    }

    [problem] = audit.judged(report)
    assert problem.startswith("tinkex/rest.py:7: B307 eval is dangerous.")


def test_what_is_accepted_must_still_be_there(accepted):
    """Or the list would cover faults that are made later."""
    assert ["tinkex/config.py: B602 is accepted, but not there"] == audit.judged(
        {"results": [], "errors": []}
    )


def test_a_file_that_could_not_be_read_is_a_problem(accepted):
    report = {
        "results": [finding("B602", "tinkex/config.py")],
        "errors": [{"filename": "tinkex/x.py", "reason": "syntax error"}],
    }

    assert ["tinkex/x.py: syntax error"] == audit.judged(report)


def test_accepted_findings_are_of_files_that_exist():
    assert all((ROOT / file).is_file() for _, file in audit.ACCEPTED)


def test_advisories_and_packages_that_were_not_looked_up_are_told_apart():
    report = {
        "dependencies": [
            {"name": "good", "version": "1", "vulns": []},
            {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]},
            {"name": "unknown", "skip_reason": "Dependency not found on PyPI"},
        ]
    }

    assert (["unknown"], ["bad 2: CVE-1, fixed in 3"]) == audit.sorted_out(report)


@pytest.mark.parametrize(
    ("skipped", "vulnerable", "status", "said"),
    [
        ([], [], 0, "pip-audit: 0 advisories, 2 packages\n"),
        (["a"], [], 0, "pip-audit: 0 advisories, 1 packages; could NOT be looked up: a\n"),
        ([], ["bad 2: CVE-1"], 1, "bad 2: CVE-1\npip-audit: 1 advisories, 2 packages\n"),
    ],
)
def test_the_last_line_counts_only_what_was_looked_up(skipped, vulnerable, status, said, capsys):
    assert status == audit.verdict(skipped, vulnerable, 2)
    assert said == capsys.readouterr().out


def test_an_audit_that_could_look_up_nothing_fails_and_does_not_speak_of_advisories(capsys):
    """Without network access, "0 advisories" would read as good news."""
    assert 1 == audit.verdict(["a", "b"], [], 2)
    said = capsys.readouterr().out
    assert "NOT DONE" in said
    assert "0 advisories" not in said


def test_local_versions_are_looked_up_as_what_they_are_a_build_of():
    assert "torch==2.13.0" == audit.pinned("torch==2.13.0+cpu")


# The lock of the demo.


def locked():
    """Name -> (version, hashes) of each package of the lock."""
    blocks = re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text().partition("\n\n")[2])
    found = {}
    for block in blocks:
        name, version = re.match(r"([\w.-]+)==([\w.]+)", block).groups()
        found[name.lower().replace("_", "-")] = version, re.findall(r"sha256:[0-9a-f]{64}", block)
    return found


def test_every_package_of_the_lock_has_hashes():
    packages = locked()

    assert {"torch", "transformers", "numpy", "requests", "starlette"} <= set(packages)
    assert all(hashes for _, hashes in packages.values())


def test_the_lock_has_all_that_the_demo_needs():
    """A package that is new in `tinkex[local]` would be missing on the machine of a user alone."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    needed = settings["options"]["install_requires"] + settings["options.extras_require"]["local"]
    names = {
        re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")
        for line in needed.splitlines()
        if line and 'python_version < "3.11"' not in line
    }

    assert len(names) > 10
    assert set() == names - set(locked())


def test_the_lock_has_the_versions_that_are_tested():
    """Renew it with the command in its first line when constraints.txt changes."""
    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)(?:; python_version (\S+) \"3.11\")?", line)
        if match and match[3] != "<":
            tested[match[1].lower().replace("_", "-")] = match[2]
    differ = {n: (v, tested[n]) for n, (v, _) in locked().items() if tested.get(n, v) != v}

    assert {} == differ
