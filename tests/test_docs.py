"""
The documentation is true: its Python runs, its data is valid, its help texts are the program's.

Run as a program with --write, it copies the program's help texts into the pages.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinkex.data import files

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HELP = re.compile(r"^\$ (tinkex .*--help)\n(.*)\Z", re.DOTALL)
GPU = re.compile(r"\bGPUs?\b|\bCUDA\b")
TEST = re.compile(r"`(tests/[\w/]+\.py)`(?:: `(test_\w+)`)?")
TARGET = re.compile(r"`make ([a-z][a-z-]*)[^`]*`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def blocks(page, language):
    return [code for found, code in BLOCK.findall(page.read_text()) if found == language]


def with_block(language):
    return [page for page in PAGES if blocks(page, language)]


def help_text(command):
    """What the program prints, in lines of at most 100 characters."""
    words = [sys.executable, "-m", *command.split()]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.check_output(words, text=True, env=environment, cwd=ROOT)


def name(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One embedded engine for all pages: each would start its own."""
    import tinkex

    os.environ["TINKEX_HOME"] = str(tmp_path_factory.mktemp("home"))
    with tinkex.ServiceClient() as service:
        yield service.base_url
    del os.environ["TINKEX_HOME"]


@pytest.mark.parametrize("page", [p for p in PAGES if GPU.search(p.read_text())], ids=name)
def test_a_page_that_mentions_a_gpu_says_that_none_was_measured(page):
    assert re.search(r"not\s+measured", page.read_text())


@pytest.mark.parametrize("page", with_block("python"), ids=name)
def test_the_python_of_a_page_runs(page, server, monkeypatch, tmp_path):
    """From the first block to the last, as one program."""
    monkeypatch.setenv("TINKER_BASE_URL", server)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page, "python"))

    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_the_first_program_needs_no_server_and_no_key(tmp_path):
    """Exactly as the README has it, in a separate process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    environment |= {"TINKEX_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    [code] = blocks(ROOT / "README.md", "python")

    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )

    assert 0 == done.returncode, done.stderr
    assert "loss:" in done.stdout
    assert 20 >= len(code.strip().splitlines())


@pytest.mark.parametrize("page", with_block("jsonl"), ids=name)
def test_the_data_of_a_page_is_good_data(page, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(blocks(page, "jsonl")))

    assert [] == files.read(path).bad


@pytest.mark.parametrize("page", with_block("text"), ids=name)
def test_help_texts_are_what_the_program_says(page):
    """To update them: python tests/test_docs.py --write"""
    for command, text in (m.groups() for m in map(HELP.match, blocks(page, "text")) if m):
        assert help_text(command) == text


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]

    assert [] == missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_tests_and_targets_that_a_page_names_exist(page):
    """A promise whose test was renamed would be held by nothing."""
    text = page.read_text()
    targets = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing = [target for target in TARGET.findall(text) if target not in targets]
    for file, test in TEST.findall(text):
        path = ROOT / file
        if not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            missing.append(f"{file}: {test}")

    assert [] == missing


def test_every_promise_and_every_attack_has_a_test():
    """In docs/reliability.md, each row of a table whose last column is "Test"."""
    without, rows, is_promise = [], 0, False
    for line in (ROOT / "docs" / "reliability.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[-1] == "Test":
            is_promise = line.startswith("|")
        elif is_promise and not line.startswith("|---"):
            rows += 1
            if not (TEST.search(cells[-1]) or TARGET.search(cells[-1])):
                without.append(cells[0])

    assert rows > 80
    assert [] == without


@pytest.mark.parametrize("index", ["docs/index.md", "docs/decisions/README.md"])
def test_an_index_names_every_page_of_its_folder(index):
    index = ROOT / index
    listed = {link for link in LINK.findall(index.read_text()) if "/" not in link}

    assert {page.name for page in index.parent.glob("*.md")} - {index.name} == listed


def write_help_texts():
    for page in PAGES:
        text = page.read_text()
        for code in blocks(page, "text"):
            if found := HELP.match(code):
                text = text.replace(code, f"$ {found[1]}\n{help_text(found[1])}")
        page.write_text(text)


if __name__ == "__main__" and "--write" in sys.argv:
    write_help_texts()
