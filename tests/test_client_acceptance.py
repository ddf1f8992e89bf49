"""
What a client of this API must do, over real HTTP: the eight lines of the protocol's checklist.

One test or more for each line that whole programs can show; the single rules behind them are with
the modules they live in (test_golden, test_polling, test_training, test_sampling, test_auth).
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections import defaultdict

import numpy as np
import pytest

import tinkex
from tests.support.odd_servers import OddServer, Quirks
from tinkex import types, wire
from tinkex.runtime.sample_queue import CLONE_BLOCK

ADAM = types.AdamParams(learning_rate=0.1)


@pytest.fixture
def serve(monkeypatch):
    """Starts odd servers, which end with the test."""
    running = []

    def start(**quirks):
        server = OddServer(Quirks(**quirks))
        running.append(server.__enter__())
        return server

    for name in [name for name in os.environ if name.startswith("TINKER_")]:
        monkeypatch.delenv(name)
    yield start
    for server in running:
        server.__exit__(None, None, None)


def datum(length=4):
    tokens = (np.arange(length + 1) % 60).tolist()
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": [1.0] * length},
    )


# 1. The same bytes as the official SDK's: test_golden.


def test_line_1_training_data_is_the_official_sdk_s_message(serve):
    """What goes over the wire, not only what the encoder gives."""
    server = serve()
    with tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4)
        training.forward_backward([datum(3)], "cross_entropy").result(20)

    [(_, headers)] = [item for item in server.headers if item[0] == "forward_backward"]
    [(_, batch)] = [item for item in server.bodies if item[0] == "forward_backward"]
    assert wire.PROTOBUF == headers["Content-Type"]
    assert (training.model_id, 1, False) == (batch.model_id, batch.seq_id, batch.forward_only)
    assert [1, 2, 3] == batch.data[0].loss_fn_inputs["target_tokens"].to_numpy().tolist()


# 2. JSON-only servers too: test_dialects.


def test_line_2_results_are_asked_for_in_both_dialects(serve):
    server = serve(results_in_json=True)
    with tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4)
        training.forward_backward([datum()], "cross_entropy").result(20)

    accepts = [headers["Accept"] for name, headers in server.headers if name == "retrieve_future"]
    assert "application/x-protobuf, application/json" == accepts[-1]


# 3. Every answer to a poll, with time limits: test_polling.


def test_line_3_every_kind_of_not_yet_and_then_a_large_result(serve):
    kinds = ((200, {"type": "try_again", "queue_state": "paused_capacity"}), (408, None))
    server = serve(not_yet=kinds)
    with tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4)
        output = training.forward([datum(2000)], "cross_entropy").result(30)

    assert (2000,) == output.loss_fn_outputs[0]["logprobs"].shape


# 4. Numbers in the order of the calls, from several threads, without gaps.


def test_line_4_numbers_follow_the_calls_of_several_threads(serve):
    """The server refuses whatever is out of order, and what each thread did is in its order."""
    server = serve(numbered=True)
    order = defaultdict(list)
    with tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4)

        def calls(thread):
            futures = [
                training.save_state(f"t{thread}-{i}")
                if i % 2
                else training.optim_step(types.AdamParams(learning_rate=thread + i / 100))
                for i in range(20)
            ]
            [future.result(30) for future in futures]

        threads = [threading.Thread(target=calls, args=(n,)) for n in range(5)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]

    numbered = [body for name, body in server.bodies if name in ("optim_step", "save_weights")]
    for body in numbered:
        if "path" in body:
            thread, i = map(int, body["path"][1:].split("-"))
        else:
            rate = body["adam_params"]["learning_rate"]
            thread, i = int(rate), round(rate % 1 * 100)
        order[thread].append(i)
    assert list(range(1, 101)) == [body["seq_id"] for body in numbered]
    assert {thread: list(range(20)) for thread in range(5)} == order


# 5. The server's limits and flags.


def test_line_5_batches_keep_the_server_s_limits(serve):
    server = serve(flags={"fwdbwd_max_chunk_len": 3, "fwdbwd_max_chunk_bytes_count": 300})
    with tinkex.ServiceClient(server.url) as service:
        training = service.create_lora_training_client("tiny", rank=4)
        data = [datum(4)] * 7 + [datum(20)] * 2
        output = training.forward_backward(data, "cross_entropy").result(20)

    sizes = [len(body.data) for name, body in server.bodies if name == "forward_backward"]
    assert [3, 3, 1, 1, 1] == sizes
    assert 9 == len(output.loss_fn_outputs)


def test_line_5_no_more_samples_are_under_way_than_the_server_allows(serve):
    """From the submission to the result."""
    server = serve(flags={"sample_max_concurrent_requests": 3}, work=0.02)
    with tinkex.ServiceClient(server.url) as service:
        sampler = service.create_sampling_client(base_model="tiny")
        futures = [sampler.sample([1, 2]) for _ in range(20)]
        cancelled = [future.cancel() for future in futures[10:12]]
        done = [future.result(20) for future in futures if not future.cancelled()]

    assert 20 == len(done) + sum(cancelled)
    assert 3 >= server.at_once["retrieve_future"]
    assert len(done) == server.seen["asample"]


def test_line_5_prompts_are_dispatched_within_the_server_s_bytes(serve):
    server = serve(flags={"sample_dispatch_bytes_semaphore_size": 1000}, pause=0.01)
    with tinkex.ServiceClient(server.url) as service:
        sampler = service.create_sampling_client(base_model="tiny")
        for future in [sampler.sample([1] * 120) for _ in range(10)]:
            future.result(20)

    assert 2 == server.at_once["asample"]


def test_line_5_flags_of_the_future_are_ignored(serve):
    server = serve(flags={"flag_of_the_future": {"a": 1}, "sample_no_retries": "yes"})
    with tinkex.ServiceClient(server.url) as service:
        assert service.create_lora_training_client("tiny", rank=4)


# 6. Tokens of a minute, and a refused one.


@pytest.mark.parametrize("source", ["api_key", "credential_cmd"])
def test_line_6_tokens_of_a_minute_are_exchanged_and_replaced(serve, source, monkeypatch, tmp_path):
    """By the key, or by what TINKER_CREDENTIAL_CMD prints; a token that the server calls invalid is
    replaced once, and the request replayed."""
    server = serve(
        tokens=True, flags={"pjwt_auth_enabled": True, "credential_default_source": source}
    )
    server.credentials.add("tml-a-key" if source == "api_key" else "from-the-command")
    (tmp_path / "credential").write_text("from-the-command\n")
    monkeypatch.setenv("TINKER_CREDENTIAL_CMD", f"cat {tmp_path / 'credential'}")
    with tinkex.ServiceClient(server.url, "tml-a-key") as service:
        training = service.create_lora_training_client("tiny", rank=4)
        first = list(server.tokens)
        server.tokens.append("another one is the good one now")
        time.sleep(1.1)  # a fresh token is not given up because of an earlier answer
        training.optim_step(ADAM).result(20)

    keys = {h["X-API-Key"] for name, h in server.headers if name == "auth/token"}
    assert 1 == len(first) and 3 == len(server.tokens)
    assert server.credentials == keys


# 7. Copies of a sampling client number their samples apart.

COPY = """
import pickle, sys
sampler = pickle.load(sys.stdin.buffer)
for _ in range(3):
    sampler.sample([1, 2]).result(20)
sampler.close()
"""


def test_line_7_copies_in_other_processes_use_blocks_of_a_billion_numbers(serve):
    server = serve()
    environment = {**os.environ, "TINKER_API_KEY": "tml-of-the-other-process"}
    with tinkex.ServiceClient(server.url, "tml-secret") as service:
        sampler = service.create_sampling_client(base_model="tiny")
        packed = pickle.dumps(sampler)
        sampler.sample([1, 2]).result(20)
        copies = [
            subprocess.Popen([sys.executable, "-c", COPY], stdin=subprocess.PIPE, env=environment)
            for _ in range(2)
        ]
        for copy in copies:
            copy.communicate(packed, timeout=60)

    assert [0, 0] == [copy.returncode for copy in copies]
    numbers = [body["seq_id"] for name, body in server.bodies if name == "asample"]
    blocks = defaultdict(list)
    for number in numbers:
        blocks[number // CLONE_BLOCK].append(number % CLONE_BLOCK)
    assert 3 == len(blocks) and [0] == blocks[0]
    assert [[0, 1, 2]] * 2 == [used for block, used in blocks.items() if block]
    assert b"tml-secret" not in packed


# 8. Telemetry is not asked for, and holds nothing up.


def test_line_8_without_being_asked_for_there_is_no_telemetry(serve):
    server = serve()
    with tinkex.ServiceClient(server.url) as service:
        service.create_lora_training_client("tiny", rank=4).optim_step(ADAM).result(20)

    assert 0 == server.seen["telemetry"]


def test_line_8_telemetry_that_nobody_takes_holds_up_no_exit(serve):
    server = serve(pause=0.0, lacks={"telemetry"}, lacking=503)
    code = f"""
import tinkex
service = tinkex.ServiceClient({server.url!r})
service.create_lora_training_client("tiny", rank=4)
"""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TINKER_TELEMETRY": "1", "TINKER_API_KEY": "tml-k"},
        capture_output=True,
        timeout=60,
    )

    assert (0, b"") == (done.returncode, done.stderr)
    assert time.monotonic() - started < 15
