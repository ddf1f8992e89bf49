"""
The demonstration's data: what is collected from a library of Python files.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

from tinkex.cli import demo, loss_chart
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
        r"""Old \\d escapes warn nobody."""

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
        ("def method(self):\n", "Old \\d escapes warn nobody."),
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


def test_the_loss_curve_is_a_picture_of_the_rows(tmp_path):
    rows = [
        {"step": 0, "eval_loss": 2.0},
        {"step": 1, "train_loss": 1.5},
        {"step": 2, "train_loss": 1.0, "eval_loss": 0.5},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))

    loss_chart.write(metrics, tmp_path / "loss.svg")

    picture = ElementTree.parse(tmp_path / "loss.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    training, held_out = picture.findall(f"{space}polyline")
    assert 2 == len(training.attrib["points"].split())
    ups = [float(point.split(",")[1]) for point in held_out.attrib["points"].split()]
    assert ups[0] < ups[1]  # a smaller loss is further down
    assert 4 == len(picture.findall(f"{space}circle"))


def test_the_chart_of_a_run_that_diverged_leaves_out_what_is_no_number():
    rows = [{"step": 1, "train_loss": 1.0}, {"step": 2, "train_loss": float("nan")}]

    drawn = loss_chart.draw(rows)

    assert "nan" not in drawn


def test_without_a_network_the_built_in_model_is_trained(tmp_path, monkeypatch, capsys):
    """The demonstration works on a train, too, and says what it does instead."""
    ran = []

    def main(command):
        ran.append(command)
        return 1

    monkeypatch.setattr(demo.cli, "main", main)

    assert 1 == demo.main(tmp_path)

    assert ["model", "pull", "smollm2"] == ran[0]
    assert "tiny" == ran[1][ran[1].index("--base-model") + 1]
    assert "training the built-in model instead" in capsys.readouterr().out


def test_an_unknown_model_is_refused(tmp_path, capsys):
    assert 2 == demo.main(tmp_path, "gpt-9")

    assert "choose smollm2 or tiny" in capsys.readouterr().err
