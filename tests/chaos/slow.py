"""The server on the fake engine, with a token that it never has done with: it is for waiting.

python -m tests.chaos.slow --port PORT --home HOME
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.support.fake_engine import FakeEngine

#: A batch with this target, or a sample of this prompt, is never done.
NEVER = 99


class Slow(FakeEngine):
    def forward_backward(self, model_id, data, *args, **kwargs):
        while any(NEVER in datum.loss_fn_inputs["target_tokens"].to_numpy() for datum in data):
            time.sleep(0.002)
            yield
        return (yield from super().forward_backward(model_id, data, *args, **kwargs))

    def submit_sample(self, ticket, sampler_id, request, **kwargs):
        if NEVER not in request.prompt.tokens:
            super().submit_sample(ticket, sampler_id, request, **kwargs)


def main():
    from tinkex.server import app
    from tinkex.server.limits import Limits

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--home", type=Path)
    given = parser.parse_args()
    limits = Limits(poll_seconds=0.5)  # shorter than the polls of an impatient client
    sys.exit(app.main(port=given.port, home=given.home, engine=Slow, limits=limits))


if __name__ == "__main__":
    main()
