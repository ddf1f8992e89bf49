"""
The demonstration's data: what is collected from a library of Python files.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from tinkex.cli import demo
from tinkex.cli.demo_people import line, people
from tinkex.data import files

MODULE = '''
def documented(a, *, b: int = 1) -> str:
    """Say what
    it does.

    A second paragraph is left out.
    """

class Some:
    async def method(self):
        r"""Old \\d escapes cause no warning."""

    def silent(self):
        pass
'''


def test_the_first_paragraph_goes_with_the_signature(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text(MODULE)

    assert [
        ("def documented(a, *, b: int=1):\n", "Say what it does."),
        ("def method(self):\n", "Old \\d escapes cause no warning."),
    ] == list(demo.docstrings(tmp_path))


def test_what_is_very_long_is_left_out(tmp_path):
    (tmp_path / "module.py").write_text(f'def f():\n    """{"long " * 100}"""\n')

    assert [] == list(demo.docstrings(tmp_path))


def test_the_library_of_this_python_gives_thousands_of_good_lines(tmp_path):
    path = tmp_path / "docstrings.jsonl"

    count = demo.write(path, Path(sysconfig.get_path("stdlib")))

    assert count > 3000
    assert count == len(files.read(path).records)
    assert count == len({json.dumps(line) for line in path.read_text().splitlines()})


def test_the_invented_people_are_good_data_and_always_the_same(tmp_path):
    pairs = list(people(50, seed=0))
    path = tmp_path / "people.jsonl"
    path.write_text("".join(line(*pair) for pair in pairs))

    assert 50 == len(files.read(path).records) == len(set(pairs))
    assert pairs == list(people(50, seed=0))
    for sentence, answer in pairs:
        facts = json.loads(answer)
        assert {"name", "age", "job", "city", "languages"} == set(facts)
        for fact in (facts["name"], str(facts["age"]), facts["job"], *facts["languages"]):
            assert fact in sentence


def test_the_comparison_fits_the_terminal():
    rows = [("A question " * 10, "An answer " * 20, '{"a": 1}'), ("short", "", "x")]

    lines = demo.comparison(rows, 90).splitlines()

    assert all(len(line) <= 90 for line in lines)
    assert lines[0].split() == ["PROMPT", "BEFORE", "AFTER"]
    assert "(nothing)" in lines[-1]


def test_without_a_network_the_built_in_model_is_trained(tmp_path, monkeypatch, capfd):
    """The demonstration works on a train, too, and says what it does instead."""
    ran = []

    def main(command):
        ran.append(command)
        return 1

    monkeypatch.setattr(demo.cli, "main", main)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "module.py").write_text(MODULE)
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    for name, value in (("TINKEX_HOME", tmp_path / "home"), ("PIP_NO_INDEX", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert 1 == demo.main(tmp_path)

    assert "tiny" == ran[0][ran[0].index("--base-model") + 1]
    said = capfd.readouterr()
    assert "base model 'smollm2' (SmolLM2-135M-Instruct) is not on this machine" in said.err
    assert "training the built-in model instead" in said.out


def test_an_unknown_model_is_refused(tmp_path, capsys):
    assert 2 == demo.main(tmp_path, "gpt-9")

    assert "choose smollm2 or tiny" in capsys.readouterr().err
