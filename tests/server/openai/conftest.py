"""One server on the real engine, and the clients of other companies that talk to it."""

from __future__ import annotations

import openai
import pytest

from tests.support.poem import train_poem
from tinkex.server.app import LocalServer


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with LocalServer(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tuned(server):
    """A checkpoint that knows the poem by heart, as (tinker path, its run's id)."""
    return train_poem(server.url)
