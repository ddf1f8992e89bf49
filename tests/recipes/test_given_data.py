"""Rows of tokens, which datums become, are read like any other row."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.fake_service import ByteTokenizer
from tinkex.data import datums, files, records


def test_tokens_are_trained_as_they_are():
    row = {"tokens": [5, 6, 7, 8], "weights": [1, 0, 0.5, 1]}

    [example] = datums.render(
        [records.parse(row)], ByteTokenizer(), datums.Options(max_length=100)
    ).examples

    assert [5, 6, 7, 8] == example.tokens.tolist()
    assert [0, 0, 0.5, 1] == example.counted.tolist()  # nothing predicts the first
    assert [5, 6] == example.prompt.to_ints()


def test_all_tokens_count_without_weights():
    assert (0, 1, 1) == records.parse({"tokens": [1, 2, 3]}).weights


def test_rows_of_tokens_keep_their_place_among_others():
    rows = [{"text": "a"}, {"tokens": [1, 2]}, {"text": "b"}]

    rendered = datums.render(
        files.from_rows(rows).records, ByteTokenizer(), datums.Options(max_length=100)
    )

    assert [0, 1, 2] == [example.record for example in rendered.examples]
    assert np.array_equal([1, 2], rendered.examples[1].tokens)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": "1 2"}, "tokens must be a list of whole numbers"),
        ({"tokens": [1, 2.5]}, "tokens must be a list of whole numbers"),
        ({"tokens": [1]}, "tokens must be at least two"),
        ({"tokens": [1, 2], "weights": [1]}, "weights must be a list of 2 numbers"),
        ({"tokens": [1, 2], "weights": [1, float("nan")]}, "weights must be a list of 2 numbers"),
    ],
)
def test_a_bad_row_of_tokens_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        records.parse(row)
