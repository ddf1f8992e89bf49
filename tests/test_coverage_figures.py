"""`make coverage` fails where too few branches are reached, and says where."""

from __future__ import annotations

import json

import pytest

from tests import coverage_figures


def _file(covered, total):
    names = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    return {"summary": dict(zip(names, (covered, total, covered, total)))}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Writes what coverage would have measured: package -> covered branches of 100."""
    monkeypatch.setattr(coverage_figures.subprocess, "run", lambda *arguments, **options: None)

    def write(**packages):
        report = tmp_path / "report.json"
        files = {
            f"/x/tinkex/{name}/a.py": _file(covered, 100) for name, covered in packages.items()
        }
        report.write_text(json.dumps({"files": {**files, "/x/tinkex/rest.py": _file(1, 100)}}))
        return str(report)

    return write


def test_enough_branches_in_each_package_pass(measured, capsys):
    """The other packages may have fewer."""
    assert 0 == coverage_figures.main(measured(runtime=92, server=93, engine=100, cli=1))
    assert "Too few" not in capsys.readouterr().out


@pytest.mark.parametrize("package", ["runtime", "server", "engine"])
def test_one_branch_too_few_fails_with_the_name_of_the_package(measured, capsys, package):
    packages = {"runtime": 92, "server": 92, "engine": 92, package: 91}

    assert 1 == coverage_figures.main(measured(**packages))
    assert f"Too few branches are covered in {package} (92% required)." in capsys.readouterr().out


def test_a_package_that_was_not_measured_fails(measured, capsys):
    """A renamed package would pass for ever."""
    assert 1 == coverage_figures.main(measured(runtime=100, server=100))
    assert "engine" in capsys.readouterr().out
