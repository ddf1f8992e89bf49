"""Canned HTTP responses, by the package responses, for tests that need no server."""

from __future__ import annotations

import json

import responses

from tests.support.fake_server import URL, Clock, settings
from tinkex.runtime.transport import Transport

API = f"{URL}/api/v1/"
HEALTHZ = f"{API}healthz"


def reply(code=200, body=None, **headers):
    """A response; the body is JSON, or raw bytes (HTML if no Content-Type is given)."""
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    usual = "text/html" if isinstance(body, bytes) else "application/json"
    kind = named.pop("Content-Type", usual)
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
    return {"status": code, "body": content, "headers": named, "content_type": kind}


OK = reply(200, {"status": "ok"})


class Canned(responses.RequestsMock):
    """Answers all HTTP requests of a with block with given responses; `calls` has the requests.

    A request gets its responses in the given order, and then the last one repeatedly. An unused
    response fails the test.
    """

    def __init__(self):
        super().__init__()
        self.clock = Clock()

    def give(self, *answers, to="healthz", method="GET"):
        for answer in answers:
            self.add(method, API + to, **answer)

    def transport(self, **options):
        """A transport on the clock `clock`, whose server has answered before."""
        clock = self.clock
        made = Transport(settings(**options), sleep=clock.sleep, clock=clock)
        made.established = True
        return made

    @property
    def sent(self):
        """The requests, in order."""
        return [call.request for call in self.calls]
