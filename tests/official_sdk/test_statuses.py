"""The table of statuses: each request is sent, and each difference from TuFT has its reason."""

from __future__ import annotations

import pytest

from tests.official_sdk import page, statuses
from tests.server.conftest import QUICK, Served
from tinkex.server.auth import Keys

#: After these the official SDK, of any version, sends the request again, for minutes.
RETRIED = {408, 409, 429, *range(500, 600)}


@pytest.fixture
def world(tmp_path):
    served = Served(
        tmp_path / "home",
        limits=QUICK,
        keys=lambda home: Keys.of_users(["alice-key", "bob-key"], home.secret()),
    )
    client = served.client_with("alice-key")
    session = client.session()
    yield statuses.World(
        client,
        served.client_with("bob-key"),
        served.client_with("carol-key"),
        served.client,
        session,
        client.model(session),
        QUICK.decoded_bytes,
    )
    served.close()


@pytest.mark.parametrize("row", statuses.ROWS, ids=lambda row: row.what)
def test_our_status_is_that_of_the_table(world, row):
    answer = row.send(world)

    assert row.ours == answer.status_code, answer.text
    assert row.ours not in RETRIED
    if row.ours >= 400 or "result of" in row.what:
        assert {"error", "category"} <= set(answer.json())


def test_every_difference_has_its_reason_and_nothing_else_has():
    assert [] == [row.what for row in statuses.ROWS if (row.tuft == row.ours) == bool(row.why)]


def test_the_page_has_the_table():
    """`python -m tests.official_sdk.statuses` writes it."""
    assert statuses.section() == page.part("statuses")
