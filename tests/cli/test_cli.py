"""
The command line: exit status, what goes to stdout and what to stderr, and what is not imported.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

import tinkex
from tests.support.fake_service import FakeService
from tinkex import _version, cli, errors


@pytest.fixture
def service(monkeypatch):
    """The server behind every client that commands make."""
    service = FakeService()
    service.addresses = []

    def client(base_url=None, api_key=None):
        service.addresses.append((base_url, api_key))
        return service

    monkeypatch.setattr(tinkex, "ServiceClient", client)
    return service


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps({"text": "abab" * 5})] * 40))
    return path


@pytest.fixture
def train(service, data, tmp_path):
    """`tinkex train` on 40 examples into <tmp>/run."""

    def train(*options):
        output = str(tmp_path / "run")
        return cli.main(["train", str(data), "--base-model", "fake", "--output", output, *options])

    return train


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


# The program itself


def test_help_imports_nothing_heavy():
    """Whoever asks for help wants it now."""
    code = (
        "import sys, tinkex.cli; status = tinkex.cli.main(['--help']); "
        "heavy = {'numpy', 'requests', 'torch', 'google.protobuf', 'tqdm', 'cattrs'}; "
        "sys.exit(status or ', '.join(heavy & set(sys.modules)) or 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (0, "") == (done.returncode, done.stderr)
    assert "Usage: tinkex" in done.stdout


def test_python_m_tinkex_is_tinkex():
    command = [sys.executable, "-m", "tinkex", "version"]

    assert f"tinkex {_version.__version__}\n" == subprocess.check_output(command, text=True)


def test_version_prints_the_version(capsys):
    assert 0 == cli.main(["--version"])
    assert f"tinkex, version {_version.__version__}\n" == capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_error():
    """`tinkex train --help | head -1`"""
    command = f"{sys.executable} -m tinkex train --help | head -c 1"

    done = subprocess.run(command, shell=True, capture_output=True, text=True)

    assert ("U", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["train", "--rank", "x"], ["train", "--nonsense"]]
)
def test_wrong_usage_exits_2(arguments, capsys):
    assert 2 == cli.main(arguments)
    assert "" == capsys.readouterr().out


def test_an_error_is_one_line_without_a_traceback(service, capsys):
    def refuses(**_):
        raise errors.AuthenticationError("the key is wrong; set TINKER_API_KEY", status=401)

    service.create_sampling_client = refuses

    assert 1 == cli.main(["sample", "fake", "--prompt", "a"])
    assert "error: the key is wrong; set TINKER_API_KEY\n" == capsys.readouterr().err
    with pytest.raises(errors.AuthenticationError):
        cli.main(["--traceback", "sample", "fake", "--prompt", "a"])


# train


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
    assert "holds a run already (finished). Go on with it: --resume" in capsys.readouterr().err


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


# sample


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
