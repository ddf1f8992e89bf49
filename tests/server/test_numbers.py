"""Operation numbers in every interleaving: refused, early, late, repeated, with another body."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

#: Numbers that an example uses: few, so that they meet.
NUMBERS = st.integers(1, 7)


def step(model, seq, rate=0.1):
    return {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": rate}}


BAD = {
    "optim_step": lambda model, seq: {**step(model, seq), "adam_params": {"beta1": 7}},
    "save_weights": lambda model, seq: {"model_id": model, "seq_id": seq, "path": "../up"},
}


class Numbers(RuleBasedStateMachine):
    """The server's ledger beside a model of it: a set, two dicts and the rule that joins them."""

    served = None

    @initialize()
    def make_model(self):
        self.client = self.served.client
        self.model = self.client.model()
        self.good = {}  # number -> learning rate of the accepted step
        self.failed = {}  # number -> the refusal that fills its place
        self.noted = {}  # number -> a refusal that nothing waits for yet

    def fill(self):
        """Refused numbers below an accepted one take their places."""
        highest = max([*self.good, *self.failed], default=0)
        for seq in sorted(self.noted):
            if seq < highest:
                self.failed[seq] = self.noted.pop(seq)

    @rule(seq=NUMBERS, rate=st.sampled_from([0.1, 0.2]))
    def send_a_good_one(self, seq, rate):
        """The first under its number, a repeat, or another request under a used number."""
        answer = self.client.send("POST", "optim_step", step(self.model, seq, rate))
        if self.good.get(seq, rate) == rate and seq not in self.failed:
            assert answer.status_code == 200, answer.text
            assert answer.json()["request_id"] == f"{self.model}:{seq}"
            self.good[seq] = rate
            self.noted.pop(seq, None)
            self.fill()
        else:
            assert answer.status_code == 400, answer.text
            assert "accepted before with another body" in answer.json()["error"]

    @rule(seq=NUMBERS, name=st.sampled_from(sorted(BAD)))
    def send_a_bad_one(self, seq, name):
        status, sentence = self.client.refused(name, BAD[name](self.model, seq))
        assert status == 400
        if seq not in self.good and seq not in self.failed:
            self.noted[seq] = sentence
            self.fill()

    @rule(seq=st.sampled_from([0, -1, 2**31, 2**70]))
    def send_an_impossible_number(self, seq):
        assert self.client.refused("optim_step", step(self.model, seq))[0] == 400

    def teardown(self):
        """Send what is missing: every operation has its own outcome, each ran once, in order."""
        highest = max([*self.good, *self.failed, *self.noted], default=0)
        for seq in range(1, highest + 1):
            if seq not in self.good and seq not in self.failed:
                self.send_a_good_one(seq, 0.1)
        for seq in range(1, highest + 1):
            result = self.client.result(f"{self.model}:{seq}")
            if seq in self.failed:
                assert self.failed[seq] in result["error"]
            else:
                assert "metrics" in result
        ran = [entry for entry in self.served.engine.log if entry[:2] == ("optim_step", self.model)]
        assert [entry[2] for entry in ran] == list(range(1, len(self.good) + 1))


def test_every_interleaving_of_numbers(served):
    """Refusals 1, 2, 3 and then a good 4 used to end in a KeyError and a 500."""
    Numbers.served = served
    run_state_machine_as_test(
        Numbers,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_several_refused_numbers_then_a_good_one(client):
    model = client.model()
    refusals = [client.refused("optim_step", BAD["optim_step"](model, seq))[1] for seq in (1, 2, 3)]
    good = client.post("optim_step", step(model, 4))

    assert "metrics" in client.result(good)
    for seq, sentence in enumerate(refusals, 1):
        assert sentence in client.result(f"{model}:{seq}")["error"]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_that_arrive_at_once_from_several_connections(served, seed):
    """Every number ends, with its refusal or its result, whichever request came first."""
    client = served.client
    model = client.model()
    statuses = []

    def send(numbers):
        own = served.client_with(None)
        for seq in numbers:
            is_bad = (seq * 7 + seed) % 3 == 0
            body = BAD["optim_step"](model, seq) if is_bad else step(model, seq)
            statuses.append((is_bad, own.send("POST", "optim_step", body).status_code))

    threads = [threading.Thread(target=send, args=(range(40 - i, 0, -4),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.post("optim_step", step(model, 41))
    results = [client.result(f"{model}:{seq}") for seq in range(1, 42)]

    assert {(True, 400), (False, 200)} == set(statuses)
    assert all(("metrics" in r) != ("error" in r) for r in results)
