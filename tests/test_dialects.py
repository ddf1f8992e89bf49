"""The same script runs on every server, whatever its dialect, and comes to the same numbers."""

from __future__ import annotations

import time

import pytest

import tinkex
from tests.support.odd_servers import KNOWN, MANAGEMENT, NEWER, SINGLE, OddServer, Quirks
from tinkex import errors, types

#: A server that holds polls for five minutes has a client that gives them up after 45 s; here both
#: are shorter.
HELD = "polls held longer than the client waits"
PATIENCE = {HELD: tinkex.Patience(poll=0.1)}

TOKENS = [3, 9, 27, 9, 3]
ADAM = types.AdamParams(learning_rate=0.1)


def datum(tokens=TOKENS):
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def loss(output):
    total = -sum(float(one["logprobs"].to_numpy().sum()) for one in output.loss_fn_outputs)
    return round(total, 3)


def likelihood(data, logprobs):
    """cross_entropy, by hand."""
    return -sum(lp.sum() for lp in logprobs), {"mine": 1.0}


@pytest.fixture
def connect(monkeypatch):
    """A client of an odd server."""
    open_ones = []

    def make(quirks, **options):
        server = OddServer(quirks)
        server.__enter__()
        service = tinkex.ServiceClient(server.url, "tml-key", **options)
        open_ones.extend([server, service])
        return server, service

    for name in ("TINKER_API_KEY", "TINKER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield make
    for one in reversed(open_ones):
        one.__exit__(None, None, None)


def script(service, quirks):
    """What a user does; the numbers that it came to."""
    found = {}
    training = service.create_lora_training_client("tiny", rank=4)
    steps = []
    for _ in range(4):  # all sent before the first result is looked at
        steps.append(training.forward_backward([datum(), datum([1, 2, 3])], "cross_entropy"))
        training.optim_step(ADAM)
    found["losses"] = [loss(step.result(20)) for step in steps]
    state = training.save_state("state").result(20).path
    sampler = training.create_sampling_client(
        training.save_weights_for_sampler("sampler").result(20).path
    )
    found["frozen"] = scores(sampler)
    if has_forward(quirks):
        custom = training.forward_backward_custom([datum()], likelihood)
        training.optim_step(ADAM)
        found["custom"] = loss(custom.result(20)), custom.result().metrics["mine"]
        found["after"] = loss(training.forward([datum()], "cross_entropy").result(20))
    else:
        train_on(training)
    found["still frozen"] = scores(sampler)
    live = training.save_weights_and_get_sampling_client_sync()
    params = types.SamplingParams(max_tokens=3)
    found["samples"] = [
        [s.tokens for s in one.sample([5, 6], 2, params).result(20).sequences]
        for one in (live, service.create_sampling_client(base_model="tiny"))
    ]
    training.load_state(state).result(20)
    found["loaded"] = train_on(training)
    if quirks.restores_at_once or "weights_info" not in quirks.lacks:
        found["restored"] = [restored(service, state, way) for way in ("", "_with_optimizer")]
    training.close()
    return found


def has_forward(quirks):
    """In protobuf it is a flag of forward_backward."""
    return "forward" not in quirks.lacks or quirks.protobuf is None


def scores(sampler):
    logprobs = sampler.compute_logprobs(TOKENS).result(20)
    return [lp if lp is None else round(lp, 3) for lp in logprobs]


def train_on(training):
    """The loss before and after one more step: the momentum shows."""
    passes = []
    for _ in range(2):
        passes.append(training.forward_backward([datum()], "cross_entropy"))
        training.optim_step(ADAM)
    return [loss(one.result(20)) for one in passes]


def restored(service, path, way):
    with getattr(service, f"create_training_client_from_state{way}")(path) as copy:
        return train_on(copy)


@pytest.fixture(scope="module")
def reference():
    with OddServer() as server, tinkex.ServiceClient(server.url, "tml-key") as service:
        yield script(service, server.quirks)


@pytest.mark.parametrize("name", [*KNOWN, *SINGLE])
def test_the_same_script_comes_to_the_same_numbers(name, connect, reference, caplog):
    quirks = {**KNOWN, **SINGLE}[name]
    _, service = connect(quirks, patience=PATIENCE.get(name))

    found = script(service, quirks)

    assert {what: reference[what] for what in found} == found


def test_the_script_shows_what_could_be_lost(reference):
    """A step that was dropped or doubled, an optimizer that was not restored, a sampler that
    moved."""
    losses, (fresh, warm) = reference["losses"], reference["restored"]

    assert sorted(losses, reverse=True) == losses and losses[0] - losses[-1] > 1
    assert fresh[0] == warm[0] and abs(fresh[1] - warm[1]) > 0.01
    assert reference["frozen"] == reference["still frozen"]
    assert reference["after"] < reference["custom"][0] == reference["loaded"][0] == fresh[0]
    assert reference["samples"][0] != reference["samples"][1]


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_failed_operation_is_told_in_the_server_s_words_and_the_next_one_works(connect, status):
    """As a result, as most do; by HTTP 400 (SkyRL); by HTTP 500, which is asked again at first."""
    patience = tinkex.Patience(no_answer=0.3)
    _, service = connect(Quirks(failures=status), patience=patience)
    training = service.create_lora_training_client("tiny", rank=4)
    failed = training.load_state("tinker://unknown/weights/nothing")

    with pytest.raises(errors.TinkexError, match="there is no checkpoint tinker://unknown/weights"):
        failed.result(20)
    assert loss(training.forward([datum()], "cross_entropy").result(20)) > 0


def test_a_wait_for_a_server_that_holds_its_polls_is_quiet(connect, caplog):
    """The client's own timeout there is no trouble worth a log line."""
    _, service = connect(SINGLE[HELD], patience=PATIENCE[HELD])
    training = service.create_lora_training_client("tiny", rank=4)
    training.forward_backward([datum()], "cross_entropy")
    training.optim_step(ADAM).result(20)

    assert [] == [record for record in caplog.records if record.levelname != "DEBUG"]


def test_one_probe_finds_the_dialect_out(connect):
    server, service = connect(Quirks(protobuf=415, results_in_json=True))
    training = service.create_lora_training_client("tiny", rank=4)
    for _ in range(3):
        training.forward_backward([datum()], "cross_entropy").result(20)

    kinds = [headers["Content-Type"] for name, headers in server.headers if "backward" in name]
    assert ["application/x-protobuf", *["application/json"] * 3] == kinds


def test_a_server_that_says_what_it_takes_is_not_probed(connect):
    server, service = connect(
        Quirks(protobuf=415, results_in_json=True, flags={"proto_write_fwdbwd": False})
    )
    training = service.create_lora_training_client("tiny", rank=4)
    training.forward_backward([datum()], "cross_entropy").result(20)

    assert 1 == server.seen["forward_backward"]


def test_a_server_without_heartbeats_gets_one(connect):
    quick = tinkex.Patience(heartbeat=0.02)
    server, _ = connect(Quirks(lacks={"session_heartbeat"}), patience=quick)
    deadline = time.monotonic() + 5
    while not server.seen["session_heartbeat"] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)

    assert 1 == server.seen["session_heartbeat"]


#: What a client can ask for that not every server has: the endpoint, and how to ask.
FEATURES = {
    "sessions": lambda s, t, r: r.list_sessions(),
    "training_runs": lambda s, t, r: r.list_training_runs(),
    "checkpoints": lambda s, t, r: r.list_user_checkpoints(),
    "weights_info": lambda s, t, r: r.get_weights_info_by_tinker_path("tinker://r/weights/n"),
    "archive": lambda s, t, r: r.get_checkpoint_archive_url("tinker://r/weights/n"),
    "publish": lambda s, t, r: r.publish_checkpoint_from_tinker_path("tinker://r/weights/n"),
    "ttl": lambda s, t, r: r.set_checkpoint_ttl_from_tinker_path("tinker://r/weights/n", 3600),
    "samplers": lambda s, t, r: r.get_sampler("sampling_1"),
    "get_server_capabilities": lambda s, t, r: s.get_server_capabilities(),
    "healthz": lambda s, t, r: s.health(),
    "unload_model": lambda s, t, r: t.unload_model().result(20),
    "save_weights": lambda s, t, r: t.save_state("a").result(20),
    "stream_sample": lambda s, t, r: list(
        s.create_sampling_client(base_model="tiny").sample_stream([1])
    ),
}


@pytest.mark.parametrize("lacking", [404, 405, 501])
@pytest.mark.parametrize("name", FEATURES)
def test_what_a_server_lacks_is_told_by_its_name(connect, name, lacking):
    """And at once: another try would bring nothing, but for archives, which SkyRL has elsewhere."""
    lacks = {name} | ({"training_runs"} if name in MANAGEMENT else set())
    server, service = connect(Quirks(lacks=lacks, lacking=lacking))
    training = service.create_lora_training_client("tiny", rank=4)
    rest = service.create_rest_client()

    with pytest.raises(
        errors.NotOfferedError, match=rf"this server does not offer .*\({lacking} on http"
    ) as caught:
        FEATURES[name](service, training, rest)

    assert name in str(caught.value)
    assert (2 if name == "archive" else 1) == server.seen[name]


@pytest.mark.parametrize("segment", [True, False])
def test_an_archive_is_found_by_its_name_where_a_server_knows_no_segments(connect, segment):
    """SkyRL lists tinker://run/sampler_weights/name and serves run/name."""
    _, service = connect(Quirks(sampler_segment=segment))
    rest = service.create_rest_client()

    url = rest.get_checkpoint_archive_url("tinker://run/sampler_weights/name").url
    assert "http://files.test/run/name.tar" == url


def test_a_server_without_a_forward_pass_says_so_for_a_custom_loss_too(connect):
    """In JSON it has an endpoint of its own, which not every server has."""
    _, service = connect(KNOWN["open-rl"])
    training = service.create_lora_training_client("tiny", rank=4)
    custom = training.forward_backward_custom([datum()], likelihood)

    with pytest.raises(errors.NotOfferedError, match="this server does not offer forward"):
        custom.result(20)
    assert 2 == len(train_on(training))


def test_waiting_for_many_samples_does_without_the_one_poll(connect):
    """A server may promise retrieve_futures and not have it, behind an old proxy."""
    server, service = connect(Quirks(lacks=NEWER, flags={"sample_use_retrieve_futures": True}))
    sampler = service.create_sampling_client(base_model="tiny")
    samples = list(sampler.sample_many([[1, 2]] * 20))

    assert 20 == len(samples)
    assert 20 <= server.seen["retrieve_future"]
