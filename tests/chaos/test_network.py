"""Exactly once, under any network: a run over one that breaks ends as an undisturbed one."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import attrs
import pytest

import tinkex
from tests.chaos import scenario
from tests.chaos.conftest import SEEDS
from tests.chaos.proxy import FAULTS, Proxy
from tests.chaos.servers import RECORDED, Server

RATE = 0.32
#: Steps of the run of `make test`: enough for all kinds of operations.
QUICK = 20
PATIENCE = tinkex.Patience(first_contact=60, no_answer=120, report_after=30)


@attrs.define
class Record:
    """What the engine of a server did, run by run."""

    path: object
    read: int = 0

    def next_run(self):
        """(what its model did, in order; its samples with how often each ran) since the last."""
        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        new, self.read = lines[self.read :], len(lines)
        [model_id] = [line[1] for line in new if line[0] == "create"]
        session = model_id.split(":")[0]
        new = json.loads(json.dumps(new).replace(session, "SESSION"))
        samples = Counter(tuple(line[1:]) for line in new if line[0] == "sample")
        return [line for line in new if line[0] != "sample"], samples


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    with Server(folder / "home", RECORDED, record=folder / "record") as server:
        yield server


@pytest.fixture(scope="module")
def record(server):
    return Record(server.home.with_name("record"))


@pytest.fixture(scope="module")
def undisturbed(server, record):
    """(outcome, executed) of a run of so many steps over a network without faults."""

    @cache
    def run(steps):
        with tinkex.ServiceClient(server.url, "tml-any") as service:
            outcome = scenario.run(service, server.home, steps)
        return outcome, record.next_run()

    return run


@pytest.mark.parametrize(
    "seed, steps",
    [
        pytest.param(0, QUICK, id="quick"),
        *(
            pytest.param(seed, scenario.FULL, id=str(seed), marks=pytest.mark.slow)
            for seed in range(SEEDS)
        ),
    ],
)
def test_over_a_broken_network_a_run_ends_as_an_undisturbed_one(
    server, record, undisturbed, seed, steps, quick_retries, report
):
    """Each operation ran once, in its order; all futures resolved; the weights are the same."""
    expected, (operations, samples) = undisturbed(steps)

    with (
        Proxy(server.port, seed, RATE) as proxy,
        tinkex.ServiceClient(proxy.url, "tml-any", patience=PATIENCE) as service,
    ):
        outcome = scenario.run(service, server.home, steps)
    executed, sampled = record.next_run()
    lost = sum((_counts(operations) - _counts(executed)).values())
    twice = sum((_counts(executed) - _counts(operations)).values())
    twice += sum(times - 1 for times in sampled.values())
    hit = proxy.hits.total()
    report(
        "network",
        operations=outcome.operations + outcome.samples,
        requests=proxy.requests,
        faults=proxy.hits,
        lost=lost,
        twice=twice,
        identical=outcome.weights == expected.weights,
    )

    assert expected.weights == outcome.weights
    assert expected.results == outcome.results
    assert operations == executed
    assert _by_prompt(samples) == _by_prompt(sampled)
    assert (0, 0) == (lost, twice)
    assert 300 * steps // scenario.FULL <= outcome.operations
    assert hit >= proxy.requests / 4


def _counts(lines):
    return Counter(map(str, lines))


def _by_prompt(samples):
    """Which sample of a sampler gets which number is left to chance."""
    return Counter((ticket.rsplit(":", 1)[0], prompt) for ticket, prompt in samples)


def test_a_seed_breaks_the_same_requests_again():
    """So that a run that failed can be looked at."""
    sequences = []
    for seed in (1, 1, 2):
        proxy = Proxy(1, seed, RATE)
        proxy._listener.close()
        sequences.append([proxy.fault_of("asample", n) for n in range(200)])

    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]
    assert 40 <= sum(fault is not None for fault in sequences[0]) <= 80


def test_only_polls_are_told_that_a_promise_is_gone():
    """Elsewhere 410 is a statement on the session, not on the way there."""
    proxy = Proxy(1, 0, 1.0)
    proxy._listener.close()
    faults = {
        endpoint: {proxy.fault_of(endpoint, n) for n in range(2000)}
        for endpoint in ("optim_step", "retrieve_future")
    }

    assert set(FAULTS) == faults["retrieve_future"]
    assert set(FAULTS) - {"410 on a poll"} == faults["optim_step"]
