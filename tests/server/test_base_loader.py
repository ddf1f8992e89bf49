"""A base model that is slow to load keeps nothing else waiting."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.fake_engine import FakeEngine
from tinkex.server.base_loader import AT_ONCE


class SlowEngine(FakeEngine):
    """Reads models whose name begins with "slow" as long as `hold` is cleared."""

    def __init__(self):
        super().__init__()
        self.hold = threading.Event()
        self.reads = []
        self.stopped = threading.Event()

    def read_base(self, base_model, on_progress):
        self.reads.append(base_model)
        if base_model.startswith("hung"):
            threading.Event().wait()
        while base_model.startswith("slow") and not self.hold.wait(0.005):
            try:
                on_progress(250, 1000)
            except Exception:
                self.stopped.set()
                raise
        return super().read_base(base_model, on_progress)


@pytest.fixture
def engine():
    engine = SlowEngine()
    yield engine
    engine.hold.set()


@pytest.fixture
def client(serve, engine):
    return serve(engine=engine).client


def create(client, base_model, session=None):
    session = session or client.session()
    body = {"session_id": session, "model_seq_id": 0, "base_model": base_model}
    return client.post("create_model", {**body, "lora_config": {"rank": 4, "seed": 1}})


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def waiting(client, promise):
    """The answer of a poll for a result that is not there."""
    answer = client.send("POST", "retrieve_future", {"request_id": promise["request_id"]})
    assert 408 == answer.status_code
    return answer.json()


def test_other_models_train_and_sample_while_one_is_loaded(client, engine):
    """It used to hold the compute thread: everyone waited over 30 s."""
    slow = create(client, "slow")
    model = client.model()
    step = client.result(client.optim_step(model, 1))
    sample = client.result(client.sample(client.sampler(), 0))
    place = waiting(client, slow)
    engine.hold.set()

    assert "metrics" in step
    assert sample["sequences"]
    assert "model_id" in client.result(slow)
    assert "loading base model 'slow': 25% of 0 MB read" in place["queue_state_reason"]


def test_what_follows_a_creation_waits_with_it_and_runs_in_order(client, engine):
    promise = create(client, "slow")
    model = promise["model_id"]
    steps = [client.optim_step(model, seq) for seq in (1, 2)]
    place = waiting(client, steps[1])
    engine.hold.set()

    assert [1, 2] == [call[2] for call in _results(client, engine, steps)]
    assert 2 == place["queue_position"]
    assert "loading base model" in place["queue_state_reason"]


def _results(client, engine, promises):
    for promise in promises:
        assert "metrics" in client.result(promise)
    return [call for call in engine.log if call[0] == "optim_step"]


def test_all_who_need_a_model_wait_for_one_reading(client, engine):
    session = client.session()
    first = create(client, "slow", session)
    second = create(client, "slow")
    sampler = client.sampler(session, 0, base_model="slow")
    sample = client.sample(sampler, 0)
    place = waiting(client, sample)
    engine.hold.set()

    assert all("model_id" in client.result(promise) for promise in (first, second))
    assert client.result(sample)["sequences"]
    assert ["slow"] == engine.reads
    assert "loading base model 'slow'" in place["queue_state_reason"]


def test_a_creation_that_waits_can_be_cancelled_and_reading_ends(client, engine):
    promise = create(client, "slow")
    until(lambda: engine.reads)
    client.post("cancel_future", {"request_id": promise["request_id"]})
    failed = client.result(promise)

    assert "cancelled" in failed["error"]
    assert engine.stopped.wait(10)
    assert "model_id" in client.result(create(client, "tiny"))


def test_a_sample_that_waits_can_be_cancelled_and_others_still_get_the_model(client, engine):
    sampler = client.sampler(base_model="slow")
    gone, stays = client.sample(sampler, 0), client.sample(sampler, 1)
    until(lambda: engine.reads)
    client.post("cancel_future", {"request_id": gone["request_id"]})
    failed = client.result(gone)
    engine.hold.set()

    assert "cancelled" in failed["error"]
    assert client.result(stays)["sequences"]
    assert ["slow"] == engine.reads


def test_after_a_cancelled_reading_the_next_one_starts_from_the_beginning(client, engine):
    promise = create(client, "slow")
    until(lambda: engine.reads)
    client.post("cancel_future", {"request_id": promise["request_id"]})
    client.result(promise)
    again = create(client, "slow")
    until(lambda: len(engine.reads) == 2)
    engine.hold.set()

    assert "model_id" in client.result(again)


def test_a_reading_that_hangs_ends_with_a_sentence_and_its_place_is_free(serve, engine):
    """A file system that does not answer cannot be interrupted; its thread is left alone."""
    client = serve(engine=engine, limits={"load_seconds": 0.2}).client
    hung = [create(client, f"hung-{i}") for i in range(AT_ONCE + 1)]
    failures = [client.result(promise)["error"] for promise in hung]

    assert all("could not be read within" in failure for failure in failures)
    assert "model_id" in client.result(create(client, "tiny"))


def test_a_failure_is_everyones_who_waited_and_the_next_try_reads_again(client, engine):
    first, second = create(client, "missing"), create(client, "missing")

    assert "it is not there" in client.result(first)["error"]
    assert "it is not there" in client.result(second)["error"]
    assert "it is not there" in client.result(create(client, "missing"))["error"]


def test_models_given_at_the_start_are_loaded_beside_the_first_requests(serve, engine):
    client = serve(engine=engine, base_models=["slow-start"]).client
    model = client.model()
    before = client.get("get_server_capabilities")["supported_models"]
    engine.hold.set()
    until(lambda: client.get("get_server_capabilities")["supported_models"] != before)
    after = {
        each["model_name"]: each
        for each in client.get("get_server_capabilities")["supported_models"]
    }

    assert model
    assert 4096 == after["slow-start"]["max_context_length"]


class SlowTokenizer(SlowEngine):
    """Reads the tokenizer of a request with stop strings as long as `hold` is cleared."""

    def unread_tokenizer(self, base_model, request):
        if not isinstance(request.sampling_params.stop, str) or "tokenizer" in self.reads:
            return None
        return self.read

    def read(self):
        self.stopped.set()
        assert self.hold.wait(20)
        self.reads.append("tokenizer")
        if self.fails:
            raise ValueError("tokenizer.json is damaged.")

    fails = False


@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_a_tokenizer_that_is_slow_to_read_holds_up_those_who_need_it_alone(serve, fails):
    """They wait for one reading, and all get its failure."""
    engine = SlowTokenizer()
    engine.fails = fails
    client = serve(engine=engine).client
    sampler = client.sampler()
    with_stops = [client.sample(sampler, i, params={"stop": "x"}) for i in range(3)]
    assert engine.stopped.wait(10)
    other = client.result(client.sample(sampler, 3))
    place = waiting(client, with_stops[0])
    engine.hold.set()
    outcomes = [client.result(promise) for promise in with_stops]

    assert other["sequences"]
    assert "reading the tokenizer of 'tiny'" == place["queue_state_reason"]
    assert ["tokenizer"] == [name for name in engine.reads if name == "tokenizer"]
    if fails:
        assert ["Sample: tokenizer.json is damaged."] * 3 == [
            outcome["error"] for outcome in outcomes
        ]
    else:
        assert all(outcome["sequences"] for outcome in outcomes)


def test_of_more_models_than_are_read_at_once_the_others_wait_and_say_why(client, engine):
    """One that nothing waits for any more is not read at all."""
    first = [create(client, f"slow{i}") for i in range(AT_ONCE)]
    until(lambda: len(engine.reads) == AT_ONCE)
    gone, stays = create(client, "slow-gone"), create(client, "slow-stays")
    until(lambda: "until others are loaded" in waiting(client, stays)["queue_state_reason"])
    client.post("cancel_future", {"request_id": gone["request_id"]})
    engine.hold.set()

    assert all("model_id" in client.result(promise) for promise in [*first, stays])
    assert "slow-gone" not in engine.reads
