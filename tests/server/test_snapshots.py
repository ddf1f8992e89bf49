"""Idle models leave the memory and come back bit for bit; models of ended sessions are gone."""

from __future__ import annotations

import sqlite3
import threading
import time

import pytest

from tests.server.conftest import Served
from tests.support.fake_engine import FakeEngine
from tests.support.processes import ServerProcess, free_port
from tests.support.wire_client import batch
from tinkex import types, wire
from tinkex.server.app import make_engine
from tinkex.server.limits import Limits

#: Idle at once: every pause between two operations takes a model out of memory.
IDLE = {"idle_model_seconds": 0.0, "reap_seconds": 0.02}


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class CountingEngine(FakeEngine):
    def restore(self, model_id, directory):
        self.log.append(("restore", model_id))
        super().restore(model_id, directory)


def train(client, model, after_each):
    """Batches and steps of an optimizer with momentum; the weight after each step."""
    weights = []
    after_each()
    for seq in range(1, 13, 3):
        client.result(client.forward_backward(model, seq, [seq, 5]))
        after_each()
        client.result(client.forward_backward(model, seq + 1, [9, seq]))
        after_each()
        weights.append(client.result(client.optim_step(model, seq + 2))["metrics"]["weight"])
        after_each()
    return weights


@pytest.mark.parametrize("port", ["journalled", "temporary"])
def test_a_model_that_is_swapped_out_in_every_pause_trains_the_same(serve, tmp_path, port):
    """Gradients that wait for their step and the optimizer's state go with it."""
    port = free_port() if port == "journalled" else 0
    engine = CountingEngine()
    swapped = serve(home=tmp_path / "a", engine=engine, limits=IDLE, port=port).client
    model = swapped.model()
    found = train(swapped, model, lambda: until(lambda: not engine.models))
    usual = serve(home=tmp_path / "b").client
    expected = train(usual, usual.model(), lambda: None)

    assert expected == found
    assert 12 == sum(call[0] == "restore" for call in engine.log)
    assert 1 == len(list((tmp_path / "a" / "servers").glob("*/snapshots/*")))


def test_real_weights_gradients_and_optimizers_come_back_to_the_bit(tmp_path):
    """The real engine: loss and gradient norm of every step are equal."""
    results = []
    for name, limits in (("idle", Limits(**IDLE)), ("kept", Limits())):
        served = Served(tmp_path / name, make_engine=make_engine, limits=limits)
        client, found = served.client, []
        model = client.model(rank=8)
        for seq in range(1, 9, 2):
            request = batch(model, seq, list(range(5, 40)), [7, 8, seq])
            path, kind, _, body = wire.encode_request(request, protobuf=True)
            promise = client.send_batch(path, kind, body)
            output = client.result(promise, protobuf=types.ForwardBackwardOutput)
            if name == "idle":
                pattern = f"{name}/servers/*/snapshots/*_{seq}"
                until(lambda pattern=pattern: list(tmp_path.glob(pattern)))
            params = {"learning_rate": 0.01, "grad_clip_norm": 0.1}
            body = {"model_id": model, "seq_id": seq + 1, "adam_params": params}
            step = client.result(client.post("optim_step", body))
            logprobs = [out["logprobs"].values.tobytes() for out in output.loss_fn_outputs]
            found.append((output.metrics, logprobs, step["metrics"]))
        results.append(found)
        served.close()

    assert results[1] == results[0]


def test_incomplete_gradients_are_still_refused_after_the_model_was_on_disk(serve, tmp_path):
    engine = CountingEngine()
    client = serve(engine=engine, limits=IDLE, port=free_port()).client
    model = client.model()
    client.result(client.forward_backward(model, 1, [666]))
    until(lambda: not engine.models)
    refused = client.result(client.optim_step(model, 2))
    until(lambda: not engine.models)
    client.result(client.forward_backward(model, 3, [5]))

    assert "gradients are incomplete" in refused["error"]
    assert "metrics" in client.result(client.optim_step(model, 4))


def test_after_a_restart_idle_models_stay_on_disk_until_they_are_used(tmp_path):
    limits = {"poll_seconds": 0.5, **IDLE}
    server = ServerProcess(tmp_path / "home", limits=limits)
    server.start()
    client = server.client
    models = [client.model() for _ in range(3)]
    for model in models:
        client.result(client.forward_backward(model, 1, [7]))
    snapshots = tmp_path / "home" / "servers" / f"port-{server.port}" / "snapshots"
    until(lambda: len(list(snapshots.glob("*_1"))) == 3)
    server.kill()
    server.start()
    info = client.post("get_info", {"model_id": models[0]})
    weights = [client.result(client.optim_step(model, 2))["metrics"] for model in models]
    server.close()

    assert "tiny" == info["model_data"]["tokenizer_id"].rsplit("/", 1)[-1]
    assert weights[0] == weights[1] == weights[2]


def test_a_snapshot_that_is_gone_is_an_error_that_says_so(serve, tmp_path):
    engine = CountingEngine()
    client = serve(engine=engine, limits=IDLE).client
    model = client.model()
    until(lambda: not engine.models)
    for path in (tmp_path / "home").glob("servers/*/snapshots/*/*"):
        path.unlink()
    failed = client.result(client.optim_step(model, 1))

    assert "could not be restored from its snapshot" in failed["error"]
    assert "model_id" in client.result(client.post("unload_model", {"model_id": model}))


def test_a_model_that_is_in_use_is_not_swapped_out(serve):
    """A batch that is interrupted keeps its place in the engine."""
    gate = threading.Event()
    engine = CountingEngine(gate=gate)
    client = serve(engine=engine, limits=IDLE).client
    model = client.model()
    promise = client.forward_backward(model, 1, [5], [6], [7])
    time.sleep(0.3)
    there = set(engine.models)
    gate.set()

    assert {model} == there
    assert "metrics" in client.result(promise)


def test_idle_samplers_leave_the_memory_and_are_opened_again(serve):
    engine = CountingEngine()
    client = serve(engine=engine, limits=IDLE).client
    model = client.model()
    path = client.result(client.save_for_sampler(model, 1, "s"))["path"]
    sampler = client.sampler(model_path=path)
    first = client.result(client.sample(sampler, 0, params={"seed": 3}))
    until(lambda: not engine.samplers)
    second = client.result(client.sample(sampler, 1, params={"seed": 3}))

    assert first["sequences"] == second["sequences"]


def test_a_finished_session_leaves_memory_journal_and_disk_at_once(serve, tmp_path):
    """Swapped out or not."""
    engine = CountingEngine()
    port = free_port()
    client = serve(engine=engine, limits={"idle_model_seconds": 0.2}, port=port).client
    session = client.session()
    models = [client.model(session, number) for number in range(3)]
    until(lambda: not engine.models)
    client.result(client.optim_step(models[0], 1))
    client.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
    folder = tmp_path / "home" / "servers" / f"port-{port}"

    def journalled():
        with sqlite3.connect(folder / "journal.sqlite") as journal:
            [(count,)] = journal.execute("SELECT COUNT(*) FROM models")
        journal.close()
        return count

    until(lambda: journalled() == 0)
    until(lambda: not list((folder / "snapshots").iterdir()))
    assert {} == engine.models
