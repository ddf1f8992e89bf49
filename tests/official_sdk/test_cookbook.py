"""Recipes of tinker-cookbook with tinkex in place of the official SDK (`make cookbook`: all)."""

from __future__ import annotations

import pytest

from tests.official_sdk import cookbook

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url():
    with cookbook.server() as address:
        yield address


#: One recipe of each kind; `make cookbook` runs the others, too, and one on a real model.
KINDS = ("sl_loop", "rl_loop", "rl_basic", "math_rl", "preference.dpo", "weights_download")
ROWS = [row for row in cookbook.ROWS if row.recipe in KINDS and row.model == "tiny"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.recipe} {row.arguments}".strip())
def test_a_recipe_runs_on_tinkex(row, url):
    """To its end, or to the refusal of what the server does not offer."""
    good, end, _ = cookbook.run("tinkex", row, url)

    assert good, end
