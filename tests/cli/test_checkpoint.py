"""`tinkex checkpoint`: which checkpoints are selected, the question before, the output after."""

from __future__ import annotations

import io
import json
from datetime import datetime, timezone

import pytest

from tests.support.fake_server import no_connection
from tests.support.storage import Storage
from tinkex import cli
from tinkex.cli.selection import matches

A, B, C = "tinker://r1/weights/step-1", "tinker://r1/weights/step-2", "tinker://r2/weights/last"
S = "tinker://r1/sampler_weights/final"


@pytest.fixture
def storage(server):
    """Four checkpoints, the newest first."""
    storage = Storage(server)
    for hours, path in enumerate([S, C, B, A]):
        storage.add(path, hours=hours * 24 + 0.5)
    return storage


@pytest.fixture
def run(capsys, monkeypatch):
    """`tinkex checkpoint ...` with an answer typed, if one is given: status, stdout, stderr."""

    def run(*arguments, answer=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        status = cli.main(["checkpoint", *arguments])
        return status, *capsys.readouterr()

    return run


def changes(server):
    """What was changed on the server: (method, path)."""
    return [
        (seen.method, seen.path)
        for seen in server.requests
        if seen.method in ("DELETE", "PUT") or seen.path.endswith("publish")
    ]


# Which


@pytest.mark.parametrize(
    "pattern, fits",
    [
        (A, True),
        ("tinker://*", True),
        ("tinker://r1/*", True),
        ("tinker://*/weights/step-?", True),
        ("tinker://r2/*", False),
        ("step-1", True),
        ("step-*", True),
        ("weights/step-[12]", True),
        ("r1/weights/*", True),
        ("*", True),
        ("tep-1", False),
        ("r1/*", False),
        ("sampler_weights/*", False),
        ("x/r1/weights/step-1", False),
        ("STEP-1", False),
    ],
)
def test_a_pattern_is_of_the_whole_path_or_of_its_last_segments(pattern, fits):
    """Without tinker:// a * stops at a slash, so that what a name looks like decides, and a run
    called step-9 does not lose all that it has."""
    assert fits == matches(A, pattern)


def test_list_lists_all(run, storage):
    status, out, err = run("list")

    assert 0 == status
    assert [S, C, B, A] == [line.split()[0] for line in out.splitlines()[1:]]
    assert "2.0 KB" in out
    assert "3 days ago" in out
    assert "" == err


def test_list_says_that_there_is_more(run, storage):
    assert (0, "Only the newest 2 checkpoints are shown; --limit 0 lists all.\n") == run(
        "list", "--limit", "2"
    )[::2]
    assert 5 == len(run("list", "--limit", "0")[1].splitlines())


@pytest.mark.parametrize(
    "arguments, paths",
    [
        (["step-*"], [B, A]),
        (["step-1", "last"], [C, A]),
        (["--older-than", "2d"], [B, A]),
        (["--older-than", "36h", "tinker://r2/*"], []),
        (["--type", "sampler"], [S]),
        (["--run-id", "r1", "--type", "training"], [B, A]),
    ],
)
def test_list_takes_patterns_and_conditions(run, storage, arguments, paths):
    """Those of delete, so that it shows what delete would take."""
    found = json.loads(run("list", *arguments, "-f", "json")[1])

    assert paths == [checkpoint["tinker_path"] for checkpoint in found["checkpoints"]]


def test_json_keeps_iso_times_and_bytes(run, storage):
    _, out, err = run("list", "--format", "json", "--limit", "1")
    answer = json.loads(out)
    [checkpoint] = answer["checkpoints"]

    assert answer["more"] is True
    assert 2048 == checkpoint["size_bytes"]
    assert datetime.fromisoformat(checkpoint["time"].replace("Z", "+00:00")) < datetime.now(
        timezone.utc
    )
    assert "" == err


def test_nothing_is_said_to_be_nothing(run, server):
    """On stderr: stdout is for results."""
    Storage(server)

    assert (0, "", "No checkpoints found.\n") == run("list")
    assert {"checkpoints": [], "more": False} == json.loads(run("list", "-f", "json")[1])


# One


def test_info_shows_entry_and_weights_together(run, storage):
    status, out, _ = run("info", S)
    values = json.loads(run("info", S, "-f", "json")[1])

    assert 0 == status
    assert "Base model  tiny" in out
    assert "Train mlp   yes" in out
    assert (S, 8, 2048) == (values["tinker_path"], values["lora_rank"], values["size_bytes"])


@pytest.mark.parametrize("lacks", ["weights_info", "training_runs/r1/checkpoints"])
def test_info_says_what_a_server_lets_it_know(run, storage, server, lacks):
    """Open servers offer one of the two."""
    server.lacks.add(lacks)

    assert 0 == run("info", S)[0]


def test_info_of_nothing(run, storage):
    assert (1, "") == run("info", "tinker://r1/weights/none")[:2]
    assert (1, "") == run("info", "r1/weights/none")[:2]


# Delete


def test_delete_asks_once_with_all_names(run, storage, server):
    status, out, err = run("delete", "step-*", answer="y\n")

    assert 0 == status
    assert err.endswith("Delete 2 checkpoints (4.0 KB)? [y/N] ")
    assert all(path in err for path in (A, B))
    assert f"Deleted {B}\nDeleted {A}\n" == out
    assert [S, C] == list(storage.checkpoints)


@pytest.mark.parametrize("answer", ["n\n", "\n", "", "yep\n"])
def test_anything_but_yes_is_no(run, storage, server, answer):
    """And no answer (a pipe, a cron job) is none."""
    status, out, err = run("delete", A, answer=answer)

    assert (1, "") == (status, out)
    assert err.endswith("Nothing was changed.\n")
    assert ("give --yes to confirm" in err) == (answer == "")
    assert [] == changes(server)


def test_ctrl_c_at_the_question_deletes_nothing_and_exits_130(run, storage, server, monkeypatch):
    class Terminal:
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(io, "StringIO", lambda answer: Terminal())

    assert (130, "") == run("delete", A)[:2]
    assert [] == changes(server)


def test_yes_asks_nothing(run, storage, server):
    assert (0, f"Deleted {A}\n", "") == run("delete", A, "--yes")
    assert [("DELETE", "training_runs/r1/checkpoints/weights/step-1")] == changes(server)


def test_delete_by_age(run, storage):
    """What cron runs; when nothing is old enough, all is well."""
    assert 0 == run("delete", "--older-than", "36h", "--yes")[0]
    assert [S, C] == list(storage.checkpoints)
    status, out, err = run("delete", "--older-than", "36h", "--yes")

    assert (0, "", "No checkpoint matches.\n") == (status, out, err)


def test_delete_says_which_failed_and_goes_on(run, storage):
    """Exit status 1, and stdout still JSON alone."""
    gone = "tinker://r1/weights/gone"
    storage.add(gone)
    del storage.checkpoints[gone]
    status, out, err = run("delete", gone, A, "--yes", "-f", "json")
    answer = json.loads(out)

    assert 1 == status
    assert [A] == answer["done"]
    assert [{"tinker_path": gone, "error": "there is no such checkpoint."}] == answer["failures"]
    assert f"error: {gone}: there is no such checkpoint.\n" == err


def test_when_the_server_goes_away_what_was_done_is_said(run, storage, server, monkeypatch):
    monkeypatch.setattr("tinkex.cli.listing.NO_ANSWER", 0.1)
    server.always("training_runs/r1/checkpoints/weights/step-2", no_connection())
    status, out, err = run("delete", A, B, "--yes")

    assert (1, f"Deleted {A}\n") == (status, out)
    assert "no connection" in err


def test_a_name_that_fits_nothing_is_a_failure(run, storage):
    """A mistyped name must not look like success."""
    assert (1, "", "No checkpoint matches.\n") == run("delete", "sTep-*", "--yes")


@pytest.mark.parametrize("bad", ["tinker://r1", "tinker://r1/pictures/x", "tinker://r1/../x"])
def test_a_path_that_is_none_is_refused_before_anything_is_deleted(run, storage, server, bad):
    assert 1 == run("delete", A, bad, "--yes")[0]
    assert [] == changes(server)


def test_delete_wants_to_know_which(run, server):
    """Never everything by default; and not after asking a server."""
    status, out, err = run("delete")

    assert (2, "") == (status, out)
    assert "Give a PATH, --run-id" in err
    assert [] == server.requests


# The others


def test_publish_and_unpublish(run, storage):
    """One path by its name is what it says: no question."""
    assert (0, f"Published {A}\n", "") == run("publish", A)
    assert storage.checkpoints[A]["public"]
    assert (0, f"Unpublished {A}\n", "") == run("unpublish", A)
    assert not storage.checkpoints[A]["public"]


def test_publishing_by_a_pattern_asks(run, storage):
    """It may be more than was meant."""
    assert 1 == run("publish", "*", answer="n\n")[0]
    status, _, err = run("publish", "step-?", answer="yes\n")

    assert 0 == status
    assert "Publish 2 checkpoints (4.0 KB)? [y/N]" in err
    assert [B, A] == [path for path, entry in storage.checkpoints.items() if entry["public"]]


def test_set_ttl(run, storage):
    assert f"Expires in 30 days: {A}\n" == run("set-ttl", A, "--ttl", "30d")[1]
    assert {"ttl_seconds": 30 * 86400} == storage.checkpoints[A]["ttl"]
    assert f"Expires never: {A}\n" == run("set-ttl", A, "--remove")[1]
    assert {"ttl_seconds": None} == storage.checkpoints[A]["ttl"]


@pytest.mark.parametrize("options", [[], ["--ttl", "1d", "--remove"], ["--ttl", "0"]])
def test_set_ttl_wants_one_of_two(run, server, options):
    assert 2 == run("set-ttl", A, *options)[0]
    assert [] == server.requests


@pytest.mark.parametrize(
    "arguments, path",
    [
        (["list"], "checkpoints"),
        (["publish", A], "training_runs/r1/checkpoints/weights/step-1/publish"),
        (["delete", A, B, "--yes"], "training_runs/r1/checkpoints/weights/step-1"),
    ],
)
def test_what_a_server_does_not_offer_is_named(run, storage, server, arguments, path):
    """Once: it does not offer it for the others either."""
    server.lacks.add(path)
    status, _, err = run(*arguments)

    assert 1 == status
    assert 1 == err.count("this server does not offer")
