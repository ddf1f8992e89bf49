"""`tinkex train`: what goes to stdout and what to stderr, starting and resuming a run."""

from __future__ import annotations

import json

import pytest

from tinkex import cli, errors


def resume(tmp_path, *options):
    return cli.main(["train", "--resume", "--output", str(tmp_path / "run"), *options])


class Killed(BaseException):
    """The process is gone."""


def kill_after(service, operations):
    left = [operations]

    def on_operation(name):
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    service.on_operation = on_operation


def test_train_prints_its_result_on_stdout_and_the_rest_on_stderr(train, tmp_path, capsys):
    assert 0 == train("--learning-rate", "0.3")

    out, err = capsys.readouterr()
    assert 2 == out.count("before  ")
    assert "Held-out loss per token: 5.5530 before" in out
    assert f"Adapter: {tmp_path / 'run' / 'adapter'}" in out
    assert "38 examples to train on, 2 held out." in err
    assert "step 2/2" in err


def test_train_says_what_it_needs(service, data, tmp_path, capsys):
    assert 2 == cli.main(["train", str(data), "--output", str(tmp_path)])
    assert "Missing --base-model" in capsys.readouterr().err
    assert 2 == cli.main(["train", "--base-model", "fake", "--output", str(tmp_path)])
    assert "Missing DATA" in capsys.readouterr().err


def test_bad_data_is_refused_before_anything_is_asked_of_a_server(train, service, data, capsys):
    data.write_text('{"text": ""}\n{"text": "good"}')

    assert 1 == train()
    assert "line 1: text is empty" in capsys.readouterr().err
    assert [] == service.addresses


def test_bad_lines_can_be_skipped_and_are_counted(train, data, capsys):
    data.write_text(data.read_text() + '\n{"text": ""}')

    assert 0 == train("--skip-bad-lines")
    assert "1 bad lines left out" in capsys.readouterr().err


def test_a_missing_file_is_an_error_in_words(service, tmp_path, capsys):
    command = ["train", "no.jsonl", "--base-model", "fake", "--output", str(tmp_path / "run")]

    assert 1 == cli.main(command)
    assert "No such file or directory: 'no.jsonl'" in capsys.readouterr().err


def test_a_server_is_named_on_the_command_line(train, service):
    train("--base-url", "http://localhost:1", "--api-key", "k")

    assert [("http://localhost:1", "k")] == service.addresses


def test_a_second_run_does_not_write_over_the_first(train, capsys):
    train()

    assert 2 == train()
    assert "holds a run already (finished). Continue it with --resume" in capsys.readouterr().err


def test_resume_takes_up_the_settings_it_was_started_with(train, service, tmp_path, capsys):
    kill_after(service, 6)
    with pytest.raises(Killed):
        train("--epochs", "3", "--batch-size", "8", "--rank", "5", "--save-every", "1")
    service.on_operation = lambda name: None

    assert 0 == resume(tmp_path)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (5, 15, 15) == (state["settings"]["rank"], state["step"], state["total_steps"])


def test_resume_refuses_other_settings(train, service, tmp_path, capsys):
    kill_after(service, 6)
    with pytest.raises(Killed):
        train()

    assert 1 == resume(tmp_path, "--rank", "7")
    assert "--rank is 7, but the run to resume has 32" in capsys.readouterr().err


def test_resume_of_nothing_and_of_something_finished(train, tmp_path, capsys):
    assert 2 == resume(tmp_path)
    assert "holds no run to resume" in capsys.readouterr().err
    train()

    assert 0 == resume(tmp_path)
    assert "nothing is left to do" in capsys.readouterr().err


def test_when_the_server_fails_the_way_on_is_said(train, service, tmp_path, capsys):
    def fails(name):
        if "step-000001" in str(service.checkpoints):
            raise errors.APIConnectionError("the server is gone")

    service.on_operation = fails

    assert 1 == train("--save-every", "1", "--batch-size", "4")
    err = capsys.readouterr().err
    assert f"tinkex train --resume --output {tmp_path / 'run'}" in err
    assert err.endswith("error: the server is gone\n")
