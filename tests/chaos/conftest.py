"""What the tests of reliability share: how much to do, and where to write what was found.

`make test` runs one seed and few kills, `make test-slow` more seeds. `make chaos` sets SEEDS,
SERVER_KILLS and CLIENT_KILLS for still more, and CHAOS_REPORT, the file from which summary.py makes
its table.
"""

from __future__ import annotations

import json
import os

import pytest

from tinkex.runtime import retry

SEEDS = int(os.environ.get("SEEDS", "3"))
SERVER_KILLS = int(os.environ.get("SERVER_KILLS", "4"))
CLIENT_KILLS = int(os.environ.get("CLIENT_KILLS", "2"))


@pytest.fixture
def report():
    """Writes down facts of one test."""

    def write(kind, **facts):
        path = os.environ.get("CHAOS_REPORT")
        if path:
            with open(path, "a", encoding="utf-8") as file:
                print(json.dumps({"kind": kind, **facts}), file=file)

    return write


@pytest.fixture
def quick_retries(monkeypatch):
    """Pauses between two tries are a fifth of what they are, so that a run takes seconds."""
    usual = retry.Retry.wait.fget
    quick = property(lambda policy: lambda state: usual(policy)(state) / 5)
    monkeypatch.setattr(retry.Retry, "wait", quick)
