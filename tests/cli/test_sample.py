"""`tinkex sample`: where the prompt and the model come from, and what is printed."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from tinkex import cli


def test_sample_continues_a_prompt(train, tmp_path, capsys):
    """By the run's folder: nobody wants to copy paths of checkpoints."""
    train("--learning-rate", "0.5")
    capsys.readouterr()

    assert 0 == cli.main(["sample", str(tmp_path / "run"), "--prompt", "x", "--num-samples", "2"])
    out, err = capsys.readouterr()
    assert 2 == len(out.splitlines())
    assert "" == err


def test_sample_json_is_json_alone(service, capsys):
    service.checkpoints["tinker://a"] = (np.eye(258)[97], None)

    cli.main(["sample", "tinker://a", "--prompt", "x", "--json", "--max-tokens", "2"])

    expected = {
        "text": "aa",
        "tokens": [97, 97],
        "logprobs": [-1.0, -1.0],
        "stop_reason": "length",
    }
    assert expected == json.loads(capsys.readouterr().out)


def test_sample_reads_a_file_or_standard_input(service, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("from a file\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"from a pipe\n")))

    cli.main(["sample", "fake", "--prompt-file", str(tmp_path / "prompt.txt")])
    cli.main(["sample", "fake"])

    assert ["from a file", "from a pipe"] == service.prompts


def test_sample_chat_asks_as_a_user_would(service):
    cli.main(["sample", "fake", "--chat", "--prompt", "hi"])

    assert ["User: hi\nAssistant:"] == service.prompts


@pytest.mark.parametrize(
    "options", [["--prompt", ""], ["--prompt", "a", "--prompt-file", __file__]]
)
def test_sample_needs_one_prompt(service, options):
    assert 2 == cli.main(["sample", "fake", *options])
