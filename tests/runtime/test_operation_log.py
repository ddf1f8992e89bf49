"""What is logged of an operation, and what is not."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import numpy as np
import pytest

import tinkex
from tests.support.fake_server import (
    URL,
    FakeServer,
    datum,
    plugged_in,
    session,
    status,
    training,
    try_again,
)
from tests.support.served import served
from tinkex import types
from tinkex.sampling import SamplingClient

ADAM = types.AdamParams()
MODEL = "s0:train:0"


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def lines(caplog):
    """The messages of tinkex from DEBUG on; call it to get them."""
    caplog.set_level(logging.DEBUG, "tinkex")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno < logging.WARNING]


def test_each_step_of_an_operation_is_logged(server, lines):
    """Submitted, refused once, accepted, not yet, done: with its numbers, times and sizes."""
    server.script("optim_step", status(503, {"error": "busy"}))
    server.script("retrieve_future", try_again("paused_capacity", "no room"))
    with training(server) as client:
        client.optim_step(ADAM).result(10)

    said = [line for line in lines() if "optim_step" in line]
    what = f"optim_step on {MODEL}"
    assert f"{what}: submitted" == said[0]
    assert re.match(r"the server to accept optim_step .*: trying again, .*503", said[1])
    assert re.fullmatch(rf"{what}: accepted as request \S+, seq_id 1 after [\d,]+ ms", said[2])
    assert f"{what}: not done yet, queue state paused_capacity (no room)" == said[3]
    assert re.fullmatch(
        rf"{what}: done in [\d,]+ ms; retries: 1; [\d,]+ bytes sent, [\d,]+ received", said[4]
    )


def test_a_call_in_several_requests_is_one_operation(lines):
    server = FakeServer(features={"fwdbwd_max_chunk_len": 1})
    with training(server) as client:
        client.forward_backward([datum(1, 2), datum(3)], "cross_entropy").result(10)

    said = [line for line in lines() if "forward_backward" in line]
    assert f"forward_backward on {MODEL}: submitted (3 tokens)" == said[0]
    assert 2 == sum(": accepted as request" in line for line in said)
    assert 1 == sum(": done in" in line for line in said)


def test_samples_are_logged_too(server, lines):
    with session(server) as s, SamplingClient.create(s, base_model="tiny") as client:
        client.sample([1, 2, 3]).result(10)

    steps = [line.split(": ", 1)[1].split(" ")[0] for line in lines() if "sample from" in line]
    assert ["submitted", "accepted", "done"] == steps


def test_a_failure_is_logged_with_its_reason(server, lines):
    server.results["optim_step"] = lambda seen: {"error": "no gradient", "category": "user"}
    with training(server) as client:
        assert client.optim_step(ADAM).exception(10) is not None

    [line] = [line for line in lines() if ": failed in" in line]
    assert "RequestFailedError" in line
    assert "no gradient" in line


def test_milestones_are_logged_at_info(server, monkeypatch, caplog):
    """A session, a model, a checkpoint; not each step."""
    caplog.set_level(logging.INFO, "tinkex")
    plugged_in(monkeypatch, server)
    with tinkex.ServiceClient() as service:
        client = service.create_lora_training_client("tiny")
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(ADAM)
        path = client.save_state("best").result(10).path

    said = [record.getMessage() for record in caplog.records]
    assert f"session s0 on {URL}" == said[0]
    assert said[1].startswith("create_model of tiny: done in")
    assert any(line.startswith("save_weights on") and line.endswith(path) for line in said)
    assert not any("optim_step" in line or "forward_backward on" in line for line in said)


def test_neither_keys_nor_data_are_in_the_log(server, monkeypatch, lines):
    """Sizes are; token ids, weights, text and secrets are not."""
    plugged_in(monkeypatch, server)
    numbers = [987_001, 987_002, 987_003]
    server.script("forward_backward", status(503, {"error": "busy"}))
    with tinkex.ServiceClient(
        URL, "tml-very-secret", default_headers={"X-Token": "hidden-token"}
    ) as service:
        client = service.create_lora_training_client("tiny")
        data = types.Datum(
            types.ModelInput.from_ints(numbers),
            {"target_tokens": numbers, "weights": np.full(3, 0.123456)},
        )
        client.forward_backward([data], "cross_entropy").result(10)
        service.create_sampling_client(base_model="tiny").sample(numbers).result(10)

    text = "\n".join(lines())
    assert "forward_backward" in text
    for secret in ("very-secret", "hidden-token", *map(str, numbers), "0.1234"):
        assert secret not in text


@pytest.mark.parametrize(
    "level, expected, absent",
    [
        ("debug", ["DEBUG", "INFO"], []),
        ("INFO", ["INFO tinkex: session s0 on"], ["DEBUG"]),
        ("warning", [], ["INFO", "DEBUG"]),
    ],
)
def test_tinkex_log_sets_the_level(server, level, expected, absent):
    """Lines go to stderr; stdout is the program's."""
    with served(server) as url:
        code = "tinkex.ServiceClient(URL).create_lora_training_client('tiny')"
        done = _program(url, code, TINKEX_LOG=level)

    assert (0, "") == (done.returncode, done.stdout)
    assert all(words in done.stderr for words in expected), done.stderr
    assert not any(words in done.stderr for words in absent), done.stderr


def test_a_program_that_sets_up_logging_keeps_its_handlers(server):
    """Each line once, in the program's own format."""
    code = (
        "import logging; logging.basicConfig(format='MINE %(message)s'); "
        "tinkex.ServiceClient(URL).close()"
    )
    with served(server) as url:
        done = _program(url, code, TINKEX_LOG="info")

    assert 1 == done.stderr.count("session s0 on"), done.stderr
    assert "MINE session s0 on" in done.stderr


def test_an_unknown_level_is_an_error_that_names_the_levels(monkeypatch):
    monkeypatch.setenv("TINKEX_LOG", "loud")

    with pytest.raises(ValueError, match="TINKEX_LOG is 'loud'; set it to debug, info, warning"):
        tinkex.ServiceClient("http://127.0.0.1:9")


def _program(url, code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"import tinkex; URL = {url!r}; {code}"],
        env={"PYTHONPATH": ":".join(sys.path), **environment},
        capture_output=True,
        text=True,
    )
