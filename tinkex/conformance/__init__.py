"""Named checks of the Tinker API against any server: each a rule that some server breaks today.

    for result in conformance.check("http://127.0.0.1:8000", write=True): ...

`asking` is how a server is asked, `lab` what is made there, `checking` what a check is; the checks
are in the modules named after their subjects. Knows nothing of the SDK's clients, which would hide
what is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tinkex import config
from tinkex.conformance import general, learning, order, sampling, storing
from tinkex.conformance.asking import Asker
from tinkex.conformance.checking import MARGIN, Check, Result, as_json, line, run, summary
from tinkex.conformance.lab import Lab

#: Every check, in the order in which they are shown.
CHECKS: tuple[Check, ...] = (
    *general.CHECKS,
    *order.CHECKS,
    *learning.CHECKS,
    *sampling.CHECKS,
    *storing.CHECKS,
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
    """Run the checks against the server at *url*; the results, one by one.

    Args:
        other_api_key: of another user, for what users must not see of each other.
        base_model: to train; by default the first that the server names.
        write: also run the checks that make a session, models and checkpoints. They are removed
            again where the server lets us.
        restart: a shell command that restarts the server, and ends when it has begun to.
        only: parts of names; the checks whose name holds one of them.
        patience: seconds to wait for the result of one operation.

    Raises:
        ValueError, TinkexError: If the server cannot be reached at all.
    """
    chosen = [
        one
        for one in CHECKS
        if (write or not one.writes) and (not only or any(part in one.name for part in only))
    ]
    if not chosen:
        raise ValueError(f"no check has a name with {' or '.join(only)} in it.")
    quiet = config.Patience(report_after=1e6)
    asker = Asker(config.load(url, api_key, patience=quiet), patience)
    other = None
    if other_api_key is not None:
        other = Asker(config.load(url, other_api_key, patience=quiet), patience)
    lab = Lab(asker, other=other, base_model=base_model, restart=restart)
    try:
        yield from run(chosen, lab)
    finally:
        lab.close()


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
