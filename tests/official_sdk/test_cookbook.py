"""Recipes of tinker-cookbook with tinkex in place of the official SDK (`make cookbook`: all)."""

from __future__ import annotations

import pytest

from tests.official_sdk import cookbook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url():
    with cookbook.server() as address:
        yield address


@pytest.mark.parametrize(
    "row", cookbook.ROWS, ids=lambda row: f"{row.recipe} {row.arguments}".strip()
)
def test_a_recipe_runs_on_tinkex(row, url):
    """To its end, or to the refusal of what the server does not offer."""
    good, end, _ = cookbook.run("tinkex", row, url)

    assert good, end
