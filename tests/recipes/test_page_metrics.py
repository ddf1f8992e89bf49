"""What a recipe measures reaches the server's page, and never gets in the way of the run."""

from __future__ import annotations

import math

import tinkex
from tests.support.fake_engine import FakeEngine
from tests.support.fake_service import FakeService
from tinkex import errors, types
from tinkex.recipes.page_metrics import INTERVAL, PageMetrics
from tinkex.server.app import LocalServer


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_rows_are_sent_every_few_seconds_and_at_the_end():
    service, clock = FakeService(), Clock()
    metrics = PageMetrics(service, "run", clock)
    for step in range(1, 6):
        metrics.add({"step": step, "eval_loss": float(step)})
        clock.now += INTERVAL / 2
    metrics.flush()

    assert [1, 2, 2] == [len(points) for _, points in service.reported]
    assert [1, 2, 3, 4, 5] == [point["step"] for _, points in service.reported for point in points]


def test_what_the_server_sees_by_itself_is_not_sent():
    service = FakeService()
    PageMetrics(service, "run", Clock()).add(
        {"step": 1, "train_loss": 2.0, "tokens_per_second": 9.0, "learning_rate": 1e-4}
    )
    PageMetrics(service, "run", Clock()).add({"step": 1, "train_loss": 2.0})

    assert [("run", [{"step": 1, "learning_rate": 1e-4}])] == service.reported


def test_numbers_that_json_does_not_know_are_left_out():
    service = FakeService()
    PageMetrics(service, "run", Clock()).add({"step": 1, "a": math.nan, "b": math.inf, "c": 1.0})

    assert [("run", [{"step": 1, "c": 1.0}])] == service.reported


def test_a_server_that_does_not_take_them_is_asked_once(monkeypatch):
    service, clock, asked = FakeService(), Clock(), []

    def refuse(run_id, points, samples):
        asked.append(points)
        raise errors.NotFoundError("no such endpoint", status=404)

    monkeypatch.setattr(service, "report_run_metrics", refuse)
    metrics = PageMetrics(service, "run", clock)
    for step in range(5):
        metrics.add({"step": step, "eval_loss": 1.0})
        clock.now += INTERVAL
    metrics.flush()

    assert 1 == len(asked)


def test_samples_go_with_the_next_rows():
    """Also where there are no rows any more, at the end."""
    service, clock = FakeService(), Clock()
    metrics = PageMetrics(service, "run", clock)
    metrics.add_samples([types.RunSample(0, "Who?", "I")])
    metrics.flush()

    assert [("run", [])] == service.reported
    assert [types.RunSample(0, "Who?", "I")] == service.said


def test_they_arrive_at_a_real_server(tmp_path):
    with (
        LocalServer(tmp_path, engine=FakeEngine) as server,
        tinkex.ServiceClient(server.url, "tml-any") as service,
    ):
        run_id = service.create_lora_training_client("tiny").model_id
        PageMetrics(service, run_id).add({"step": 3, "eval_loss": 2.5})
        (point,) = service.create_rest_client().get_run_metrics(run_id).points

    assert (3, 2.5) == (point["step"], point["eval_loss"])
