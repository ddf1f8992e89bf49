"""The server on the real engine, which writes down each call: one JSON a line.

python -m tests.chaos.recorder --port PORT --home HOME --record FILE [--limits JSON]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tinkex.server.results import fingerprint


def recording_engine(path):
    from tinkex.engine.engine import Engine

    def note(*what):
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(what), file=file)

    class Recording(Engine):
        def create_model(self, model_id, *args, **kwargs):
            note("create", model_id)
            return super().create_model(model_id, *args, **kwargs)

        def forward_backward(self, model_id, data, *args, forward_only=False, **kwargs):
            note("forward" if forward_only else "forward_backward", model_id, digest(data))
            return super().forward_backward(
                model_id, data, *args, forward_only=forward_only, **kwargs
            )

        def optim_step(self, model_id, params):
            note("optim_step", model_id, digest(params))
            return super().optim_step(model_id, params)

        def save(self, model_id, directory, *, optimizer):
            note("save", model_id, optimizer)
            return super().save(model_id, directory, optimizer=optimizer)

        def load(self, model_id, directory, *, optimizer):
            note("load", model_id, directory.name, optimizer)
            return super().load(model_id, directory, optimizer=optimizer)

        def submit_sample(self, ticket, sampler_id, request, **kwargs):
            note("sample", ticket, digest(request.prompt))
            return super().submit_sample(ticket, sampler_id, request, **kwargs)

    return Recording()


def digest(value):
    return fingerprint(value).hex()


def main():
    from tinkex.server import app
    from tinkex.server.limits import Limits

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--limits", type=json.loads, default={})
    given = parser.parse_args()
    sys.exit(
        app.main(
            port=given.port,
            home=given.home,
            limits=Limits(**given.limits),
            engine=lambda: recording_engine(given.record),
        )
    )


if __name__ == "__main__":
    main()
