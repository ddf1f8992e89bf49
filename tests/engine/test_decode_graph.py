"""Recording and replaying of steps: when, how many, and what happens where it fails."""

from __future__ import annotations

import logging

import pytest
import torch

from tinkex.engine.decode_graph import CudaCapture, Graphs

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="records CUDA graphs, and there is no CUDA here"
)


class Fake:
    """Writes down what is done; `fails` is raised by the next recordings."""

    def __init__(self):
        self.log = []
        self.fails = None

    def warm_up(self, step):
        self.log.append("warm up")
        step()

    def record(self, step):
        if self.fails is not None:
            raise self.fails
        self.log.append("record")
        return lambda: (self.log.append("replay"), step())


def test_the_first_step_warms_up_the_second_is_recorded_all_others_replay():
    """And every one of them is computed once."""
    fake, done = Fake(), []
    graphs = Graphs(fake)
    for i in range(4):
        graphs.run("shape", lambda i=i: done.append(i))

    assert ["warm up", "record", "replay", "replay", "replay"] == fake.log
    assert [0, 1, 1, 1] == done, "what is replayed is what was recorded"


def test_each_shape_has_its_own_recording():
    fake = Fake()
    graphs = Graphs(fake)
    for shape in ("a", "b", "a", "b", "a", "b"):
        graphs.run(shape, list)

    assert 2 == fake.log.count("record") == len(graphs)


def test_what_was_used_least_recently_goes_first():
    fake = Fake()
    graphs = Graphs(fake, most=2)
    for shape in ("a", "a", "b", "b", "a", "c", "c"):
        graphs.run(shape, list)
    fake.log.clear()

    for shape in ("a", "c"):
        graphs.run(shape, list)
    assert ["replay", "replay"] == fake.log
    graphs.run("b", list)
    assert "record" == fake.log[-2] and 2 == len(graphs), "b had gone, and is recorded again"


def test_a_dropped_shape_starts_again():
    fake = Fake()
    graphs = Graphs(fake)
    for shape in ("a", "a", "b", "b"):
        graphs.run(shape, list)
    graphs.drop(lambda shape: shape == "a")
    fake.log.clear()

    graphs.run("a", list)
    graphs.run("b", list)

    assert ["warm up", "replay"] == fake.log


def test_where_recording_fails_steps_run_as_they_are_and_it_is_logged_once(caplog):
    """Out of memory, or an operation that cannot be captured."""
    fake, done = Fake(), []
    fake.fails = RuntimeError("CUDA out of memory")
    graphs = Graphs(fake)
    with caplog.at_level(logging.INFO):
        for shape in ("a", "b"):
            for _ in range(3):
                graphs.run(shape, lambda: done.append(1))

    assert 6 == len(done)
    assert "replay" not in fake.log
    [record] = caplog.records
    assert "CUDA out of memory" in record.message


def test_an_error_of_the_step_itself_is_raised():
    def broken():
        raise ValueError("no such row")

    graphs = Graphs(Fake())

    with pytest.raises(ValueError, match="no such row"):
        graphs.run("a", broken)


def test_without_capture_every_step_runs_as_it_is():
    done = []
    graphs = Graphs(None)
    for i in range(3):
        graphs.run("a", lambda i=i: done.append(i))

    assert [0, 1, 2] == done


@needs_cuda
def test_cuda_replays_what_was_recorded():
    device = torch.device("cuda")
    total = torch.zeros(1, device=device)
    graphs = Graphs(CudaCapture(device))
    for _ in range(5):
        graphs.run("a", lambda: total.add_(1))

    assert 5 == total.item()
    assert 1 == len(graphs)


@needs_cuda
def test_cuda_falls_back_where_the_host_reads_a_number():
    device = torch.device("cuda")
    total = torch.zeros(1, device=device)
    graphs = Graphs(CudaCapture(device))
    for _ in range(3):
        graphs.run("a", lambda: total.add_(1 if total.item() >= 0 else 0))

    assert 3 == total.item()
    assert 0 == len(graphs)
