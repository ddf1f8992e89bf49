"""Configuration files: what is written is read again, by us and by any YAML reader."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

from tinkex import errors
from tinkex.recipes import config_file

VALUES = {
    "data": ["/home/me/people: old.jsonl"],
    "base_model": "smollm2",
    "learning_rate": 1e-05,
    "rank": 8,
    "train_mlp": False,
    "data_map": {"prompt": "question"},
    "prompts": ["Who?\nWhere?", "# no comment", "überall"],
    "date": "2026-07-26",
}


def written(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_written_is_read_without_pyyaml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)

    path = written(tmp_path, "# a comment\n" + config_file.text({**VALUES, "keep": None}))

    assert VALUES == config_file.read(path)


def test_what_is_written_is_yaml():
    """PyYAML reads 1e-05 as text, as YAML 1.1 does; `read` knows that."""
    assert {**VALUES, "learning_rate": "1e-05"} == yaml.safe_load(config_file.text(VALUES))


def test_yaml_written_by_people_is_read(tmp_path):
    path = written(
        tmp_path,
        "data:\n  - a.jsonl\n  - b.jsonl\nbase-model: tiny   # built in\nlearning_rate: 1e-4\n"
        "date: 2026-07-26\ndata_map: {prompt: question}\n",
    )

    assert {
        "data": ["a.jsonl", "b.jsonl"],
        "base_model": "tiny",
        "learning_rate": 1e-4,
        "date": "2026-07-26",
        "data_map": {"prompt": "question"},
    } == config_file.read(path)


def test_plain_lines_need_no_quotes_and_no_pyyaml(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = written(tmp_path, "base-model: tiny # built in\nlearning_rate: 1e-4\nload_best: true\n")

    expected = {"base_model": "tiny", "learning_rate": 1e-4, "load_best": True}
    assert expected == config_file.read(path)


def test_yaml_that_needs_pyyaml_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = written(tmp_path, "data:\n  - a.jsonl\n")

    with pytest.raises(errors.MissingExtraError, match=r"pip install 'tinkex\[yaml\]'"):
        config_file.read(path)


def test_json_and_toml_are_read(tmp_path):
    as_json = written(tmp_path, json.dumps(VALUES), "run.json")
    assert VALUES == config_file.read(as_json)
    if sys.version_info >= (3, 11):
        as_toml = written(tmp_path, 'rank = 8\ndate = 2026-07-26\ndata = ["a"]\n', "run.toml")
        assert {"rank": 8, "date": "2026-07-26", "data": ["a"]} == config_file.read(as_toml)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", '{"rank": ', r"run\.json is not JSON"),
        ("run.yaml", "rank: [8\n", r"run\.yaml is not YAML"),
        ("run.yaml", "- 1\n- 2\n", r"must hold keys and values, got a list"),
    ],
)
def test_a_file_that_is_not_understood_is_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        config_file.read(written(tmp_path, text, name))


def test_an_unknown_key_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"run.yaml: there is no setting leraning_rate; did you"):
        config_file.check_keys(["rank", "leraning_rate"], ["rank", "learning_rate"], "run.yaml")
    with pytest.raises(ValueError, match=r"no setting zzz; known are rank, learning_rate\."):
        config_file.check_keys(["zzz"], ["rank", "learning_rate"], "run.yaml")
