"""What the benchmark says of figures: medians and spreads of paired rounds, and what moved."""

from __future__ import annotations

import pytest

from tests.benchmarks import figures
from tests.benchmarks.rounds import LEAST, MOST, Allowance, in_turns
from tests.benchmarks.rows import OF_LIMIT, Row, Spread, table


def row(ours, theirs=(2.0, 2.0, 2.0), **more):
    return Row("a case", "ms", ours, theirs, **more)


def test_a_ratio_is_taken_round_by_round():
    """A slow minute slows both sides; medians of each side would compare different rounds."""
    shown = Row("a case", "ms", [1.0, 10.0, 100.0], [2.0, 20.0, 200.0]).ratio

    assert Spread(0.5, 0.0) == shown


def test_a_time_that_is_allowed_holds_for_every_round():
    assert Spread(0.5, 0.25) == row([1.0, 3.0, 2.0], [4.0]).ratio


@pytest.mark.parametrize(
    ("ours", "more", "met"),
    [
        ([1.0, 1.0, 1.0], {"target": 0.5}, True),
        ([1.1, 1.1, 1.1], {"target": 0.5}, False),
        ([1.0, 1.0, 1.0], {"target": 0.5, "at_least": True}, True),
        ([0.9, 0.9, 0.9], {"target": 0.5, "at_least": True}, False),
        ([1.0, 1.0, 1.0], {}, None),
        ([1.0, 1.0, 1.0], {"limits": (2.0, 2.0, 2.0), "share_target": 0.6}, False),
        ([1.0, 1.0, 1.0], {"target": 0.5, "limits": (1.0,), "share_target": 0.6}, True),
    ],
)
def test_a_row_is_met_if_ratio_and_share_are(ours, more, met):
    assert met is row(ours, **more).met


def test_only_what_moves_further_than_both_spreads_is_said():
    before = figures.of_rows([row([1.0, 1.2, 1.1])])  # 0.55 +- 0.05
    beside = figures.of_rows([row([1.1, 1.3, 1.3])])
    beyond = figures.of_rows([row([1.4, 1.4, 1.4])])

    assert [] == figures.moved(before, beside)
    assert ["WORSE: a case: ratio 0.55 ± 0.05 -> 0.70 ± 0.00"] == figures.moved(before, beyond)


def test_a_steady_figure_has_to_move_by_a_part_of_itself():
    before, after = (figures.of_rows([row([x, x, x])]) for x in (1.0, 1.04))

    assert [] == figures.moved(before, after)


@pytest.mark.parametrize(
    ("more", "word"), [({}, "WORSE"), ({"at_least": True}, "better")], ids=["time", "speed"]
)
def test_which_way_is_better_depends_on_the_target(more, word):
    before, after = (figures.of_rows([row([x] * 3, **more)]) for x in (1.0, 2.0))

    [said] = figures.moved(before, after)
    assert said.startswith(word)


def test_a_larger_share_of_the_limit_is_better():
    before, after = (
        figures.of_rows([Row("a case", "tok/s", [x], limits=[10.0])]) for x in (5.0, 8.0)
    )

    assert ["better: a case: share 0.50 ± 0.00 -> 0.80 ± 0.00"] == figures.moved(before, after)


def test_rows_that_are_new_or_gone_are_not_compared():
    new = figures.of_rows([Row("a new case", "ms", [1.0], [2.0])])

    assert [] == figures.moved(figures.of_rows([row([1.0] * 3)]), new)


def test_rounds_go_on_while_there_is_time_within_bounds():
    calls = []

    def call():
        calls.append(None)
        return 1.0

    [short] = in_turns((call,), 0.0)
    [long] = in_turns((call,), 60.0)

    assert [1.0] * LEAST == short
    assert [1.0] * MOST == long
    assert LEAST + MOST + 2 == len(calls)  # each warms up once


def test_what_a_case_leaves_of_its_time_is_for_those_after_it():
    allowance = Allowance(100.0, 4)

    first, second = allowance.next(), allowance.next()

    assert 25 == pytest.approx(first, rel=0.01)
    assert 33.3 == pytest.approx(second, rel=0.01)
    assert 0.0 == Allowance(0.0, 1).next()


def test_a_table_has_a_cell_for_every_column():
    lines = table([row([1.0] * 3, model="tiny", limits=(4.0,))], OF_LIMIT).splitlines()

    assert 1 == len({line.count("|") for line in lines})
    assert "| tiny | ms | 1 | 2 | 0.50 ± 0.00 |  | 4 | 0.25 ± 0.00 |  |  |" in lines[-1]
