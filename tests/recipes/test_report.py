"""The report of a run: whole, self-contained, and safe to open."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from tinkex import cli
from tinkex.recipes import report
from tinkex.recipes.run import Run, load_run


def folder_of(path, **settings):
    path.mkdir()
    state = {
        "settings": {"base_model": "tiny", "rank": 4, "keep": None, **settings},
        "step": 2,
        "total_steps": 2,
        "data": "/data/people.jsonl",
        "data_sha256": "abc123",
        "sampler_path": "tinker://m/sampler_weights/final",
        "prompts": ["<b>Who?</b>"],
        "before": ["noise"],
        "after": ["Ada & Bob"],
        "counts": {"examples": 20, "held_out": 5, "tokens": 999},
    }
    (path / "state.json").write_text(json.dumps(state))
    rows = [
        {"step": 0, "eval_loss": 5.5},
        {"step": 1, "train_loss": 5.0, "tokens_per_second": 100.0, "reward": 0.25},
        {"step": 2, "train_loss": 4.0, "tokens_per_second": 300.0, "eval_loss": 3.25},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"step": 2, "prompt": "one", "text": "<script>alert(1)</script>"}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return path


@pytest.fixture
def run(tmp_path):
    return load_run(folder_of(tmp_path / "first"))


class Page(HTMLParser):
    """Text, tags, and whatever the page would load."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def test_the_report_has_all_parts(run):
    found = Page(report.page(run))

    for part in (
        "held-out loss 5.5000 before, 3.2500 after",
        "Ada & Bob",
        "abc123",
        "held out",
        "tokens per second, median",
        "Python",
        "rank",
        "reward",
    ):
        assert part in found.text
    assert 3 == found.tags.count("svg")  # losses, tokens per second, reward


def test_the_report_needs_nothing_but_itself(run):
    found = Page(report.page(run))

    assert [] == found.loads
    assert not {"script", "link", "img", "iframe"} & set(found.tags)


def test_what_a_model_says_is_text_not_markup(run):
    """The <script> of the sample, and the <b> of the prompt, are shown as they are."""
    found = Page(report.page(run))

    assert "<script>alert(1)</script>" in found.text and "<b>Who?</b>" in found.text
    assert not {"script", "b"} & set(found.tags)


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "state.json").write_text('{"settings": {"base_model": "tiny"}}')

    assert "tiny; saved after step 0 of ?" in Page(report.page(Run(tmp_path))).text


def test_only_settings_that_differ_are_compared(run, tmp_path):
    other = load_run(folder_of(tmp_path / "second", rank=8))

    assert {"rank": [4, 8]} == report.differences([run, other])
    found = Page(report.compare([run, other]))
    assert "first and second" in found.text and "Settings that differ" in found.text
    assert 4 == found.tags.count("svg")
    assert "None: all settings are the same." in Page(report.compare([run, run])).text


def test_the_command_writes_the_report(run, capsys):
    assert 0 == cli.main(["report", str(run.folder)])

    assert f"{run.folder / 'report.html'}\n" == capsys.readouterr().out
    assert "<svg" in (run.folder / "report.html").read_text()


def test_the_command_compares_runs(run, tmp_path, capsys):
    folder_of(tmp_path / "second", rank=8)
    page = tmp_path / "both.html"

    assert 0 == cli.main(["compare", str(run.folder), str(tmp_path / "second"), "--to", str(page)])

    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rank", "4", "8"] in lines
    assert ["loss", "after", "3.2500", "3.2500"] in lines
    assert "<svg" in page.read_text()


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert 1 == cli.main(["report", str(tmp_path)])
    assert "there is no run in" in capsys.readouterr().err
    assert 2 == cli.main(["compare", str(tmp_path)])
    assert "name at least two runs to compare" in capsys.readouterr().err
