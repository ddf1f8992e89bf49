"""Lanes: who computes what, and what becomes of results and failures."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch

from tinkex.engine import cpu_parallel
from tinkex.engine.cpu_parallel import Lanes


@pytest.mark.parametrize(
    ("threads", "count"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (12, 4), (14, 2)]
)
def test_lanes_have_as_many_cores_each_and_leave_none_idle(threads, count):
    """Five cores, say, work together, as they did before there were lanes."""
    assert count == Lanes(threads).count


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_share_and_shares_are_of_about_one_size(seed):
    """The largest is what the others wait for."""
    sizes = np.random.default_rng(seed).integers(16, 512, 40).tolist()

    shares = Lanes(3).share_out(sizes)

    assert list(range(40)) == sorted(i for share in shares for i in share)
    totals = [sum(sizes[i] for i in share) for share in shares]
    assert 3 == len(shares)
    assert max(totals) <= cpu_parallel.UNEVEN * sum(sizes) / 3


def test_a_share_keeps_the_order_of_its_items():
    """They come sorted: by length, for attention, or by adapter."""
    assert [[0, 3], [1, 2]] == Lanes(2).share_out([400, 300, 200, 100])


@pytest.mark.parametrize(
    "sizes", [[2000], [100, 100, 100], [900, 300]], ids=["one item", "little", "uneven"]
)
def test_what_would_leave_a_lane_waiting_is_computed_by_all_cores_together(sizes):
    assert [list(range(len(sizes)))] == Lanes(2).share_out(sizes)


def test_results_come_in_the_order_of_the_lanes_whichever_ends_first():
    second_is_done = threading.Event()

    def first():
        assert second_is_done.wait(10)
        return "first"

    def second():
        second_is_done.set()
        return "second"

    assert ["first", "second"] == Lanes(2).run([first, second])


def test_a_lane_computes_with_its_own_cores_and_without_gradients():
    """The caller's settings stay as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        settings = Lanes(4).run([lambda: (torch.get_num_threads(), torch.is_grad_enabled())] * 4)

        assert [(1, False)] * 4 == settings
        assert (4, True) == (torch.get_num_threads(), torch.is_grad_enabled())
    finally:
        torch.set_num_threads(before)


def test_a_single_part_is_computed_by_the_caller():
    """Which has all cores."""
    assert [threading.current_thread()] == Lanes(2).run([threading.current_thread])


def test_a_failure_is_raised_when_all_parts_have_ended():
    """Nothing goes on computing behind the caller's back; the lanes work on."""
    pool, ended = Lanes(2), threading.Event()
    failed = threading.Event()

    def fails():
        failed.set()
        raise ValueError("not finite")

    def ends():
        assert failed.wait(10)
        ended.set()

    with pytest.raises(ValueError, match="not finite"):
        pool.run([fails, ends])

    assert ended.is_set()
    assert [1, 2] == pool.run([lambda: 1, lambda: 2])


def test_threads_end_with_their_lanes():
    """Engines come and go in one process."""
    pool = Lanes(2)
    [one, other] = pool.run([threading.current_thread] * 2)

    del pool
    gc.collect()

    for thread in (one, other):
        thread.join(10)
        assert not thread.is_alive()


def test_what_was_computed_is_not_kept_until_the_next_time():
    """A micro-batch's activations are hundreds of megabytes."""
    pool, kept = Lanes(2), []

    class Big:
        pass

    def part():
        big = Big()
        kept.append(weakref.ref(big))
        return big

    results = pool.run([part, part])
    assert all(ref() is not None for ref in kept)
    del results
    pool.run([lambda: None] * 2)  # the lanes have come round to waiting for more
    gc.collect()

    assert [None, None] == [ref() for ref in kept]
