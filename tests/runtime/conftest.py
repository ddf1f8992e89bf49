"""Fixtures of more than one file."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.support.canned import Canned


@pytest.fixture
def canned():
    with Canned() as made:
        yield made


@pytest.fixture
def way(canned):
    """A transport whose server has answered before; its answers are canned."""
    with closing(canned.transport()) as made:
        yield made
