"""`tinkex conformance`: our server passes every check, and a server that breaks a rule fails it."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
import zstandard

from tests.support import serve_again
from tests.support.odd_servers import EMPTY, OddServer, Quirks
from tinkex import cli, conformance, types, wire
from tinkex.conformance.client import is_missing, is_not_yet, zstd_bomb, zstd_frame
from tinkex.conformance.runner import Check, try_out
from tinkex.runtime.transport import Answer

#: Polls are held for 2 s instead of half a minute; otherwise the defaults of `tinkex serve`.
LIMITS = json.dumps({"poll_seconds": 2.0})


class Serve:
    """A `tinkex serve` that a shell command can kill and restart."""

    def __init__(self, folder, *options):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.pidfile = folder / "pid"
        program = [sys.executable, serve_again.__file__, str(self.pidfile), LIMITS]
        self.command = [*program, "--port", str(port), "--home", str(folder / "home"), *options]
        subprocess.run(self.command, check=True)

    def wait(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.url}/api/v1/healthz", timeout=5).ok:
                    return
            except requests.ConnectionError:
                time.sleep(0.1)
        raise TimeoutError(Path(self.pidfile).with_suffix(".log").read_text())


#: A server in both dialects with two users, and one with JSON alone and without keys.
SERVERS = {
    "both": ("--api-key", "tml-one", "--api-key", "tml-two"),
    "json": ("--dialect", "json"),
}


@pytest.fixture(params=["both", pytest.param("json", marks=pytest.mark.slow)])
def dialect(request):
    return request.param


@pytest.fixture
def server(dialect, tmp_path):
    running = Serve(tmp_path, *SERVERS[dialect])
    yield running
    serve_again.kill(running.pidfile)


#: Checks that do not apply: without keys there are no users, and without protobuf no zstd.
NOT_OFFERED = {
    "both": set(),
    "json": {
        "requests without the right key are refused",
        "another key sees none of it",
        "the same in both dialects",
        "zstd bodies are read",
    },
}


def test_our_own_server_passes_every_check(server, dialect, capsys, monkeypatch):
    """As a user runs it, with a kill -9 in the middle."""
    server.wait()
    options = ["--write", "--format", "json", "--restart", shlex.join(server.command)]
    if dialect == "both":
        monkeypatch.setenv("TINKER_API_KEY", "tml-one")
        options += ["--other-api-key", "tml-two"]

    status = cli.main(["conformance", server.url, *options])

    report = json.loads(capsys.readouterr().out)
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    failed = [check for check in report["checks"] if check["outcome"] == "fail"]
    assert [] == failed
    assert (0, True) == (status, report["ok"])
    assert [check.name for check in conformance.CHECKS] == list(outcomes)
    assert NOT_OFFERED[dialect] == {n for n, o in outcomes.items() if o == "not offered"}


#: A check, and a server that breaks its rule and no other.
BROKEN = {
    "fields of a newer SDK are ignored": Quirks(strict=True),
    "an unknown promise is a 410": Quirks(lost=404),
    "a model's id is <session>:train:<number>": Quirks(model_ids="hex"),
    "requests that arrive 2, 3, 4, 1 all count": Quirks(numbered=True),
    "a gap in the numbers is waited for": Quirks(),
    "a resent create_model makes one model": Quirks(model_ids="hex"),
    "a resent forward_backward runs once": Quirks(),
    "a resent optim_step runs once": Quirks(numbered=True),
    "a resent save_weights saves once": Quirks(),
    "a resent save_weights_for_sampler saves once": Quirks(),
    "a resent load_weights loads once": Quirks(numbered=True),
    "a resent create_sampling_session makes one": Quirks(),
    "a resent asample samples once": Quirks(),
    "after a refused request a good one works": Quirks(),
    "a failed operation is a 200 with error and category": Quirks(failures=400),
    "a result can be fetched twice": Quirks(once=True),
    "a heartbeat after a session's end is refused": Quirks(),
    "loss:sum is there, and is the sum": Quirks(metrics="none"),
    "metrics are named name:reduction": Quirks(metrics="odd"),
    "a gradient of twice the weights is twice the gradient": Quirks(gradients="mean"),
    "gradients add up over requests until the step": Quirks(gradients="last"),
    "forward leaves gradients alone": Quirks(gradients="always"),
    "top-k log-probabilities are aligned": Quirks(),
    "samples are named by their promise": Quirks(sequence_ids=False),
    "prompt log-probabilities are aligned": Quirks(prompt_logprobs="short"),
    "a seed repeats a sample": Quirks(),
    "the samples of one request differ": Quirks(),
    "invalid arguments are refused": Quirks(),
    "a stop token ends a sample": Quirks(),
    "sampler weights stay frozen while training continues": Quirks(samplers="live"),
    "sampling from an old checkpoint leaves the model alone": Quirks(samplers="one slot"),
    "a sampler follows its checkpoint, not the last one used": Quirks(samplers="live"),
    "a path is tinker://<model>/<kind>/<name>": Quirks(sampler_segment=False),
    "the optimizer is restored, or not, as asked": Quirks(optimizer="always"),
    "a name that is taken is refused, and the first stays": Quirks(same_name="overwritten"),
    "names are not paths": Quirks(),
    "weights_info describes the checkpoint": Quirks(),
    "checkpoints can be deleted": Quirks(),
    "another key sees none of it": Quirks(),
}


def outcome(quirks, name, **options):
    with OddServer(quirks) as server:
        [result] = conformance.check(
            server.url, "tml-a", other_api_key="tml-b", write=True, only=[name], patience=20
        )
        return result


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_that_breaks_a_rule_fails_its_check(name):
    result = outcome(BROKEN[name], name)

    assert ("fail", True) == (result.outcome, bool(result.reason)), result
    assert "the check raised" not in result.reason


@pytest.mark.parametrize("name", [n for n, quirks in BROKEN.items() if quirks != Quirks()])
def test_the_same_server_without_the_oddity_passes_it(name):
    """So the check detects this rule and nothing else."""
    result = outcome(Quirks(optimizer="asked"), name)

    if "resent" not in name:
        assert "pass" == result.outcome, result


@pytest.mark.parametrize(
    "quirks",
    [
        Quirks(immediate={"create_model", "forward", "forward_backward", "optim_step"}),
        Quirks(request_ids=int),
        Quirks(protobuf=415, results_in_json=True),
        Quirks(only_protobuf=True),
        Quirks(not_yet=(EMPTY,)),
        Quirks(wrapped=True, results_in_json=True),
        Quirks(restores_at_once=False),
        Quirks(lacks={"client/config", "unload_model", "finish", "samplers"}),
    ],
    ids=["at once", "numbers", "json", "protobuf", "not yet", "wrapped", "older", "little"],
)
def test_checks_accept_every_variant_of_the_protocol(quirks):
    """A check must not fail because of a variation that it does not examine."""
    for name in ("gradient of twice", "brings the weights back", "frozen"):
        assert "pass" == outcome(quirks, name).outcome


# Output.


def test_the_table_ends_in_a_summary_and_the_status_in_1(capsys):
    with OddServer(Quirks(metrics="none")) as server:
        status = cli.main(["conformance", server.url, "--write", "--only", "loss"])

    out = capsys.readouterr().out
    assert 1 == status
    assert out.startswith("fail         loss:sum is there, and is the sum: the metrics are empty\n")
    assert "             loss:sum is -sum(weight * logprob) over tokens and datums;" in out
    assert "not offered  a loss of twice the weights is twice the loss: no loss:sum\n" in out
    assert out.endswith("\n\n0 passed, 1 failed, 1 not offered.\n")


def test_without_write_nothing_is_created_on_the_server(capsys):
    with OddServer() as server:
        cli.main(["conformance", server.url])

    made = {name for name in server.seen if name.startswith(("create", "save", "optim"))}
    assert set() == made
    assert "healthz" in capsys.readouterr().out


def test_what_was_created_is_deleted():
    with OddServer() as server:
        list(conformance.check(server.url, write=True, only=["brings the weights back"]))

    deleted = [h for name, h in server.headers if name == "training_runs"]
    assert 1 == len(deleted)
    assert 2 == server.seen["unload_model"]
    assert 1 == server.seen["finish"]


def test_an_unreachable_server_is_an_error_and_no_list_of_failures(capsys):
    assert 1 == cli.main(["conformance", "http://127.0.0.1:9"])
    out, err = capsys.readouterr()
    assert "" == out
    assert "http://127.0.0.1:9/api/v1/client/config: connection refused" in err


def test_a_name_that_no_check_has_is_an_error(capsys):
    with OddServer() as server:
        assert 1 == cli.main(["conformance", server.url, "--only", "nonsense"])
    assert "no check has a name that contains nonsense" in capsys.readouterr().err


def test_a_check_that_raises_is_a_failure_with_its_reason():
    """One mistake in a check must not end the run."""
    result = try_out(Check("odd", "a rule", lambda lab: {}["nothing"]), None)

    assert ("fail", "the check raised KeyError: 'nothing'") == (result.outcome, result.reason)


def test_every_check_has_a_rule_and_a_unique_name():
    names = [check.name for check in conformance.CHECKS]

    assert len(names) == len(set(names))
    assert all(len(check.about) > 30 for check in conformance.CHECKS)


def test_the_page_shows_every_check():
    """In the same order, in the output of a run on our own server."""
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    shown = [line[13:] for line in page.splitlines() if line.startswith("pass         ")]

    assert len(conformance.CHECKS) == len(shown)
    for check, line in zip(conformance.CHECKS, shown):
        assert line == check.name or line.startswith(f"{check.name}:")


# The client of the checks.


def answer(status, payload=None, content=None, **headers):
    body = content if content is not None else json.dumps(payload).encode()
    return Answer(status, headers, body, "http://x/api/v1/y")


@pytest.mark.parametrize(
    "given, expected",
    [
        (answer(408, None, b""), True),
        (answer(200, {"type": "try_again"}), True),
        (answer(200, {"status": "pending"}), True),
        (answer(429, {"detail": "slow down"}), True),
        (answer(200, {"path": "tinker://a/weights/b"}), False),
        (answer(400, {"detail": "no"}), False),
    ],
)
def test_not_yet_is_recognized_in_every_form(given, expected):
    assert expected == is_not_yet(given)


@pytest.mark.parametrize(
    "given, expected",
    [
        (answer(404, {"detail": "Not Found"}), True),
        (answer(404, None, b""), True),
        (answer(405, {"detail": "Method Not Allowed"}), True),
        (answer(404, {"error": "this server does not offer billing. It costs nothing."}), True),
        (answer(404, {"detail": "Model not found"}), False),
        (answer(400, {"detail": "Not Found"}), False),
    ],
)
def test_a_missing_endpoint_differs_from_a_missing_object(given, expected):
    assert expected == is_missing(given)


def test_the_zstd_frames_are_zstd():
    """Written without a library, so that the checks need none."""
    body = bytes(range(256)) * 2000

    assert body == zstandard.ZstdDecompressor().decompressobj().decompress(zstd_frame(body))
    bomb = zstandard.ZstdDecompressor().decompressobj().decompress(zstd_bomb(3))
    assert b"\0" * (3 << 20) == bomb
    assert len(zstd_bomb(2048)) < 100_000


def test_requests_of_the_checks_follow_the_protocol():
    """The checks number requests themselves, but send the same fields as the SDK."""
    with OddServer() as server:
        list(conformance.check(server.url, write=True, only=["clears the gradients"]))

    [batch] = {type(body) for name, body in server.bodies if name == "forward_backward"}
    step = next(body for name, body in server.bodies if name == "optim_step")
    assert types.ForwardBackwardRequest is batch
    assert types.OptimStepRequest is type(wire.from_json(types.OptimStepRequest, step))
    assert "optim_step" == step["type"]
