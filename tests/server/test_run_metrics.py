"""The metrics of runs: a point for each optimizer step, points of clients, across restarts."""

from __future__ import annotations

import json

import pytest

import tinkex
from tests.support.processes import free_port
from tinkex import types
from tinkex.server.run_metrics import MOST_POINTS, MOST_SAMPLES, RunMetrics

ADAM = {"adam_params": {"learning_rate": 0.1}}


def train(client, model, steps, first=1):
    seq = first
    for _ in range(steps):
        client.result(client.forward_backward(model, seq, [1, 2, 3], [4, 5]))
        client.result(client.post("optim_step", {"model_id": model, "seq_id": seq + 1, **ADAM}))
        seq += 2
    return seq


def points(client, model, after=0):
    return client.get(f"runs/{model}/metrics", params={"after": after})


def test_each_step_is_a_point_with_the_loss_of_its_batches(client):
    """Two batches and a step are one point: the loss is the mean over the tokens of both."""
    model = client.model()
    first = client.result(client.forward_backward(model, 1, [1, 2, 3], [4, 5]))
    second = client.result(client.forward_backward(model, 2, [6]))
    client.result(client.post("optim_step", {"model_id": model, "seq_id": 3, **ADAM}))

    (point,) = points(client, model)["points"]

    losses = first["metrics"]["loss:sum"] + second["metrics"]["loss:sum"]
    assert (1, 6) == (point["step"], point["tokens"])
    assert pytest.approx(losses / 6) == point["loss"]


def test_points_are_read_on_from_where_an_answer_ended(client):
    model = client.model()
    seq = train(client, model, 3)
    head = points(client, model)
    train(client, model, 2, first=seq)
    tail = points(client, model, head["next"])

    assert [1, 2, 3] == [point["step"] for point in head["points"]]
    assert [4, 5] == [point["step"] for point in tail["points"]]
    assert [] == points(client, model, tail["next"])["points"]
    assert all(point["tokens_per_second"] > 0 for point in tail["points"])


def test_a_client_adds_points_of_its_own(client):
    model = client.model()
    client.post(f"runs/{model}/metrics", {"points": [{"step": 3, "held_out_loss": 2.5}]})

    (point,) = points(client, model)["points"]

    assert {"step": 3, "held_out_loss": 2.5} == {k: v for k, v in point.items() if k != "time"}


def test_the_client_reads_and_reports_them(served):
    with tinkex.ServiceClient(served.server.url, "tml-any") as service:
        training = service.create_lora_training_client("tiny")
        rest, run_id = service.create_rest_client(), training.model_id
        rest.report_run_metrics(run_id, [{"step": 1, "eval_loss": 3.5}])
        head = rest.get_run_metrics(run_id)
        rest.report_run_metrics(run_id, [{"step": 2, "eval_loss": 3.0}])
        tail = rest.get_run_metrics(run_id, after=head.next)

    assert [3.5] == [point["eval_loss"] for point in head.points]
    assert [3.0] == [point["eval_loss"] for point in tail.points]


@pytest.mark.parametrize(
    "body",
    [
        {}, {"points": {}}, {"points": [3]}, {"points": [{}]}, {"points": [{"loss": "2"}]},
        {"points": [{"loss": True}]}, {"points": [{"": 1}]}, {"points": [{"a\nb": 1}]},
        {"points": [{"x" * 65: 1}]}, {"points": [{str(i): i for i in range(65)}]},
        {"points": [{"loss": 2**5000}]}, {"points": [{"loss": 1}] * 1001},
    ],
)  # fmt: skip
def test_a_bad_report_adds_nothing(client, body):
    model = client.model()
    status, sentence = client.refused(f"runs/{model}/metrics", body)

    assert 400 == status and "points" in sentence
    assert [] == points(client, model)["points"]


@pytest.mark.parametrize(
    "samples",
    [
        3,
        [{"step": 1}],
        [{"step": "x", "prompt": "p", "text": "t"}],
        [{"step": 2**80, "prompt": "p", "text": "t"}],
        [{"step": 1, "prompt": "p", "text": "t"}] * 101,
    ],
    ids=["no list", "a field is missing", "no number", "too large", "too many"],
)
def test_a_bad_report_of_samples_adds_nothing(client, samples):
    model = client.model()
    body = {"points": [{"step": 1}], "samples": samples}
    answer = client.send("POST", f"runs/{model}/metrics", json=body)

    assert 400 == answer.status_code
    assert {"points": [], "next": 0, "samples": []} == points(client, model)


def test_the_newest_samples_are_kept_also_over_a_restart(tmp_path):
    metrics = RunMetrics(tmp_path)
    for step in range(30):
        metrics.add_samples(
            "run", [types.RunSample(step, "p", f"{step} {i} " + "x" * 9999) for i in range(10)]
        )
    again = RunMetrics(tmp_path).samples("run")

    assert MOST_SAMPLES == len(again)
    assert (10, 29) == (again[0]["step"], again[-1]["step"])
    assert 4000 == len(again[-1]["text"])
    assert 30 == metrics.sampled_at("run")


def test_the_client_reads_and_reports_samples(served):
    said = [types.RunSample(3, "Who?", "<b>I</b>")]
    with tinkex.ServiceClient(served.server.url, "tml-any") as service:
        run_id = service.create_lora_training_client("tiny").model_id
        rest = service.create_rest_client()
        rest.report_run_metrics(run_id, [], said)

        assert said == rest.get_run_metrics(run_id).samples


def test_a_run_of_another_user_has_no_metrics(serve):
    from tinkex.server.auth import Keys

    served = serve(keys=lambda home: Keys.of_users(["tml-a", "tml-b"], b"secret"))
    model = served.client_with("tml-a").model()
    other = served.client_with("tml-b")

    assert 404 == other.refused(f"runs/{model}/metrics", method="GET")[0]
    assert 404 == other.refused(f"runs/{model}/metrics", {"points": [{"loss": 1}]})[0]


def test_a_restart_repeats_no_point_and_counts_on(serve):
    """The journal runs the operations again; they have made their points before."""
    port = free_port()
    served = serve(port=port)
    model = served.client.model()
    seq = train(served.client, model, 3)
    served.close()
    again = serve(port=port)
    train(again.client, model, 2, first=seq)

    steps = [point["step"] for point in points(again.client, model)["points"]]
    assert [1, 2, 3, 4, 5] == steps


def test_a_step_without_a_batch_has_no_loss(client):
    model = client.model()
    client.result(client.post("optim_step", {"model_id": model, "seq_id": 1, **ADAM}))

    (point,) = points(client, model)["points"]
    assert 0 == point["tokens"] and "loss" not in point


def test_of_a_long_run_every_nth_point_is_sent_and_the_newest(tmp_path):
    metrics = RunMetrics(tmp_path)
    metrics.add("a:train:0", [{"step": i} for i in range(MOST_POINTS * 3 + 1)])
    found, _ = metrics.read("a:train:0")

    assert MOST_POINTS >= len(found) > MOST_POINTS // 2
    assert MOST_POINTS * 3 == found[-1]["step"]


def test_a_half_written_line_is_read_when_it_is_whole(tmp_path):
    metrics = RunMetrics(tmp_path)
    metrics.add("a:train:0", [{"step": 1}])
    path = tmp_path / "a_train_0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step"')
    found, following = metrics.read("a:train:0")
    path.write_bytes(whole + b'{"step": 2}\n')

    assert ([1], len(whole)) == ([point["step"] for point in found], following)
    assert [{"step": 2}] == metrics.read("a:train:0", following)[0]


def test_the_newest_value_of_each_metric_is_known_after_a_restart(tmp_path):
    """Metrics come in different points: a held-out loss every few steps, the loss at each."""
    RunMetrics(tmp_path).add("a:train:0", [{"held_out_loss": 3.0}, {"step": 9, "loss": 2.0}])

    latest = RunMetrics(tmp_path).latest("a:train:0")
    assert (3.0, 9, 2.0) == (latest["held_out_loss"], latest["step"], latest["loss"])


def test_a_folder_that_cannot_be_written_costs_points_and_one_log_line(tmp_path, caplog):
    (tmp_path / "metrics").write_text("a file where the folder should be")
    metrics = RunMetrics(tmp_path / "metrics")
    for step in range(3):
        metrics.add("a:train:0", [{"step": step}])

    assert 1 == sum("Metrics of runs cannot be written" in line for line in caplog.messages)
    assert 2 == metrics.latest("a:train:0")["step"]
    assert ([], 0) == metrics.read("a:train:0")


def test_points_are_lines_of_json(tmp_path):
    """For those who want them without the server."""
    RunMetrics(tmp_path, clock=lambda: 7.0).add("s:train:0", [{"step": 1, "loss": 0.5}])

    line = (tmp_path / "s_train_0.jsonl").read_text()
    assert {"time": 7.0, "step": 1, "loss": 0.5} == json.loads(line)
