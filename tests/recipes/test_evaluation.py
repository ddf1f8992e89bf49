"""Evaluation: the numbers of each metric, for several models on the same examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

import tinkex
from tests.support.fake_policy import FakeSampling, FakeService
from tinkex.recipes import evaluation

OPTIONS = evaluation.Options(max_tokens=2)


@pytest.fixture
def models():
    """One that says "a" and one that says "b", and is about sure of it."""
    made = {}
    for name, letter in (("a", 97), ("b", 98)):
        logits = np.zeros(258)
        logits[letter] = 9.0
        made[name] = FakeSampling(FakeService(), logits)
    return made


PAIRS = [{"prompt": "1:", "completion": "aa"}, {"prompt": "2:", "completion": " aa "}]
PAIRS += [{"prompt": "3:", "completion": "a"}, {"prompt": "4:", "completion": "bb"}]


def test_answers_are_compared_with_the_right_ones(models):
    found = tinkex.evaluate(models, PAIRS, ["exact", "contains"], options=OPTIONS)

    assert {"exact": [0.5, 0.25], "contains": [0.75, 0.25]} == {
        metric: [value.mean for value in by_model.values()]
        for metric, by_model in found.values.items()
    }
    assert found.values["exact"]["a"].error == pytest.approx(np.std([1, 1, 0, 0], ddof=1) / 2)
    assert {"prompt": "4:", "answer": "bb", "a": "aa", "b": "bb"} == found.answers[3]
    assert {"metric": "exact", "a": 0.5, "b": 0.25} == found.rows()[0]


def test_the_loss_is_per_token_that_counts(models):
    """Prompts do not count; each token of the long example weighs as one of the short."""
    found = tinkex.evaluate(
        models, [{"prompt": "x", "completion": "a"}, {"prompt": "x", "completion": "aaa"}]
    )

    logits = models["a"].logits
    logprobs = logits - np.log(np.exp(logits).sum())
    counted = [97, 257, 97, 97, 97, 257]
    assert found.values["loss"]["a"].mean == pytest.approx(-logprobs[counted].mean())
    assert found.values["loss"]["a"].mean != found.values["loss"]["b"].mean
    assert [] == found.answers


def test_a_function_judges_rows_that_have_no_right_answer(models):
    """It sees the whole row, and may return several numbers."""

    def score(answer, row):
        return {"reward": answer.count(row["letter"]), "length": len(answer)}

    found = tinkex.evaluate(models, [{"prompt": "1", "letter": "b"}], [score], options=OPTIONS)

    [name] = {key.partition("/")[0] for key in found.values}
    assert [0.0, 2.0] == [value.mean for value in found.values[name].values()]
    assert [2.0, 2.0] == [value.mean for value in found.values[f"{name}/length"].values()]
    assert math.isnan(found.values[name]["a"].error)


def test_conversations_end_with_the_right_answer(models):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "aa"}]

    found = tinkex.evaluate(models, [{"messages": talk}], ["exact"], options=OPTIONS)

    assert {"a": 1.0, "b": 0.0} == {n: v.mean for n, v in found.values["exact"].items()}


@pytest.mark.parametrize(
    ("rows", "metrics", "problem"),
    [
        (PAIRS, ["bleu"], "metric 'bleu' is not known; choose loss, exact, contains"),
        ([{"text": "a"}], ["exact"], "row 1 has no prompt with a right answer"),
        (PAIRS, [lambda answer, row: float("nan")], "returned nan, which is not a finite number"),
        (PAIRS, [lambda answer, row: 1 / 0], "raised ZeroDivisionError"),
        ([{"prompt": "a"}], ["exact"], "has 'prompt'"),
    ],
)
def test_what_cannot_be_measured_is_named(models, rows, metrics, problem):
    with pytest.raises(ValueError, match=problem):
        tinkex.evaluate(models, rows, metrics, options=OPTIONS)


def test_no_example_is_measured_twice_or_left_out_by_a_limit(models):
    options = evaluation.Options(max_tokens=2, limit=3)

    found = tinkex.evaluate(models, PAIRS, ["loss", "exact"], options=options)

    assert {3} == {v.count for by_model in found.values.values() for v in by_model.values()}
