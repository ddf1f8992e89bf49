"""The files that only a code host reads: what they call exists, and what they repeat agrees."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name(path):
    return path.stem


def make_targets(text):
    """Targets in `make a b PYTHON=python` commands."""
    words = " ".join(re.findall(r"\bmake ([a-z][^\n#`|&]*)", text)).split()
    return {word for word in words if re.fullmatch("[a-z][a-z-]*", word)}


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=name)
def test_a_workflow_calls_targets_that_exist(workflow):
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    commands = "\n".join(
        step.get("run", "") for job in jobs.values() for step in job.get("steps", ())
    )

    assert make_targets(commands) <= TARGETS
    assert jobs


def test_the_check_of_a_clean_clone_calls_targets_that_exist():
    called = make_targets((ROOT / ".ci" / "run").read_text())

    assert {"test", "test-slow", "lint", "types", "docs", "core", "dist"} == called


def test_every_supported_python_is_checked():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    promised = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())

    assert promised == workflow["jobs"]["check"]["strategy"]["matrix"]["python"]


def test_the_release_compares_the_tag_with_the_version():
    """With the expression of the workflow itself."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    [pattern] = re.findall(r"sed -n 's/\^(.*?)/\\1/p' tinkex/_version.py", text)
    pattern = pattern.replace(r"\(", "(").replace(r"\)", ")")
    [found] = re.findall(f"^{pattern}$", (ROOT / "tinkex" / "_version.py").read_text(), re.M)

    assert re.fullmatch(r"\d+\.\d+\.\d+", found)
    assert f"## {found} (" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("form", [f for f in FORMS if f.stem != "config"], ids=name)
def test_an_issue_form_has_what_the_host_requires(form):
    content = yaml.safe_load(form.read_text())
    ids = [part["id"] for part in content["body"]]

    assert {"name", "description", "body"} <= content.keys()
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in content["body"])


def test_the_hooks_run_the_tools_of_the_virtual_environment():
    """So that their versions are those of constraints.txt, and stand in no second place."""
    [repo] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]

    assert "local" == repo["repo"]
    for hook in repo["hooks"]:
        assert hook["entry"].startswith((".venv/bin/ruff ", ".venv/bin/mypy"))


def test_contributing_names_targets_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()

    assert make_targets("\n".join(re.findall(r"`(make [^`]*)`", text))) <= TARGETS
