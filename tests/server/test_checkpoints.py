"""Runs, checkpoints, sessions and archives through the API, and how disk space is freed."""

from __future__ import annotations

import hashlib
import io
import tarfile
import time

import requests


def files(home):
    return {path for path in (home / "checkpoints").rglob("*") if path.is_file()}


def saved(client, *names, **fields):
    """A model with checkpoints of these names."""
    model = client.model()
    for seq, name in enumerate(names, start=1):
        client.result(client.save(model, seq, name, **fields))
    return model


def test_runs_are_listed_with_their_last_checkpoints(client):
    """Last used first, in pages."""
    models = [saved(client, "a", "b") for _ in range(3)]
    page = client.get("training_runs?limit=2&offset=1")
    run = client.get(f"training_runs/{models[0]}")

    assert 2 == len(page["training_runs"])
    assert {"offset": 1, "limit": 2, "total_count": 3} == page["cursor"]
    assert "weights/b" == run["last_checkpoint"]["checkpoint_id"]
    assert 4 == run["lora_rank"]
    assert "tiny" == run["base_model"]
    assert run["last_request_time"].endswith("Z")


def test_ids_with_colons_and_slashes_work_raw_and_encoded(client):
    """Clients differ in what they percent-encode."""
    model = saved(client, "x.y-z")
    quoted = model.replace(":", "%3A")

    raw, encoded = (client.get(f"training_runs/{name}") for name in (model, quoted))
    for run in (raw, encoded):
        run.pop("last_request_time")  # may be written between the two
    assert raw == encoded
    path = f"training_runs/{quoted}/checkpoints/weights%2Fx.y-z"
    assert {} == client.send("PUT", f"{path}/ttl", {"ttl_seconds": 3600}).json()
    [checkpoint] = client.get(f"training_runs/{model}/checkpoints")["checkpoints"]
    assert checkpoint["expires_at"] > checkpoint["time"]


def test_a_name_is_used_once_unless_it_may_be_overwritten(client, tmp_path):
    """Overwriting leaves one set of files."""
    model = saved(client, "state")
    again = client.result(client.save(model, 2, "state"))
    over = client.result(client.save(model, 3, "state", overwrite=True))
    [checkpoint] = client.get("checkpoints")["checkpoints"]

    assert "user" == again["category"]
    assert "exists already" in again["error"]
    assert f"tinker://{model}/weights/state" == over["path"]
    assert 2 == len(files(tmp_path / "home"))
    assert checkpoint["size_bytes"] == sum(p.stat().st_size for p in files(tmp_path / "home"))


def test_training_and_sampler_weights_of_one_name_are_two_checkpoints(client):
    model = saved(client, "v1")
    client.result(client.save_for_sampler(model, 2, "v1"))
    listed = client.get("checkpoints")["checkpoints"]

    assert {"training", "sampler"} == {entry["checkpoint_type"] for entry in listed}


def test_deleting_frees_the_disk(client, tmp_path):
    model = saved(client, "a", "b")
    before = files(tmp_path / "home")
    client.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")

    assert 4 == len(before)
    assert 2 == len(files(tmp_path / "home"))
    assert ["weights/b"] == [c["checkpoint_id"] for c in client.get("checkpoints")["checkpoints"]]


def test_a_checkpoint_expires(client, tmp_path):
    """It is removed from lists, cannot be used, and its files are deleted."""
    model = saved(client, "short", ttl_seconds=1)
    path = f"tinker://{model}/weights/short"
    known = client.get("checkpoints")["checkpoints"]
    deadline = time.monotonic() + 10
    while files(tmp_path / "home") and time.monotonic() < deadline:
        time.sleep(0.05)

    assert [path] == [entry["tinker_path"] for entry in known]
    assert set() == files(tmp_path / "home")
    assert [] == client.get("checkpoints")["checkpoints"]
    assert 404 == client.refused("weights_info", {"tinker_path": path})[0]


def test_a_ttl_can_be_taken_away(client):
    model = saved(client, "kept", ttl_seconds=3600)
    checkpoint = f"training_runs/{model}/checkpoints/weights/kept"
    client.send("PUT", f"{checkpoint}/ttl", {"ttl_seconds": None})
    [entry] = client.get("checkpoints")["checkpoints"]

    assert entry.get("expires_at") is None


def test_sampler_weights_are_frozen(client):
    """Later training does not change what was saved."""
    session = client.session()
    model = client.model(session)
    client.result(client.forward_backward(model, 1, [9]))
    promise = client.post(
        "save_weights_for_sampler", {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0}
    )
    sampler = client.result(promise)["sampling_session_id"]
    before = client.result(client.sample(sampler, 0, prompt_logprobs=True))
    client.result(client.optim_step(model, 3, 100.0))
    after = client.result(client.sample(sampler, 1, prompt_logprobs=True))

    assert before["prompt_logprobs"] == after["prompt_logprobs"]
    assert sampler == client.get(f"samplers/{sampler}")["sampler_id"]
    assert "tiny" == client.get(f"samplers/{sampler}")["base_model"]


def test_a_session_tells_its_runs_and_samplers(client):
    session = client.session(user_metadata={"team": "red"}, display_name="trial")
    model = client.model(session)
    sampler = client.sampler(session, 4, base_model="tiny")
    answer = client.get(f"sessions/{session}")

    assert [model] == answer["training_run_ids"]
    assert [sampler] == answer["sampler_ids"]
    assert {"team": "red"} == answer["user_metadata"]
    assert "trial" == answer["display_name"]


def test_sessions_are_searched(client):
    """By their metadata, newest first, in pages."""
    for i in range(5):
        client.session(user_metadata={"kind": "odd" if i % 2 else "even"}, display_name=f"n{i}")
    first = client.post("sessions/search", {"user_metadata": {"kind": "even"}, "limit": 2})
    second = client.post(
        "sessions/search",
        {"user_metadata": {"kind": "even"}, "limit": 2, "cursor": first["next_cursor"]},
    )
    names = [entry["display_name"] for page in (first, second) for entry in page["sessions"]]

    assert ["n4", "n2", "n0"] == names
    assert {"type": "active"} == first["sessions"][0]["status"]
    assert second.get("next_cursor") is None


def test_a_finished_session_frees_what_was_live(served, tmp_path):
    """Models and unnamed samplers are removed; checkpoints stay. Heartbeats get 410."""
    client = served.client
    session = client.session()
    model = client.model(session)
    client.result(client.save(model, 1, "kept"))
    client.result(
        client.post(
            "save_weights_for_sampler",
            {"model_id": model, "seq_id": 2, "sampling_session_seq_id": 0},
        )
    )
    pending = client.optim_step(model, 3)
    client.post(f"sessions/{session}/finish", {"reason": {"type": "success"}, "detail": None})
    result = client.result(pending)
    heartbeat = client.refused("session_heartbeat", {"session_id": session})
    deadline = time.monotonic() + 5
    while served.engine.models and time.monotonic() < deadline:
        time.sleep(0.01)

    assert "metrics" in result  # what was accepted is done
    assert 410 == heartbeat[0]
    assert {} == served.engine.models
    assert not list((tmp_path / "home" / "servers").rglob("samplers/*"))
    assert 1 == len(client.get("checkpoints")["checkpoints"])
    assert 410 == client.refused("create_model", {
        "session_id": session, "model_seq_id": 9, "base_model": "tiny"
    })[0]  # fmt: skip


def test_a_session_that_falls_silent_ends(serve):
    """Dead clients do not fill the memory; sessions with work or heartbeats continue."""
    served = serve(limits={"session_seconds": 0.5})
    client = served.client
    quiet, beating = client.model(), client.session()
    deadline = time.monotonic() + 10
    while quiet in served.engine.models and time.monotonic() < deadline:
        client.post("session_heartbeat", {"session_id": beating})
        time.sleep(0.05)

    assert {} == served.engine.models
    assert {} == client.post("session_heartbeat", {"session_id": beating})


def archive_of(client, model, name="weights/a"):
    answer = client.send(
        "GET", f"training_runs/{model}/checkpoints/{name}/archive", allow_redirects=False
    )
    assert 302 == answer.status_code
    assert answer.json()["url"] == answer.headers["Location"]
    return answer.headers["Location"]


def test_an_archive_is_a_tar_of_the_checkpoint(client):
    """The URL needs no key; size and hash are in the headers."""
    model = saved(client, "a")
    answer = requests.get(archive_of(client, model), timeout=10)
    again = requests.get(archive_of(client, model), timeout=10)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        names = tar.getnames()
        tar.extractfile("adapter_model.safetensors").read()

    assert ["adapter_config.json", "adapter_model.safetensors"] == names
    assert len(answer.content) == int(answer.headers["Content-Length"])
    assert f'"{hashlib.sha256(answer.content).hexdigest()}"' == answer.headers["ETag"]
    assert answer.content == again.content


def test_an_archive_comes_in_ranges(client):
    """An interrupted download can be resumed."""
    model = saved(client, "a")
    url = archive_of(client, model)
    whole = requests.get(url, timeout=10)
    pieces = [
        requests.get(url, headers={"Range": r, "If-Range": whole.headers["ETag"]}, timeout=10)
        for r in ("bytes=0-699", "bytes=700-1500", "bytes=1501-")
    ]
    last = requests.get(url, headers={"Range": "bytes=-10"}, timeout=10)
    other = requests.get(url, headers={"Range": "bytes=5-", "If-Range": '"x"'}, timeout=10)
    beyond = requests.get(url, headers={"Range": "bytes=99999999-"}, timeout=10)

    assert whole.content == b"".join(piece.content for piece in pieces)
    assert [206, 206, 206] == [piece.status_code for piece in pieces]
    assert f"bytes 700-1500/{len(whole.content)}" == pieces[1].headers["Content-Range"]
    assert whole.content[-10:] == last.content
    assert (200, whole.content) == (other.status_code, other.content)
    assert 416 == beyond.status_code


def test_a_made_up_download_link_opens_nothing(client):
    assert 404 == client.send("GET", "archives/nosuchtoken/x.tar").status_code


def test_a_checkpoint_can_be_copied(client):
    """Into a run of the caller; a repeat does not copy again."""
    model = saved(client, "a")
    session = client.session()
    body = {
        "source_path": f"tinker://{model}/weights/a",
        "session_id": session,
        "model_seq_id": 2,
    }
    copies = [client.post("copy_weights", body)["tinker_path"] for _ in range(2)]
    client.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")
    info = client.post("weights_info", {"tinker_path": copies[0]})

    assert [f"tinker://{session}:train:2/weights/a"] * 2 == copies
    assert {"base_model": "tiny", "is_lora": True, "lora_rank": 4} == {
        key: info[key] for key in ("base_model", "is_lora", "lora_rank")
    }


def test_a_copy_outside_any_session_is_made_once_for_each_request(client):
    """A resend has the same idempotency key."""
    model = saved(client, "a")
    body = {"source_path": f"tinker://{model}/weights/a", "destination_project_id": "p"}
    paths = [
        client.post("copy_weights", body, headers={"X-Idempotency-Key": key})["tinker_path"]
        for key in ("one", "one", "two")
    ]

    assert paths[0] == paths[1] != paths[2]


def test_the_base_model_rank_and_optimizer_come_with_a_checkpoint(client):
    """Both forms of load_weights, with and without the optimizer's state."""
    model = client.model()
    client.result(client.forward_backward(model, 1, [3]))
    client.result(client.optim_step(model, 2))
    path = client.result(client.save(model, 3, "s"))["path"]
    session = client.session()
    steps = []
    for number, optimizer in enumerate((True, False)):
        body = {"session_id": session, "model_seq_id": number, "path": path}
        loaded = client.result(client.post("load_weights", {**body, "optimizer": optimizer}))
        steps.append(client.result(client.optim_step(loaded["model_id"], 1)))
    client.result(client.optim_step(model, 4))  # momentum moves it on
    client.result(client.post(
        "load_weights", {"model_id": model, "seq_id": 5, "path": path, "optimizer": True}
    ))  # fmt: skip
    back = client.result(client.optim_step(model, 6))

    assert steps[0] != steps[1]
    assert steps[0] == back
    assert 4 == client.post("get_info", {"model_id": f"{session}:train:0"})["lora_rank"]


def test_an_archive_that_the_client_has_is_not_sent_again(client):
    url = archive_of(client, saved(client, "a"))
    etag = requests.get(url, timeout=10).headers["ETag"]
    same = requests.get(url, headers={"If-None-Match": etag}, timeout=10)
    other = requests.get(url, headers={"If-None-Match": '"x"'}, timeout=10)

    assert (304, b"") == (same.status_code, same.content)
    assert 200 == other.status_code


def test_links_that_have_expired_open_nothing_and_do_not_pile_up(served, monkeypatch):
    client = served.client
    model = saved(client, "a")
    monkeypatch.setattr("tinkex.server.routes.archives.TICKET_SECONDS", -1)
    expired = [archive_of(client, model) for _ in range(3)]
    monkeypatch.undo()
    answers = [requests.get(url, timeout=10).status_code for url in expired]
    fresh = archive_of(client, model)

    assert [404] * 3 == answers
    assert 200 == requests.get(fresh, timeout=10).status_code
    assert 1 == len(served.server.app.state.site.tickets)


def test_a_download_whose_checkpoint_is_deleted_names_it(client):
    """Between the link and the download."""
    model = saved(client, "a")
    url = archive_of(client, model)
    client.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")
    answer = requests.get(url, timeout=10)

    assert 404 == answer.status_code
    assert f"tinker://{model}/weights/a" in answer.json()["error"]


def test_a_checkpoint_is_loaded_as_the_base_model_that_it_is_of(client):
    """Another name is refused before a model is made."""
    session = client.session()
    path = f"tinker://{saved(client, 'a')}/weights/a"
    body = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}
    status, sentence = client.refused("load_weights", {**body, "base_model": "other"})

    assert 400 == status
    assert "the checkpoint is of base model 'tiny', not 'other'; omit base_model" in sentence
    assert client.result(client.post("load_weights", {**body, "base_model": "tiny"}))["model_id"]


def test_sessions_that_fell_silent_are_told_from_those_that_ended(serve):
    served = serve(limits={"session_seconds": 0.05, "reap_seconds": 0.02})
    session = served.client.session()
    deadline = time.monotonic() + 10
    while True:
        found = served.client.post("sessions/search", {"session_id": session})["sessions"]
        if found[0]["status"]["type"] != "active":
            break
        assert time.monotonic() < deadline
        time.sleep(0.02)

    assert ("failed", "no heartbeat") == tuple(found[0]["status"][k] for k in ("type", "message"))
