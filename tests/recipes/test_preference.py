"""`tinkex.preference`: each function is `tinkex.finetune` with its method and its settings."""

from __future__ import annotations

import pytest

import tinkex
from tests.support.fake_service import FakeService
from tinkex import errors
from tinkex.text import tokenizer

PAIRS = [{"prompt": f"{i}", "chosen": "aaa", "rejected": "bb"} for i in range(20)]


@pytest.fixture
def options(monkeypatch, tmp_path):
    def no_tokenizer(identifier):
        raise errors.TokenizerError(f"{identifier} is only known to the fake server")

    monkeypatch.setattr(tokenizer, "load", no_tokenizer)
    return {
        "output": tmp_path / "run",
        "service": FakeService(),
        "learning_rate": 0.5,
        "batch_size": 4,
        "progress": False,
    }


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("dpo", {}, {"beta": 0.1, "label_smoothing": 0.0}),
        ("dpo", {"beta": 0.3, "label_smoothing": 0.1}, {"beta": 0.3, "label_smoothing": 0.1}),
        ("ipo", {}, {"beta": 0.1}),
        ("simpo", {}, {"beta": 2.0, "margin": 1.0}),
        ("orpo", {"beta": 0.2}, {"beta": 0.2}),
    ],
)
def test_a_function_trains_with_its_method_and_settings(options, name, given, expected):
    run = getattr(tinkex.preference, name)(PAIRS, "fake", **options, **given)

    assert run.is_finished
    assert {"method": name, **expected}.items() <= run.settings.items()
    assert run.metrics[-1]["eval_reward_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"beta": 0.0}, "beta must be a number above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be from 0 to below 0.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, given, problem):
    with pytest.raises(ValueError, match=problem):
        tinkex.preference.dpo(PAIRS, "fake", **options, **given)


def test_data_of_another_method_is_refused_and_nothing_is_trained(options):
    with pytest.raises(ValueError, match=r"row 1 of the data is not a preference pair|line 1 of"):
        tinkex.preference.dpo([{"prompt": "a", "completion": "b"}], "fake", **options)
    assert not options["service"].created
