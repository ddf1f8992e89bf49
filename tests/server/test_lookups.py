"""What the client asks a real server about what is stored there, beside runs and checkpoints."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

import tinkex
from tinkex import errors, types


@pytest.fixture
def url(serve):
    return serve().server.url


@pytest.fixture
def rest(url):
    with tinkex.RestClient(url, "tml-any") as client:
        yield client


def test_a_search_gives_every_session_once_page_by_page(url, rest):
    """Newest first; the cursor is text, as other clients send it back."""
    made = []
    for number in range(5):
        service = tinkex.ServiceClient(
            {"number": number % 2}, base_url=url, api_key="tml-any", display_name=f"Run {number}"
        )
        made.append(service.session_id)
        service.close("errored" if number == 0 else "success")
    found, cursor = [], None
    while True:
        page = rest.search_sessions(types.SessionSearchRequest(limit=2, cursor=cursor)).result()
        found += page.sessions
        cursor = page.next_cursor
        if cursor is None:
            break

    assert made[::-1] == [session.session_id for session in found]
    odd = rest.search_sessions(types.SessionSearchRequest(user_metadata={"number": 1}))
    assert [made[3], made[1]] == [session.session_id for session in odd.sessions]
    named = rest.search_sessions(types.SessionSearchRequest(display_name="3 run"))
    assert [made[3]] == [session.session_id for session in named.sessions]
    statuses = [{"type": "active"}]
    assert [] == rest.search_sessions(types.SessionSearchRequest(statuses=statuses)).sessions
    assert "client_finished" == found[0].status["type"]
    with pytest.raises(TypeError, match="SessionSearchRequest"):
        rest.search_sessions({"limit": 2})


@pytest.mark.parametrize(
    "cursor", [{}, {"last_created_at": "yesterday", "last_session_id": "x"}, {"last_created_at": 5}]
)
def test_a_cursor_of_somebody_s_own_is_refused(rest, cursor):
    with pytest.raises(errors.BadRequestError, match="cursor must be one that this server"):
        rest.search_sessions(types.SessionSearchRequest(cursor=cursor))


def test_training_runs_are_those_of_a_project(url, rest):
    with tinkex.ServiceClient(url, "tml-any") as service:
        service.create_lora_training_client("tiny")
        assert rest.assign_session_project(service.session_id, "project-1").result() is None
    with tinkex.ServiceClient(url, "tml-any", project_id="project-2") as service:
        other = service.create_lora_training_client("tiny").model_id

    assert 2 == len(rest.list_training_runs().training_runs)
    page = rest.list_training_runs(project_id="project-2").result()
    assert ([other], 1) == (
        [r.training_run_id for r in page.training_runs],
        page.cursor.total_count,
    )
    assert [] == rest.list_training_runs(project_id="none").training_runs


def test_a_copy_is_a_checkpoint_of_its_own(url, rest):
    with tinkex.ServiceClient(url, "tml-any") as service:
        path = service.create_lora_training_client("tiny").save_state("a").result().path
        copy = service.copy_weights(path, ttl_seconds=3600).result()
        second = rest.copy_weights(path, "project").result()
        third = asyncio.run(rest.copy_weights_async(path))
        rest.delete_checkpoint_from_tinker_path(path)
        listed = {c.tinker_path: c for c in rest.iter_user_checkpoints()}

        assert {copy, second, third} == set(listed)
        assert "tiny" == listed[copy].base_model
        assert listed[copy].expires_at
        assert service.create_training_client_from_state(copy).get_info().base_model == "tiny"


def test_both_forms_of_the_archive_url(url, rest):
    with tinkex.ServiceClient(url, "tml-any") as service:
        path = service.create_lora_training_client("tiny").save_state("a").result().path
        run = types.ParsedCheckpointTinkerPath.from_tinker_path(path).training_run_id
        answers = [
            rest.get_checkpoint_archive_url(run, "weights/a"),
            rest.get_checkpoint_archive_url_from_tinker_path(path).result(),
            rest.get_checkpoint_archive_url(path),
            asyncio.run(rest.get_checkpoint_archive_url_async(run, "weights/a")),
        ]

    assert [True] * 4 == ["weights-a.tar" in answer.url for answer in answers]


def test_every_lookup_can_be_awaited(url, rest):
    async def awaited():
        return await asyncio.gather(
            rest.list_training_runs_async(),
            rest.list_user_checkpoints_async(),
            rest.list_sessions_async(),
        )

    runs, checkpoints, sessions = asyncio.run(awaited())
    assert ([], [], []) == (runs.training_runs, checkpoints.checkpoints, sessions.sessions)


def test_who_a_key_belongs_to(rest):
    owner = rest.whoami().result()

    assert ("local", "tinkex") == (owner.email, owner.organization)


def test_the_time_after_which_a_silent_session_ends_is_an_option(tmp_path):
    """The help names the option; a wrong value is one sentence."""
    command = [sys.executable, "-m", "tinkex", "serve", "--home", str(tmp_path)]
    done = subprocess.run(
        [*command, "--session-timeout", "0"], capture_output=True, text=True, timeout=60
    )

    assert 2 == done.returncode
    assert "'--session-timeout': 0.0 is not in the range x>=1" in done.stderr
