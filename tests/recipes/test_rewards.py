"""Reward functions: loaded by name, run in a pool, and what happens when they fail."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import pytest

from tinkex.recipes import rewards


@pytest.fixture
def pool():
    pool = rewards.Pool(workers=2, timeout=30)
    yield pool
    pool.close()


def test_plain_and_async_functions_are_called(pool):
    async def later(x):
        await asyncio.sleep(0)
        return x + 1

    calls = [pool.start(function, 1) for function in (lambda x: x, later)]

    assert [1, 2] == [call.result() for call in calls]


def test_calls_run_at_the_same_time(pool):
    """Each waits for the other."""
    both = threading.Barrier(2)
    calls = [pool.start(both.wait, 30) for _ in range(2)]

    assert {0, 1} == {call.result() for call in calls}


def test_what_a_function_raises_is_named(pool):
    def score(x):
        raise KeyError("answer")

    with pytest.raises(rewards.RewardError, match=r"score raised KeyError: 'answer'"):
        pool.call(score, 1)


def test_a_time_out_of_the_functions_own_is_not_ours(pool):
    async def score():
        raise TimeoutError("judge.example.com")

    with pytest.raises(rewards.RewardError, match=r"score raised TimeoutError: judge"):
        pool.call(score)


@pytest.mark.parametrize("is_async", [False, True])
def test_functions_that_hang_fail_in_time_and_do_not_use_up_the_pool(is_async):
    pool, over = rewards.Pool(workers=1, timeout=0.3), threading.Event()

    async def sleeps():
        await asyncio.sleep(600)

    hangs = sleeps if is_async else over.wait
    for _ in range(3):
        with pytest.raises(rewards.RewardError, match=r"did not return within 0.3 s"):
            pool.call(hangs)
    assert 7 == pool.call(lambda: 7)

    over.set()
    pool.close()


def test_waiting_for_a_turn_is_not_part_of_the_time():
    pool = rewards.Pool(workers=1, timeout=20)
    first, second = pool.start(time.sleep, 0.05), pool.start(lambda: 2)

    assert 2 == second.result()
    assert first.result() is None
    pool.close()


def test_a_score_is_a_number_or_a_dict_with_a_reward():
    assert rewards.Score(1.0) == rewards.as_score(True)
    assert rewards.Score(0.5, {"digits": 1.0}) == rewards.as_score({"reward": 0.5, "digits": 1})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (math.nan, "nan, which is not a finite number"),
        ("good", "'good', which is not a finite number"),
        (None, "None, which is not a finite number"),
        ({"reward": 1, "x": math.inf}, "inf for 'x'"),
        ({"score": 1}, "a dict without \"reward\": its keys are 'score'"),
    ],
)
def test_what_is_no_score_is_named(value, problem):
    with pytest.raises(ValueError, match=problem):
        rewards.as_score(value)


def test_a_function_is_loaded_with_its_neighbours(tmp_path):
    (tmp_path / "helper_of_rewards.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text(
        "from helper_of_rewards import VALUE\ndef score(a, row): return VALUE\n"
    )

    assert 3 == rewards.load(f"{tmp_path}/mine.py:score")("", {})


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("mine.py", "names no function; write it like my_rewards.py:score"),
        ("gone.py:score", "there is no file gone.py"),
        ("mine.py:scores", "has no function scores; it has score"),
        ("broken.py:score", "broken.py cannot be run: ZeroDivisionError"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(spec, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def score(a, row): return 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")

    with pytest.raises(ValueError, match=problem):
        rewards.load(spec)
