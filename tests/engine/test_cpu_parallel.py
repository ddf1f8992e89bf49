"""Data-parallel workers: portions, results, failures, and how many cores a training step uses."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import cpu_parallel
from tinkex.engine.cpu_parallel import Workers
from tinkex.engine.engine import Engine


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a function of Linux")
@pytest.mark.parametrize(
    ("wanted", "cores"), [(None, 4), ("1", 1), ("2,8", 2), ("64", 4), ("0", 4), ("many", 4)]
)
def test_there_are_no_more_cores_than_omp_num_threads_says(monkeypatch, wanted, cores):
    """Whoever starts several programs divides the cores among them so."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)

    assert cores == cpu_parallel.available_cores()


@pytest.mark.parametrize(
    ("threads", "count"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (8, 4), (12, 4), (14, 2)]
)
def test_workers_have_equally_many_cores_and_leave_none_idle(threads, count):
    """Five cores, for example, cannot be divided, so they compute together."""
    assert count == Workers(threads).count


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_in_one_portion_and_portions_are_of_about_one_size(seed):
    """All workers wait for the largest portion."""
    sizes = np.random.default_rng(seed).integers(16, 512, 40).tolist()

    portions = Workers(3).divide(sizes)

    assert list(range(40)) == sorted(i for portion in portions for i in portion)
    totals = [sum(sizes[i] for i in portion) for portion in portions]
    assert 3 == len(portions)
    assert max(totals) <= cpu_parallel.MAX_IMBALANCE * sum(sizes) / 3


def test_a_portion_keeps_the_order_of_its_items():
    """Items are sorted by length, for attention, or by adapter."""
    assert [[0, 3], [1, 2]] == Workers(2).divide([400, 300, 200, 100])


def test_portions_are_of_adjacent_items_where_these_are_even():
    """Items side by side have the same adapter."""
    assert [[0, 1], [2, 3]] == Workers(2).divide([200] * 4, adjacent=True)
    assert [[0, 3], [1, 2]] == Workers(2).divide([400, 300, 200, 100], adjacent=True)


@pytest.mark.parametrize(
    "sizes", [[2000], [100, 100, 100], [900, 300]], ids=["one item", "little", "uneven"]
)
def test_work_that_would_leave_a_worker_waiting_is_computed_by_all_cores_together(sizes):
    assert [list(range(len(sizes)))] == Workers(2).divide(sizes)


@pytest.mark.parametrize(
    ("sizes", "is_even"), [([200] * 4, True), ([200] * 5, False), ([2000], False), ([20] * 5, True)]
)
def test_portions_are_even_if_no_worker_is_idle_for_long_or_none_would_help(sizes, is_even):
    assert is_even == Workers(2).is_even(sizes)
    assert Workers(1).is_even(sizes)


def test_results_come_in_the_order_of_the_workers_whichever_ends_first():
    second_is_done = threading.Event()

    def first():
        assert second_is_done.wait(10)
        return "first"

    def second():
        second_is_done.set()
        return "second"

    assert ["first", "second"] == Workers(2).run([first, second])


def test_a_worker_computes_with_its_own_cores_and_without_gradients():
    """The caller's settings stay as they are."""
    settings = Workers(4).run([lambda: (torch.get_num_threads(), torch.is_grad_enabled())] * 4)

    assert [(1, False)] * 4 == settings
    assert (4, True) == (torch.get_num_threads(), torch.is_grad_enabled())


def test_the_thread_that_makes_workers_keeps_all_cores():
    """Also when it has computed nothing before: the server's compute thread is new."""

    def thread_counts():
        workers = Workers(2)
        torch.ones(300, 300) @ torch.ones(300, 300)
        return torch.get_num_threads(), workers.run([torch.get_num_threads] * 2)

    with ThreadPoolExecutor(1) as new_thread:
        assert (2, [1, 1]) == new_thread.submit(thread_counts).result()


def test_a_number_of_threads_set_later_does_not_reach_the_workers():
    workers = Workers(2)
    torch.set_num_threads(3)

    assert [1, 1] == workers.run([torch.get_num_threads] * 2)


def test_a_single_part_is_computed_by_the_caller():
    """The calling thread has all cores."""
    assert [threading.current_thread()] == Workers(2).run([threading.current_thread])


def test_a_failure_is_raised_when_all_parts_have_ended():
    """Nothing is still computing when the caller continues, and the workers stay usable."""
    pool, ended = Workers(2), threading.Event()
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


def test_threads_end_with_their_workers():
    """A process may create and drop many engines."""
    pool = Workers(2)
    [one, other] = pool.run([threading.current_thread] * 2)

    del pool
    gc.collect()

    for thread in (one, other):
        thread.join(10)
        assert not thread.is_alive()


def test_what_was_computed_is_not_kept_until_the_next_time():
    """A micro-batch's activations are hundreds of megabytes."""
    pool, kept = Workers(2), []

    class Big:
        pass

    def part():
        big = Big()
        kept.append(weakref.ref(big))
        return big

    results = pool.run([part, part])
    assert all(ref() is not None for ref in kept)
    del results
    pool.run([lambda: None] * 2)  # the workers are waiting for the next task again
    gc.collect()

    assert [None, None] == [ref() for ref in kept]


#: Sizes of models, from 0.9 million parameters to the 135 million of SmolLM2-135M.
CORE_SIZES = {
    "tiny": None,
    "small": {
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
    },
    "30 layers": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.parametrize(
    "size", ["tiny", "small", pytest.param("30 layers", marks=pytest.mark.slow)]
)
def test_a_training_step_uses_both_cores(size, tmp_path):
    """Processor time of the step over that of its busiest thread, whatever else the machine does.

    On a thread that has computed nothing before, as the server's compute thread.
    """
    name = "tiny"
    if CORE_SIZES[size] is not None:
        name = str(hf.make_random_base(tmp_path / "base", CORE_SIZES[size]))
    tokens = np.random.default_rng(0).integers(0, 500, (4, 257))
    data = [hf.datum(text) for text in tokens]

    def cores_used():
        engine = Engine(device="cpu", threads=2)
        engine.load_base(name)
        engine.create_model("m", name, types.LoraConfig(train_unembed=False), seed=0)

        def clocks():
            workers = engine._workers.run([time.thread_time] * 2)
            return np.array([time.process_time(), time.thread_time(), *workers])

        before = clocks()
        for _ in range(10 if size == "tiny" else 1):
            hf.drive(engine.forward_backward("m", data, "cross_entropy", None))
        process, *threads = clocks() - before
        return process / max(threads)

    with ThreadPoolExecutor(1) as compute_thread:
        assert compute_thread.submit(cores_used).result() >= 1.6
