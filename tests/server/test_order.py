"""Order, repeats and failures: training is correct whatever the network does."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.wire_client import batch
from tinkex import wire


def operations(served, model):
    """The engine's operations on a model, in order."""
    return [entry[0] for entry in served.engine.log if entry[1] == model]


def test_chunks_arriving_6_7_8_5_run_in_their_order(served):
    """The official SDK sends the first chunk of a batch last; the step waits for all chunks."""
    client = served.client
    model = client.model()
    promises = {
        seq: client.forward_backward(model, seq, [seq, seq]) for seq in (2, 3, 4)
    }  # 1 is still to come
    step = client.optim_step(model, 5)
    held = client.send("POST", "retrieve_future", {"request_id": promises[2]["request_id"]})
    promises[1] = client.forward_backward(model, 1, [1, 1])
    client.result(step)
    losses = [client.result(promises[seq])["metrics"]["loss:sum"] for seq in (1, 2, 3, 4)]

    assert 408 == held.status_code
    assert "operation 1 has not arrived yet" == held.json()["queue_state_reason"]
    assert ["create", *["forward_backward"] * 4, "optim_step"] == operations(served, model)
    assert losses == [entry[2] for entry in served.engine.log if entry[0] == "forward_backward"]


REPEATED = {
    "forward_backward": lambda client, model: client.forward_backward(model, 1, [1, 2]),
    "optim_step": lambda client, model: client.optim_step(model, 1),
    "save_weights": lambda client, model: client.save(model, 1, "state"),
    "save_weights_for_sampler": lambda client, model: client.save_for_sampler(model, 1, "s"),
    "unnamed sampler weights": lambda client, model: client.post(
        "save_weights_for_sampler",
        {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0},
    ),
    "unload_model": lambda client, model: client.post("unload_model", {"model_id": model}),
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_repeat_gets_the_same_promise_and_runs_once(served, name):
    """A client resends after a lost response, before or after the operation has run."""
    client = served.client
    model = client.model()
    served.engine.log.clear()
    first = REPEATED[name](client, model)
    second = REPEATED[name](client, model)
    results = [client.result(first)]
    third = REPEATED[name](client, model)
    results += [client.result(third), client.result(first)]

    assert first == second == third
    assert results[0] == results[1] == results[2]
    assert "error" not in results[0]
    assert len(operations(served, model)) <= 1


def test_a_repeated_creation_makes_one_model(served):
    """(session, model_seq_id) identifies a creation."""
    client = served.client
    session = client.session()
    body = {"session_id": session, "model_seq_id": 3, "base_model": "tiny"}
    promises = [client.post("create_model", body) for _ in range(3)]
    results = [client.result(promise) for promise in promises]

    assert promises[0] == promises[1] == promises[2]
    assert {f"{session}:train:3"} == {result["model_id"] for result in results}
    assert [("create", f"{session}:train:3")] == served.engine.log


def test_a_repeated_creation_from_a_checkpoint_outlives_the_checkpoint(served):
    """The response to a resend does not depend on later events."""
    client = served.client
    model = client.model()
    path = client.result(client.save(model, 1, "state"))["path"]
    session = client.session()
    body = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": True}
    first = client.post("load_weights", body)
    client.result(first)
    client.send("DELETE", f"training_runs/{model}/checkpoints/weights/state")
    second = client.post("load_weights", body)

    assert first == second
    assert f"{session}:train:0" == client.result(second)["model_id"]


def test_sampling_sessions_and_samples_are_repeated_too(served):
    """(session, sampling_session_seq_id) and (sampling session, seq_id) identify requests."""
    client = served.client
    session = client.session()
    samplers = [client.sampler(session, 5, base_model="tiny") for _ in range(2)]
    promises = [client.sample(samplers[0], 9, num_samples=2) for _ in range(2)]
    results = [client.result(promise) for promise in promises]

    assert [f"{session}:sample:5"] * 2 == samplers
    assert promises[0] == promises[1]
    assert 2 == len(promises[0]["sample_sequence_ids"])
    assert results[0] == results[1]


def test_the_numbers_of_samplers_are_shared_by_their_two_kinds(served):
    """create_sampling_session and unnamed save_weights_for_sampler count together."""
    client = served.client
    session = client.session()
    model = client.model(session)
    client.sampler(session, 0, base_model="tiny")
    status, sentence = client.refused(
        "save_weights_for_sampler",
        {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0},
    )
    promise = client.post(
        "save_weights_for_sampler",
        {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 1},
    )

    assert 400 == status
    assert "sampling_session_seq_id 0" in sentence
    assert f"{session}:sample:1" == client.result(promise)["sampling_session_id"]


def test_a_repeat_with_another_body_is_refused(served):
    """A number is used once; ignoring the second request would hide a bug of the client."""
    client = served.client
    model = client.model()
    first = client.forward_backward(model, 1, [1, 2])
    bad = client.refused(
        "optim_step", {"model_id": model, "seq_id": 1, "adam_params": {"learning_rate": 1}}
    )

    assert 400 == bad[0]
    assert "operation 1" in bad[1]
    assert "ForwardBackward" in bad[1]
    assert "error" not in client.result(first)


def test_a_repeat_in_the_other_dialect_is_the_same_request(served):
    """The content counts, not its encoding."""
    client = served.client
    model = client.model()
    request = batch(model, 1, [3, 4])
    promises = []
    for protobuf in (True, False):
        path, kind, _, body = wire.encode_request(request, protobuf)
        promises.append(client.send_batch(path, kind, body))

    assert promises[0] == promises[1]


def test_a_refused_request_uses_no_number(served):
    """The same number is accepted once the request is valid."""
    client = served.client
    model = client.model()
    refused = client.refused("optim_step", {"model_id": model, "seq_id": 1, "adam_params": 7})
    step = client.result(client.optim_step(model, 1))

    assert 400 == refused[0]
    assert "weight" in step["metrics"]


def test_after_a_failed_batch_the_step_fails_and_the_model_goes_on(served):
    """An optimizer step must not use incomplete gradients."""
    client = served.client
    model = client.model()
    client.result(client.forward_backward(model, 1, [1, 2]))
    failed = client.result(client.forward_backward(model, 2, [1, 2], [666]))
    after = client.result(client.forward_backward(model, 3, [1, 2]))
    step = client.result(client.optim_step(model, 4))
    client.result(client.forward_backward(model, 5, [4, 4]))
    good = client.result(client.optim_step(model, 6))
    other = client.model(client.session())
    client.result(client.forward_backward(other, 1, [4, 4]))
    reference = client.result(client.optim_step(other, 2))

    assert "user" == failed["category"]
    assert "token 666 is cursed" in failed["error"]
    assert "loss:sum" in after["metrics"]
    assert "user" == step["category"]
    assert "token 666 is cursed" in step["error"]
    assert "operation 2" in step["error"]
    assert reference["metrics"] == good["metrics"]


def test_a_failed_forward_keeps_the_gradients(served):
    """It touches no gradients."""
    client = served.client
    model = client.model()
    request = batch(model, 1, [666], forward_only=True)
    path, kind, _, body = wire.encode_request(request, False)
    failed = client.result(client.send_batch(path, kind, body))
    step = client.result(client.optim_step(model, 2))

    assert "user" == failed["category"]
    assert "metrics" in step


def test_a_fault_of_the_server_is_told_as_one(served, caplog):
    """The category tells the client that changing the request does not help."""
    client = served.client
    model = client.model()
    failed = client.result(client.forward_backward(model, 1, [667]))

    assert "server" == failed["category"]
    assert "a bug was found" in failed["error"]
    assert "Traceback" not in failed["error"]


def test_a_model_that_could_not_be_created_says_why_each_time(served):
    """Operations pipelined behind a failed creation fail with its reason."""
    client = served.client
    session = client.session()
    promise = client.post(
        "create_model", {"session_id": session, "model_seq_id": 0, "base_model": "missing/model"}
    )
    step = client.optim_step(f"{session}:train:0", 1)

    assert "missing/model" in client.result(promise)["error"]
    assert "missing/model" in client.result(step)["error"]


def test_a_creation_that_failed_leaves_its_number_to_another(served):
    """A corrected request can use the same number; a resend gets the failure."""
    client = served.client
    session = client.session()
    wrong = {"session_id": session, "model_seq_id": 0, "base_model": "missing/model"}
    failed = client.result(client.post("create_model", wrong))
    resent = client.result(client.post("create_model", wrong))
    corrected = client.result(client.post("create_model", {**wrong, "base_model": "tiny"}))
    step = client.result(client.optim_step(f"{session}:train:0", 1))

    assert failed == resent
    assert f"{session}:train:0" == corrected["model_id"]
    assert "metrics" in step


def test_unloading_waits_for_what_was_accepted(served):
    """Operations that wait for a missing number fail."""
    client = served.client
    model = client.model()
    first = client.forward_backward(model, 1, [1])
    stranded = client.optim_step(model, 3)
    unloaded = client.post("unload_model", {"model_id": model})

    assert "metrics" in client.result(first)
    assert model == client.result(unloaded)["model_id"]
    assert "unloaded before operation 3" in client.result(stranded)["error"]
    assert 404 == client.refused("optim_step", {"model_id": model, "seq_id": 2})[0]
    assert model not in served.engine.models


def test_a_small_request_is_not_held_up_by_big_ones(serve):
    """Models share the compute time, switching between micro-batches."""

    class Slow(FakeEngine):
        def forward_backward(self, *args, **kwargs):
            for _ in super().forward_backward(*args, **kwargs):
                time.sleep(0.005)
                yield
            return None

    served = serve(engine=Slow())
    client = served.client
    big = [client.model() for _ in range(3)]
    small = client.model()
    for model in big:
        client.forward_backward(model, 1, *([[1]] * 200))  # a second each
    started = time.monotonic()
    client.result(client.optim_step(small, 1))
    sampled = client.sampler(model_path=None, base_model="tiny")
    client.result(client.sample(sampled, 0))
    waited = time.monotonic() - started

    assert not [entry for entry in served.engine.log if entry[0] == "forward_backward"]
    assert waited < 0.5


def test_polls_answer_408_while_the_result_is_not_there(serve):
    """The reason lets a client distinguish waiting from hanging."""
    gate = threading.Event()
    served = serve(engine=FakeEngine(gate=gate), limits={"poll_seconds": 0.05})
    client = served.client
    model = client.model()
    running = client.forward_backward(model, 1, [1])
    behind = client.optim_step(model, 2)
    polls = [
        client.send("POST", "retrieve_future", {"request_id": promise["request_id"]})
        for promise in (running, behind)
    ]
    gate.set()

    assert [408, 408] == [poll.status_code for poll in polls]
    assert "running" == polls[0].json()["queue_state_reason"]
    assert "active" == polls[1].json()["queue_state"]
    assert 1 == polls[1].json()["queue_position"]
    assert "metrics" in client.result(behind)


def test_a_result_that_is_not_there_any_more_is_410(serve):
    """A client can distinguish it from one that is not ready yet."""
    served = serve(limits={"grace_seconds": 0.0})
    client = served.client
    model = client.model()
    promise = client.optim_step(model, 1)
    client.result(promise)
    deadline = time.monotonic() + 5
    status = 200
    while status == 200 and time.monotonic() < deadline:
        status = client.send("POST", "retrieve_future", promise).status_code
    repeat = client.optim_step(model, 1)
    unknown = client.refused("retrieve_future", {"request_id": "never:heard:of:it"})

    assert 410 == status
    assert promise == repeat
    assert 410 == unknown[0]
    assert 1 == sum(entry[0] == "optim_step" for entry in served.engine.log)


def test_the_queue_of_a_model_is_bounded_but_never_stuck(serve):
    """The missing operation is accepted even if the queue is full."""
    served = serve(limits={"model_queue": 3})
    client = served.client
    model = client.model()
    for seq in (2, 3, 4):
        client.optim_step(model, seq)
    answer = client.send("POST", "optim_step", {"model_id": model, "seq_id": 5})
    first = client.optim_step(model, 1)

    assert 429 == answer.status_code
    assert "1" == answer.headers["Retry-After"]
    assert "metrics" in client.result(first)


def test_a_model_that_is_unloaded_twice_is_unloaded_once_and_takes_nothing_more(serve):
    """The second request is a resend of the first: the same promise."""
    gate = threading.Event()
    served = serve(engine=FakeEngine(gate=gate))
    client = served.client
    model = client.model()
    under_way = client.forward_backward(model, 1, [5])
    promises = [client.post("unload_model", {"model_id": model}) for _ in range(2)]
    status, sentence = client.refused(
        "optim_step", {"model_id": model, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}
    )
    gate.set()

    assert promises[0]["request_id"] == promises[1]["request_id"]
    assert (404, True) == (status, "is being unloaded" in sentence)
    assert "metrics" in client.result(under_way)
    assert model == client.result(promises[0])["model_id"]
