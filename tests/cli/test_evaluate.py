"""`tinkex eval`: base and fine-tuned model in one table."""

from __future__ import annotations

import json

import pytest

from tinkex import cli


@pytest.fixture
def run(train, tmp_path, capsys):
    """A finished run, and a file of examples."""
    train("--learning-rate", "0.5")
    capsys.readouterr()
    rows = [{"prompt": f"{i}", "completion": "abab"} for i in range(3)]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "run"), str(tmp_path / "held.jsonl")


def test_the_table_has_both_models_and_the_change(run, capsys):
    assert 0 == cli.main(["eval", run[0], "--data", run[1], "--metric", "contains"])

    heading, line = capsys.readouterr().out.splitlines()
    assert ["metric", "examples", "base", "fine-tuned", "change"] == heading.split()
    assert ["contains", "3"] == line.split()[:2]


def test_json_is_json_alone_and_answers_go_to_a_file(run, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def fn(answer, row): return len(answer)\n")
    metric, output = f"{tmp_path}/mine.py:fn", str(tmp_path / "answers.jsonl")
    words = ["eval", run[0], "--data", run[1], "--metric", metric, "--max-tokens", "4"]

    assert 0 == cli.main([*words, "--json", "--output", output, "--no-base"])

    found = json.loads(capsys.readouterr().out)
    assert {"fine-tuned": {"mean": 4.0, "error": 0.0, "count": 3}} == found[metric]
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert {"prompt", "answer", "fine-tuned"} == set(json.loads(lines[0]))


def test_an_unknown_metric_is_named(run, capsys):
    assert 1 == cli.main(["eval", run[0], "--data", run[1], "--metric", "bleu"])
    assert "metric 'bleu' is not known" in capsys.readouterr().err
