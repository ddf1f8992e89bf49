"""Named checks of a server against the Tinker API; each tests a rule that some server violates.

    for result in conformance.check("http://127.0.0.1:8000", write=True): ...

`client` sends the requests, `context` creates models and samplers, `runner` runs the checks, which
are in the modules named after their subjects. The SDK's clients are not used, because they retry
and reorder, which would hide errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinkex import config
from tinkex.conformance import basics, checkpoints, ordering, sampling, training
from tinkex.conformance.client import Client
from tinkex.conformance.context import Context
from tinkex.conformance.runner import MARGIN, Check, Result, as_json, line, run, summary

#: All checks, in the order of the output.
CHECKS: tuple[Check, ...] = (
    *basics.CHECKS,
    *ordering.CHECKS,
    *training.CHECKS,
    *sampling.CHECKS,
    *checkpoints.CHECKS,
)

#: Seconds to wait for the result of one operation.
PATIENCE = 120.0


def check(
    url: str | None,
    api_key: str | None = None,
    *,
    other_api_key: str | None = None,
    base_model: str | None = None,
    write: bool = False,
    restart: str | None = None,
    only: Sequence[str] = (),
    patience: float = PATIENCE,
) -> Iterator[Result]:
    """Run the checks against the server at *url*, and yield the results one by one.

    Args:
        api_key: of the server; None for the one in the environment.
        other_api_key: of another user, to check that users cannot see each other's work.
        base_model: to train; by default the first one that the server lists.
        write: also run the checks that create a session, models and checkpoints. These are removed
            at the end, where the server allows it.
        restart: a shell command that restarts the server and exits once the restart has begun.
        only: run only the checks whose name contains one of these texts.
        patience: seconds to wait for the result of one operation.

    Raises:
        ValueError: If no check matches *only*, or *url* is not valid.
        TinkexError: If the server cannot be reached.
    """
    chosen = [
        one
        for one in CHECKS
        if (write or not one.writes) and (not only or any(part in one.name for part in only))
    ]
    if not chosen:
        raise ValueError(f"no check has a name that contains {' or '.join(only)}.")
    quiet = config.Patience(report_after=1e6)
    client = Client(config.load(url, api_key, patience=quiet), patience)
    other = None
    if other_api_key is not None:
        other = Client(config.load(url, other_api_key, patience=quiet), patience)
    ctx = Context(client, other=other, base_model=base_model, restart=restart)
    try:
        yield from run(chosen, ctx)
    finally:
        ctx.close()


__all__ = [
    "CHECKS",
    "MARGIN",
    "PATIENCE",
    "Check",
    "Result",
    "as_json",
    "check",
    "line",
    "summary",
]
