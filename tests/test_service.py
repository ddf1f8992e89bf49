"""ServiceClient: the way in, and what makes the other clients."""

from __future__ import annotations

import asyncio
import base64
import logging
import threading

import pytest

import tinkex
from tests.support.fake_server import (
    URL,
    FakeServer,
    answer,
    blocked,
    datum,
    plugged_in,
    refused,
    status,
)
from tinkex import Patience, SamplingLimits, config, errors, types
from tinkex.runtime import embedded, rate_limit

PATH = "tinker://run:train:0/weights/best"
ADAM = types.AdamParams()


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def service(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient() as made:
        yield made


def test_the_embedded_engine_is_given_the_absolute_path_of_a_model(
    service, server, monkeypatch, tmp_path
):
    """Checkpoints record it: from another folder a relative one would be another model."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(service._session, "engine", object())
        service.create_lora_training_client("model")
        service.create_lora_training_client("tiny")
    service.create_lora_training_client("model")  # on another machine, this folder says nothing

    named = [body["base_model"] for body in server.bodies("create_model")]
    assert [str(tmp_path / "model"), "tiny", "model"] == named


def test_it_opens_a_session_and_ends_it(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient(user_metadata={"run": "a"}, project_id="p") as service:
        assert ("s0", URL) == (service.session_id, service.base_url)
        assert f"<ServiceClient of {URL} [session s0, open]>" == repr(service)
    body = server.bodies("create_session")[0]

    assert ({"run": "a"}, "p") == (body["user_metadata"], body["project_id"])
    assert {"type": "success"} == server.bodies("sessions/s0/finish")[0]["reason"]
    assert repr(service).endswith("closed]>")


@pytest.mark.parametrize(
    "problem, reason", [(ValueError, "errored"), (KeyboardInterrupt, "interrupted")]
)
def test_the_server_is_told_how_it_ended(server, monkeypatch, problem, reason):
    plugged_in(monkeypatch, server)
    with pytest.raises(problem), tinkex.ServiceClient():
        raise problem

    assert {"type": reason} == server.bodies("sessions/s0/finish")[0]["reason"]


def test_a_training_client_of_a_new_model(service, server):
    client = service.create_lora_training_client("tiny", 8, 3, train_mlp=False, train_unembed=True)

    assert "s0:train:0" == client.model_id
    lora = server.bodies("create_model")[0]["lora_config"]
    assert (8, 3, False, True, True) == (
        lora["rank"],
        lora["seed"],
        lora["train_mlp"],
        lora["train_attn"],
        lora["train_unembed"],
    )
    assert client.optim_step(ADAM).result(10)


def test_its_future_twin(service, server):
    client = service.create_lora_training_client_async("tiny", rank=8).result(10)

    assert 8 == server.bodies("create_model")[0]["lora_config"]["rank"]
    assert client.optim_step(ADAM).result(10)


def test_many_are_made_at_once_each_under_a_number_of_its_own(service):
    """One cold model must not hold up the others."""
    futures = [service.create_lora_training_client_async("tiny") for _ in range(12)]

    assert {f"s0:train:{i}" for i in range(12)} == {f.result(10).model_id for f in futures}


def test_a_slow_creation_has_no_limit_of_five_seconds(service, server):
    """Theirs gives up while the model is still being made."""
    entered, release = threading.Event(), threading.Event()
    server.script("retrieve_future", blocked(entered, release))
    future = service.create_lora_training_client_async("tiny")
    entered.wait(10)

    assert not future.done()
    assert "ok" == service.health().status
    release.set()
    assert future.result(10)


def test_a_base_model_that_cannot_be_loaded_is_told_with_the_reason(service, server):
    server.script(
        "retrieve_future", answer({"error": "there is no model 'typo'", "category": "user"})
    )

    with pytest.raises(errors.RequestFailedError, match="there is no model 'typo'"):
        service.create_lora_training_client("typo")


@pytest.mark.parametrize("suffix", ["", "_async"])
@pytest.mark.parametrize("optimizer", [False, True])
def test_a_training_client_of_a_checkpoint(service, server, suffix, optimizer):
    with_optimizer = "_with_optimizer" if optimizer else ""
    create = getattr(service, f"create_training_client_from_state{with_optimizer}{suffix}")
    client = create(PATH, user_metadata={"a": 1})
    client = client.result(10) if suffix else client

    assert client.optim_step(ADAM).result(10)
    [body] = server.bodies("load_weights")
    assert (PATH, optimizer, {"a": 1}) == (body["path"], body["optimizer"], body["user_metadata"])


def test_a_checkpoint_can_be_loaded_as_another_base_model_with_another_key(service, server):
    """Arguments in the order of the official SDK."""
    service.create_training_client_from_state(PATH, "tiny:64", {"a": 1}, "tml-theirs")

    [body] = server.bodies("load_weights")
    assert "tiny:64" == body["base_model"]
    assert ({"a": 1}, "tml-theirs") == (body["user_metadata"], body["weights_access_token"])
    with pytest.raises(TypeError, match=r"base_model .* \{'a': 1\}; metadata .* user_metadata="):
        service.create_training_client_from_state(PATH, {"a": 1})


def test_positional_arguments_are_the_server_or_as_in_the_official_sdk_metadata(
    server, monkeypatch
):
    plugged_in(monkeypatch, server)
    options = {"base_url": URL, "api_key": "tml-key"}
    tinkex.ServiceClient(URL, "tml-key").close()
    tinkex.ServiceClient({"run": "7"}, "project-1", display_name="mine", **options).close()

    first, second = server.bodies("create_session")
    assert not first.get("user_metadata")
    assert ({"run": "7"}, "project-1") == (second["user_metadata"], second["project_id"])
    assert "mine" == second["display_name"]
    for wrong in ((URL, "k", {}), ({}, "p", "k")):
        with pytest.raises(TypeError, match="takes 2 arguments without names"):
            tinkex.ServiceClient(*wrong)
    with pytest.raises(TypeError, match="got base_url twice"):
        tinkex.ServiceClient(URL, base_url=URL)
    with pytest.raises(TypeError, match="only one"):
        tinkex.ServiceClient(default_headers={}, default_headers_overrides={}, **options)


def test_timeout_is_how_long_an_answer_may_take(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient(URL, "tml-key", timeout=12.5) as service:
        assert 12.5 == service._session.config.patience.request
    with pytest.raises(ValueError, match="-1"):
        tinkex.ServiceClient(URL, "tml-key", timeout=-1)


def test_another_optimizer_is_asked_for_when_the_model_is_created(service, server):
    """The default one is not mentioned, for older servers refuse what they do not know."""
    service.create_lora_training_client("tiny", optimizer=types.AdamOptimizerConfig())
    dimuon = service.create_lora_training_client("tiny", optimizer=types.DimuonOptimizerConfig())
    dimuon.optim_step(types.DimuonParams(learning_rate=0.1)).result(10)

    first, second = server.bodies("create_model")
    assert "optimizer_config" not in first
    assert {"type": "dimuon", "version": 1} == second["optimizer_config"]
    [step] = server.bodies("optim_step")
    assert "adam_params" not in step
    assert {"type": "dimuon", "learning_rate": 0.1} == {
        key: step["optimizer_params"][key] for key in ("type", "learning_rate")
    }
    with pytest.raises(TypeError, match=r"optimizer must be types\.AdamOptimizerConfig"):
        service.create_lora_training_client("tiny", optimizer="adamw")


def test_every_client_and_lookup_can_be_waited_for_like_a_future(service):
    """Scripts for the official SDK, where these are futures, call result() or await them."""

    async def awaited():
        capabilities = await service.get_server_capabilities_async()
        training = await service.create_lora_training_client_async("tiny")
        forward = await training.forward_backward_async([datum()], "cross_entropy")
        step = await training.optim_step_async(ADAM)
        await forward
        sampler = await training.save_weights_and_get_sampling_client_async()
        sample = await sampler.sample_async([1, 2], 1, types.SamplingParams(max_tokens=1))
        assert await training is training
        return capabilities, await step.coroutine(), await training.get_info_async(), sample

    capabilities, step, info, sample = asyncio.run(awaited())
    training = service.create_lora_training_client("tiny").result()

    assert capabilities.result(timeout=1) is capabilities
    assert step is not None
    assert info.model_id
    assert sample.sequences
    assert training.result_async is not None
    assert service.close("success").result() is None


def test_the_future_of_a_sampling_client_is_used_as_the_client(service):
    training = service.create_lora_training_client("tiny")
    future = training.save_weights_and_get_sampling_client(name="final")

    assert future.sample([1, 2]).result(10).sequences
    assert future.sampling_session_id == future.result(10).sampling_session_id
    assert not hasattr(future, "_secret")
    with pytest.raises(TypeError, match="another name"):
        training.save_weights_and_get_sampling_client("a", path="b")
    with pytest.raises(ValueError, match="'live'"):
        training.save_weights_and_get_sampling_client(kind="live")


def test_a_sampler_handle_holds_no_key_and_makes_a_client_of_the_same_sampler(server, monkeypatch):
    plugged_in(monkeypatch, server)
    service = tinkex.ServiceClient(URL, "tml-secret")
    sampler = service.create_sampling_client(base_model="tiny", record_stability_info=True)
    handle = sampler.get_sampler_handle()

    with tinkex.SamplingClient.from_sampler_handle(handle, api_key="tml-secret") as copy:
        assert sampler.sampling_session_id == copy.sampling_session_id
        assert copy.sample([1, 2]).result(10).sequences
    assert "tml-secret" not in base64.urlsafe_b64decode(handle).decode()
    for wrong in ("x", "e30=", base64.urlsafe_b64encode(b'{"base_url": "http://x"}').decode(), 5):
        with pytest.raises(ValueError, match="get_sampler_handle"):
            tinkex.SamplingClient.from_sampler_handle(wrong)


def test_where_the_console_is(service):
    """Another server than the official one has no console; there it is the record."""
    training = service.create_lora_training_client("tiny")

    assert f"{URL}/api/v1/sessions/{service.session_id}" == service.get_console_url()
    assert training.get_console_url().endswith(f"/training_runs/{training.model_id}")
    official = tinkex.Config(base_url=config.OFFICIAL_URL).console_url("sessions", "s")
    assert "https://tinker.thinkingmachines.ai/sessions/s" == official


def test_a_sampling_client_of_a_path_or_a_base_model(service, server):
    path = "tinker://run:train:0/sampler_weights/x"
    clients = [
        service.create_sampling_client(path),
        service.create_sampling_client(base_model="tiny"),
        service.create_sampling_client_async(path).result(10),
    ]

    assert [[2, 1]] * 3 == [c.sample([1, 2]).result(10).sequences[0].tokens for c in clients]
    numbers = [b["sampling_session_seq_id"] for b in server.bodies("create_sampling_session")]
    assert [0, 1, 2] == numbers


def test_what_the_server_offers(service):
    assert ["tiny"] == service.get_server_capabilities().model_names
    assert "ok" == service.health().status
    assert service.get_telemetry() is None


def test_statement_30_telemetry_lives_until_the_service_ends(server, monkeypatch):
    """Closing one client must not silence the others. (statement 30)"""
    plugged_in(monkeypatch, server)
    monkeypatch.setenv("TINKER_TELEMETRY", "1")
    with tinkex.ServiceClient() as service:
        first = service.create_lora_training_client("tiny")
        second = service.create_lora_training_client("tiny")
        first.close()

        assert second.get_telemetry() is service.get_telemetry() is not None
        assert service.get_telemetry().log("STILL_HERE")
    sent = [e["event"] for b in server.bodies("telemetry") for e in b["events"]]
    assert ["SESSION_START", "STILL_HERE", "SESSION_END"] == sent


def test_its_clients_end_with_it(server, monkeypatch):
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient() as service:
        training = service.create_lora_training_client("tiny")
        sampling = service.create_sampling_client(base_model="tiny")
        training.optim_step(ADAM).result(10)

    for call in (
        lambda: training.optim_step(ADAM),
        lambda: sampling.sample([1]),
        lambda: service.health(),
        lambda: service.create_lora_training_client("tiny"),
        lambda: service.create_sampling_client(base_model="tiny"),
        lambda: service.create_lora_training_client_async("tiny"),
    ):
        with pytest.raises(errors.ClientClosedError, match=r"closed\. Make a new ServiceClient"):
            call()


def test_it_ends_all_of_its_threads(server, monkeypatch):
    plugged_in(monkeypatch, server)
    before = set(threading.enumerate())
    with tinkex.ServiceClient(patience=Patience(heartbeat=0.01)) as service:
        training = service.create_lora_training_client("tiny")
        sampling = service.create_sampling_client(base_model="tiny")
        training.optim_step(ADAM).result(10)
        sampling.sample([1]).result(10)
        service.create_lora_training_client_async("tiny").result(10)
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(5)

    assert [] == [thread.name for thread in left if thread.is_alive()]


def test_a_server_that_is_not_there_is_told_with_the_url(monkeypatch, server):
    plugged_in(monkeypatch, server)
    server.always("client/config", status(401, {"detail": "no such key"}))

    with pytest.raises(
        errors.AuthenticationError, match=f"{URL}/api/v1/client/config answered 401"
    ):
        tinkex.ServiceClient()


def test_first_contact_is_as_patient_as_it_is_told_to_be(monkeypatch, server):
    plugged_in(monkeypatch, server)
    server.always("client/config", refused())

    with pytest.raises(
        errors.APIConnectionError, match="connection refused; is the server running"
    ):
        tinkex.ServiceClient(patience=Patience(first_contact=0.05))


def test_arguments_win_over_the_environment(monkeypatch):
    server = FakeServer()
    plugged_in(monkeypatch, server)
    monkeypatch.setenv("TINKER_BASE_URL", "http://nowhere.test")
    monkeypatch.setenv("TINKER_API_KEY", "from-environment")
    with tinkex.ServiceClient(URL, "given") as service:
        service.health()

    assert {"given"} == {seen.headers["X-API-Key"] for seen in server.requests}


def test_with_nothing_named_the_embedded_engine_is_meant(monkeypatch, server, caplog):
    plugged_in(monkeypatch, server)
    monkeypatch.delenv("TINKER_BASE_URL")
    started = []

    class Engine:
        base_url, api_key, is_running = URL, "engine-key", True

        def obituary(self):
            return None

        def close(self, timeout=5.0):
            started.append("closed")

    monkeypatch.setattr(embedded, "_shared", None)
    monkeypatch.setattr(embedded.EmbeddedEngine, "start", lambda: started.append("s") or Engine())
    with tinkex.ServiceClient() as service:
        assert URL == service.base_url
    assert ["s", "closed"] == started
    assert {"engine-key"} == {seen.headers["X-API-Key"] for seen in server.requests}


def test_limits_of_sampling_are_the_caller_s(monkeypatch, server):
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient(sampling=SamplingLimits(requests_in_dispatch=7)) as service:
        rate_limit._paces.clear()
        assert 7 == service.create_sampling_client(base_model="m").limit


def test_no_warning_is_logged_when_nothing_is_wrong(server, monkeypatch, caplog, capsys):
    caplog.set_level(logging.WARNING)
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient() as service:
        training = service.create_lora_training_client("tiny")
        training.forward_backward([datum()], "cross_entropy")
        training.optim_step(ADAM).result(10)

    assert [] == caplog.records
    assert ("", "") == tuple(capsys.readouterr())
