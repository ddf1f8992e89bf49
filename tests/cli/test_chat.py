"""`tinkex chat`: piped, and in a terminal, where Ctrl-C stops an answer and Ctrl-D the chat."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tinkex import cli, config, errors
from tinkex.data import files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def chat(service, monkeypatch, capsys):
    """Chat with a model that says "a" (the base model: zero bytes); status, out, err."""
    service.checkpoints["tinker://a"] = (np.eye(258)[97], None)

    def chat(*lines, model="tinker://a", options=()):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        status = cli.main(["chat", model, "--max-tokens", "3", *options])
        return status, *capsys.readouterr()

    return chat


def test_a_conversation_can_be_piped(chat, service):
    """Each line is answered, and the model sees what was said before."""
    status, out, err = chat("hi", "", "and?")

    assert (0, "aaa\naaa\n") == (status, out)
    assert ["User: hi\nAssistant:", "User: hi\nAssistant: aaa\nUser: and?\nAssistant:"] == list(
        service.prompts
    )
    assert "has no chat template" in err


def test_a_server_in_the_style_of_openai_is_talked_to_by_its_name_for_the_model(
    chat, requests_mock, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    answer = 'data: {"choices": [{"delta": {"content": "Hi there"}}]}\n\ndata: [DONE]\n\n'
    requests_mock.post("http://other.test/v1/chat/completions", text=answer)
    status, out, err = chat(
        "hello", "/compare", model="qwen", options=["--base-url", "http://other.test/v1"]
    )

    assert (1, "Hi there\n") == (status, out)
    assert "qwen" == requests_mock.last_request.json()["model"]
    assert "Bearer sk-1" == requests_mock.last_request.headers["Authorization"]
    assert "no base model to compare with" in err


def test_the_type_of_weights_reaches_the_embedded_engine(chat, monkeypatch):
    monkeypatch.setattr(config, "_for_engine", {})

    assert 0 == chat("hi", options=["--dtype", "int8"])[0]

    assert "int8" == config.engine_environment("token")["TINKEX_DTYPE"]


def test_the_type_of_weights_of_another_server_is_not_ours_to_choose(chat):
    status, _, err = chat("hi", options=["--dtype", "int8", "--base-url", "http://127.0.0.1:1"])

    assert 2 == status
    assert "start the server at --base-url with `tinkex serve --dtype`" in err


def test_system_and_reset(chat, service):
    chat("hi", "/reset", "/system Be brief.", "hi", options=["--system", "Rhyme."])

    assert service.prompts[0].startswith("System: Rhyme.")
    assert "System: Be brief.\nUser: hi\nAssistant:" == service.prompts[-1]


def test_what_was_said_is_saved_as_training_data(chat, tmp_path):
    path = tmp_path / "said.jsonl"
    _, _, err = chat("hi", f"/save {path}", "more", f"/save {path}")
    [first, second] = files.read(path).records

    assert f"Added to {path}." in err
    assert 2 == len(first.messages) and 4 == len(second.messages)
    assert [] == files.read(path).bad


def test_compare_asks_both_models_the_same(chat, service):
    """And leaves the conversation as it is."""
    _, out, _ = chat("hi", "/compare", "/compare what?", "on")

    table = out.splitlines()[1:4]
    assert ["base model", "fine-tuned"] == [cell.strip() for cell in table[0].split("|")]
    assert ["\x00\x00\x00", "aaa"] == [cell.strip() for cell in table[2].split("|")]
    assert "User: hi\nAssistant:" == service.prompts[1] == service.prompts[2]
    assert service.prompts[3].endswith("User: what?\nAssistant:")
    assert "User: hi\nAssistant: aaa\nUser: on\nAssistant:" == service.prompts[-1]


@pytest.mark.parametrize(
    "line, said",
    [
        ("/nothing", "there is no command /nothing"),
        ("/temperature hot", "must be a number of at least 0, got 'hot'"),
        ("/temperature -1", "must be a number of at least 0"),
        ("/save", "name a file"),
        ("/save x", "nothing was said yet"),
        ("/compare", "nothing was asked yet"),
    ],
)
def test_a_wrong_command_is_explained_and_the_chat_continues(chat, line, said):
    """Through a pipe, the exit status tells that a line failed."""
    status, out, err = chat(line, "hi")

    assert said in err
    assert (1, "aaa\n") == (status, out)


def test_a_base_model_cannot_be_compared_with_itself(chat):
    _, _, err = chat("/compare hi", model="fake")

    assert "no base model" in err


def test_a_message_that_the_server_refuses_is_forgotten(chat, service, monkeypatch):
    """The next one is answered as if it had not been."""
    from tests.support import fake_service

    real, calls = fake_service.FakeSampling.sample_stream, []

    def refuse_first(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise errors.BadRequestError("the prompt is longer than the context.", status=400)
        yield from real(self, *args, **kwargs)

    monkeypatch.setattr(fake_service.FakeSampling, "sample_stream", refuse_first)
    status, out, err = chat("too long", "hi")

    assert 1 == status
    assert "error: the prompt is longer" in err
    assert ("aaa\n", ["User: hi\nAssistant:"]) == (out, service.prompts)


# In a terminal

PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
import tinkex
from tests.support import fake_service
from tinkex import cli, types

class Slow(fake_service.FakeSampling):
    def sample_stream(self, prompt, num_samples=1, sampling_params=None):
        text = fake_service.ByteTokenizer().decode(prompt.to_ints())
        answer = b"one two three " * 3 if "slow" in text.splitlines()[-2] else b"\\x1b[31mred"
        for token in answer:
            yield types.SampleStreamChunk(0, token, -1.0)
            time.sleep(0.02 if "slow" in text.splitlines()[-2] else 0)
        yield types.SampleStreamChunk(0, stop_reason="stop")

fake_service.FakeSampling = Slow
tinkex.ServiceClient = lambda **_: fake_service.FakeService()
sys.exit(cli.main(["chat", "fake"]))
"""


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, home):
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(root=str(ROOT))],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TINKEX_HOME": str(home), "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)
        self.ours, self.seen = ours, ""

    def write(self, text):
        os.write(self.ours, text.encode())

    def until(self, text, seconds=30):
        """Read until *text* appears; what came up to there."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            left = deadline - time.monotonic()
            if not select.select([self.ours], [], [], max(left, 0))[0]:
                raise TimeoutError(f"{text!r} did not appear: {self.seen!r}")
            try:
                self.seen += os.read(self.ours, 1000).decode(errors="replace")
            except OSError as exc:
                raise AssertionError(f"the chat ended: {self.seen}") from exc
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def press_ctrl_c(self, text):
        """Press until *text* appears: readline misses a signal that comes just before it waits."""
        for _ in range(30):
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                return self.until(text, seconds=1)
        raise TimeoutError(f"{text!r} did not appear: {self.seen!r}")

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(tmp_path):
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.end()


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(terminal, tmp_path):
    terminal.until("> ")
    terminal.write("slow please\n")
    terminal.until("two")
    stopped = terminal.press_ctrl_c("[stopped]")
    terminal.until("> ")
    terminal.write("quick\n")
    answer = terminal.until("> ")
    terminal.press_ctrl_c("> ")  # at the prompt: another line
    terminal.write("\x04")

    assert stopped.count("three") < 3
    assert "\x1b[31m" not in answer and "red" in answer  # a model does not colour the terminal
    assert 0 == terminal.process.wait(20)
    assert "slow please" in (tmp_path / "chat_history").read_text()
