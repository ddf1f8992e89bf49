"""`tinkex sample`: where the prompt and the model come from, and what is printed."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from tests.support.fake_service import FakeSampling
from tinkex import cli, errors


def test_sample_continues_a_prompt(train, tmp_path, capsys):
    """A run is named by its folder, not by the path of a checkpoint."""
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


def test_sample_chat_asks_as_a_user_would(service, capsys):
    cli.main(["sample", "fake", "--chat", "--prompt", "hi"])

    assert ["User: hi\nAssistant:"] == service.prompts
    assert "fake has no chat template: the conversation is written as" in capsys.readouterr().err


def test_sample_chat_may_have_a_system_prompt(service):
    cli.main(["sample", "fake", "--system", "Be brief.", "--prompt", "hi"])

    assert ["System: Be brief.\nUser: hi\nAssistant:"] == service.prompts


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"messages": m}])
def test_sample_continues_a_conversation(service, tmp_path, wrap):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "chat.json").write_text(json.dumps(wrap(said)))
    file = str(tmp_path / "chat.json")

    cli.main(["sample", "fake", "--messages", file, "--prompt", "and?"])
    cli.main(["sample", "fake", "--messages", file])

    assert [
        "User: hi\nAssistant: ho\nUser: and?\nAssistant:",
        "User: hi\nAssistant: ho\nAssistant:",
    ] == service.prompts


@pytest.mark.parametrize("content", ["hi", "5", '["hi"]'])
def test_an_invalid_conversation_is_refused(service, tmp_path, content, capsys):
    (tmp_path / "chat.json").write_text(content)

    assert 2 == cli.main(["sample", "fake", "--messages", str(tmp_path / "chat.json")])
    assert "JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        ([{"content": "hi"}], "message 0: role must be a non-empty string, got None"),
        ([{"role": "user", "content": 5}], "message 0: content must be a string, got int"),
    ],
)
def test_what_are_no_messages_is_refused(service, tmp_path, messages, reason, capsys):
    (tmp_path / "chat.json").write_text(json.dumps(messages))

    assert 2 == cli.main(["sample", "fake", "--messages", str(tmp_path / "chat.json")])
    assert f"chat.json: {reason}" in capsys.readouterr().err


def test_sample_prints_tokens_as_they_arrive(service, monkeypatch, capsys):
    """Users read along while they wait."""
    service.checkpoints["tinker://a"] = (np.eye(258)[97], None)
    seen = []
    stream = FakeSampling.sample_stream

    def watched(self, *args, **kwargs):
        for chunk in stream(self, *args, **kwargs):
            yield chunk
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(FakeSampling, "sample_stream", watched)

    cli.main(["sample", "tinker://a", "--prompt", "x", "--max-tokens", "3"])

    assert ["a", "a", "a", ""] == seen
    assert "\n" == capsys.readouterr().out


def test_sample_waits_for_the_whole_where_the_server_does_not_stream(service, monkeypatch, capsys):
    def refused(*args, **kwargs):
        raise errors.NotOfferedError("no streaming here", status=404)
        yield

    monkeypatch.setattr(FakeSampling, "sample_stream", refused)
    service.checkpoints["tinker://a"] = (np.eye(258)[97], None)

    cli.main(["sample", "tinker://a", "--prompt", "x", "--max-tokens", "2"])

    assert "aa\n" == capsys.readouterr().out


def test_sample_chat_stops_where_the_template_ends_a_turn(service, monkeypatch):
    asked = []
    sample = FakeSampling.sample

    def watched(self, prompt, num_samples=1, sampling_params=None):
        asked.append(sampling_params.stop)
        return sample(self, prompt, num_samples, sampling_params)

    monkeypatch.setattr(FakeSampling, "sample", watched)

    cli.main(["sample", "fake", "--chat", "--prompt", "hi"])
    cli.main(["sample", "fake", "--chat", "--prompt", "hi", "--stop", "!"])
    cli.main(["sample", "fake", "--prompt", "hi"])

    assert [["\nUser:"], ["!"], None] == [stop and list(stop) for stop in asked]


@pytest.mark.parametrize(
    "options", [["--prompt", ""], ["--prompt", "a", "--prompt-file", __file__]]
)
def test_sample_needs_one_prompt(service, options):
    assert 2 == cli.main(["sample", "fake", *options])
