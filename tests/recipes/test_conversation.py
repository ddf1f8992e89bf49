"""A run that is talked with and sampled from."""

from __future__ import annotations

import json

import numpy as np
import pytest

import tinkex
from tests.support.fake_service import FakeService
from tinkex.recipes import run as run_module


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Finished, with a model that says "a" again and again."""
    service = FakeService()
    logits = np.zeros(258)
    logits[97] = 9
    service.checkpoints["tinker://m/sampler_weights/final"] = logits, logits
    state = {"settings": {"base_model": "fake"}, "sampler_path": "tinker://m/sampler_weights/final"}
    (tmp_path / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(run_module, "ServiceClient", lambda *address: service)
    return tinkex.load_run(tmp_path)


def test_a_run_continues_text_and_conversations(run):
    assert "aaaa" == run.sample("say: ", max_tokens=4)
    assert "aaaa" == run.sample([{"role": "user", "content": "say"}], max_tokens=4)


def test_a_conversation_ends_at_an_empty_line(run, monkeypatch, capsys):
    lines = iter(["hello", "again", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    messages = run.chat(system="Be brief.", max_tokens=3)

    assert ["system", "user", "assistant", "user", "assistant"] == [m["role"] for m in messages]
    assert "aaa\naaa\n" == capsys.readouterr().out


def test_ctrl_d_ends_a_conversation(run, monkeypatch):
    def ctrl_d(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", ctrl_d)

    assert [] == run.chat()


def test_a_run_that_is_not_finished_says_what_to_do(tmp_path):
    (tmp_path / "state.json").write_text('{"settings": {}, "step": 3, "total_steps": 9}')
    run = tinkex.load_run(tmp_path)

    with pytest.raises(ValueError, match=r"is not finished \(saved after step 3 of 9\); resume it"):
        run.sample("text")
    with pytest.raises(ValueError, match="is not finished"):
        run.export(tmp_path / "out")
