"""`tinkex rl` and `tinkex distill`: what they refuse, and resuming. Runs: tests/recipes."""

from __future__ import annotations

import json

import pytest

import tinkex
from tests.support.fake_policy import FakeService
from tinkex import cli, errors
from tinkex.text import tokenizer


@pytest.fixture
def service(tmp_path, monkeypatch):
    def no_tokenizer(identifier):
        raise errors.TokenizerError(f"{identifier} is only known to the fake server")

    service = FakeService()
    monkeypatch.setattr(tokenizer, "load", no_tokenizer)
    monkeypatch.setattr(tinkex, "ServiceClient", lambda **options: service)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}:"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text("def score(answer, row): return len(set(answer))\n")
    (tmp_path / "bad.py").write_text("def score(answer, row): raise OSError('no judge')\n")
    return service


RL = "rl prompts.jsonl --base-model fake --output run --max-tokens 4 --batch-size 4".split()


def test_a_run_is_resumed_with_the_reward_that_it_was_started_with(service, capsys):
    assert 0 == cli.main([*RL, "--reward", "mine.py:score"])
    capsys.readouterr()

    assert 0 == cli.main("rl --resume --output run --epochs 2".split())

    assert 6 == tinkex.load_run("run").step
    assert "Held-out reward: " in capsys.readouterr().out


def test_a_reward_that_fails_is_one_sentence_and_another_one_resumes_the_run(service, capsys):
    assert 1 == cli.main([*RL, "--reward", "bad.py:score"])
    [*_, line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: score raised OSError: no judge; the answer was ")
    assert "continue with --resume" in line

    assert 0 == cli.main("rl --resume --output run --reward mine.py:score".split())
    assert tinkex.load_run("run").is_finished


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (RL, "give one of reward and env"),
        (
            [*RL, "--reward", "mine.py:score", "--env", "mine.py:score"],
            "give one of reward and env",
        ),
        ([*RL, "--reward", "mine.py:scores"], "mine.py has no function scores; it has score"),
        (["distill", *RL[1:]], "give a teacher"),
        ([*RL, "--reward", "mine.py:score", "--group-size", "1"], "group_size must be at least 2"),
    ],
)
def test_what_cannot_be_trained_is_named_before_anything_is(service, capsys, words, problem):
    assert cli.main(words) in (1, 2)
    assert problem in capsys.readouterr().err
    assert not service.created
