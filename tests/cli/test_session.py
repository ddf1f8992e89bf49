"""`tinkex session`: what the list shows of each, and what is known of one."""

from __future__ import annotations

import json


def test_session_list_shows_runs_samplers_and_metadata(run, storage):
    storage.add_session("s1", training_run_ids=["a", "b"], user_metadata={"team": "red"})
    storage.add_session("s2", display_name="trial")
    _, out, _ = run("session", "list")
    values = json.loads(run("session", "list", "-f", "json")[1])

    assert ["s1", "2", "0", "team=red"] == out.splitlines()[1].split()
    assert ["s2", "0", "0", "trial"] == out.splitlines()[2].split()
    assert ["s1", "s2"] == [one["session_id"] for one in values["sessions"]]


def test_session_list_works_with_ids_alone(run, storage, server):
    """If a server offers no more, or a session has just ended."""
    storage.add_session("s1")
    server.lacks.add("sessions/s1")

    assert {"sessions": [{"session_id": "s1"}], "more": False} == json.loads(
        run("session", "list", "-f", "json")[1]
    )
    assert 0 == run("session", "list")[0]


def test_session_info(run, storage):
    storage.add_session("s1", training_run_ids=["r1"], sampler_ids=["p1"], display_name="trial")

    assert (
        "Session  s1\nName     trial\nRun      r1\nSampler  p1\n" == run("session", "info", "s1")[1]
    )
