"""A refused request must not end its model's run, however the client continues to count."""

from __future__ import annotations

import pytest
import requests

from tests.support.processes import ServerProcess
from tests.support.wire_client import batch
from tinkex import wire
from tinkex.conformance.client import zstd_bomb
from tinkex.server.http_errors import Refusal
from tinkex.server.request_context import unpack


def save(model, seq_id, name):
    return {"model_id": model, "seq_id": seq_id, "path": name}


def test_the_next_number_runs_after_a_refused_one(client):
    """The official SDK counts refused requests; later ones would wait forever for the gap."""
    model = client.model()
    refusal = client.refused("save_weights", save(model, 1, "../up"))
    step = client.optim_step(model, 2)

    assert 400 == refusal[0]
    assert "metrics" in client.result(step)
    assert refusal[1] in client.result(f"{model}:1")["error"]


def test_the_refused_number_can_be_used_for_a_good_request(client):
    """tinkex does that."""
    model = client.model()
    client.refused("save_weights", save(model, 1, "../up"))
    saved = client.post("save_weights", save(model, 1, "up"))
    step = client.optim_step(model, 2)

    assert f"tinker://{model}/weights/up" == client.result(saved)["path"]
    assert "metrics" in client.result(step)


@pytest.mark.parametrize("protobuf", [False, True], ids=["json", "protobuf"])
def test_no_step_is_taken_over_a_refused_batch(served, protobuf):
    """The client believes that its gradient is included: half a batch must not be used."""
    client = served.client
    model = client.model()
    request = batch(model, 2)
    request.data[0].model_input.chunks[0].tokens_np[0] = -1  # past the checks, as from another SDK
    path, content_type, _, body = wire.encode_request(request, protobuf)
    first = client.forward_backward(model, 1, [5])
    refused = requests.post(client.url + path, body, headers={"Content-Type": content_type})
    step = client.optim_step(model, 3)
    good = [client.forward_backward(model, 4, [5]), client.optim_step(model, 5)]

    assert 400 == refused.status_code
    assert "loss:sum" in client.result(first)["metrics"]
    assert "-1" in client.result(step)["error"]
    assert "error" not in client.result(good[1])
    assert 1 == sum(entry[0] == "optim_step" for entry in served.engine.log)


def test_a_chunk_that_is_refused_after_the_others_came_fails_them_not(client):
    """Chunks come in any order; the first one last."""
    model = client.model()
    later = client.forward_backward(model, 2, [5])
    client.refused("optim_step", {"model_id": model, "seq_id": 1, "adam_params": {"beta1": 7}})

    assert "loss:sum" in client.result(later)["metrics"]


def test_another_s_refusal_does_not_count(serve):
    """Other users cannot use up the numbers of a run."""
    from tinkex.server.auth import Keys

    served = serve(keys=lambda home: Keys.of_users(["one", "two"], b"secret"))
    one, two = served.client_with("one"), served.client_with("two")
    model = one.model()
    two.refused("save_weights", save(model, 1, "../up"))
    later = one.optim_step(model, 2)
    one.post("save_weights", save(model, 1, "up"))

    assert "metrics" in one.result(later)
    assert "path" in one.result(f"{model}:1")


def test_a_refused_number_is_refused_after_a_restart_too(tmp_path):
    """The journal contains the refused operation."""
    server = ServerProcess(tmp_path / "home")
    server.start()
    try:
        client = server.client
        model = client.model()
        client.refused("save_weights", save(model, 1, "../up"))
        before = client.result(client.forward_backward(model, 2, [5]))
        server.kill()
        server.start()
        after = client.result(f"{model}:2")
        step = client.result(client.optim_step(model, 3))
    finally:
        server.close()

    assert before == after
    assert "metrics" in step


def test_a_body_is_unpacked_to_the_limit_and_no_further():
    """A few kilobytes can decompress to 64 GiB, which would take minutes and all memory."""
    with pytest.raises(Refusal, match="larger than 1000 bytes"):
        unpack("zstd", zstd_bomb(65536), 1000)
