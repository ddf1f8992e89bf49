"""Answers that a repeat of a request gets again; over HTTP: test_idempotency.py."""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from tinkex.server import replies
from tinkex.server.replies import Replies


async def _body():
    return b"body"


def _making(log, status=200):
    async def make():
        log.append(status)
        return Response(status_code=status)

    return make


def test_a_request_that_failed_is_tried_again():
    """It has done nothing; only the success is kept."""
    log = []

    async def run():
        kept = Replies()
        answers = [await kept.once("k", _making(log, status), _body) for status in (503, 200, 201)]
        return [answer.status_code for answer in answers]

    assert [503, 200, 200] == asyncio.run(run())
    assert [503, 200] == log


def test_of_too_many_answers_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(replies, "MOST", 2)
    log = []

    async def run():
        kept = Replies()
        for key in ("a", "b", "c", "c", "b", "a"):
            await kept.once(key, _making(log), _body)

    asyncio.run(run())

    assert 4 == len(log)  # "a" was done again
