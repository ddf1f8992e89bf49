"""Runs checks, which are functions with the rule as docstring, and formats their results.

Does not know about servers.
"""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import attrs

from tinkex.conformance.client import Broken, NotOffered
from tinkex.conformance.context import Context
from tinkex.errors import TinkexError

Outcome = Literal["pass", "fail", "not offered"]

#: A check returns a short text about its result, or None.
Function = Callable[[Context], "str | None"]


@attrs.frozen
class Check:
    """One rule.

    Attributes:
        name: a few words.
        about: the rule, and which server breaks it.
        writes: True if it creates sessions, models or checkpoints on the server.
        aside: True if it is slow and may run on a separate thread.
    """

    name: str
    about: str
    function: Function
    writes: bool = True
    aside: bool = False


@attrs.frozen
class Result:
    """The result of a check; `reason` is why it failed, or details of the result."""

    name: str
    outcome: Outcome
    reason: str
    seconds: float
    about: str


class Checks(list[Check]):
    """The checks of a module, in the order of their definition."""

    def rule(
        self, name: str, *, writes: bool = True, aside: bool = False
    ) -> Callable[[Function], Function]:
        """Add the decorated function; its docstring is the rule."""

        def add(function: Function) -> Function:
            about = " ".join(textwrap.dedent(function.__doc__ or "").split())
            self.append(Check(name, about, function, writes, aside))
            return function

        return add


def run(checks: Sequence[Check], ctx: Context) -> Iterator[Result]:
    """Yield the results in the order of *checks*, each as soon as it is known."""
    aside = {check.name: _Aside(check, ctx) for check in checks if check.aside}
    for check in checks:
        yield aside[check.name].result() if check.aside else try_out(check, ctx)


def try_out(check: Check, ctx: Context) -> Result:
    """Run one check. Any exception becomes a failure with its reason."""
    started = time.monotonic()
    outcome: Outcome = "pass"
    try:
        reason = check.function(ctx) or ""
    except NotOffered as exc:
        outcome, reason = "not offered", str(exc)
    except (Broken, TinkexError) as exc:
        outcome, reason = "fail", str(exc)
    except Exception as exc:  # an error in a check must not end the run
        outcome, reason = "fail", f"the check raised {type(exc).__name__}: {exc}"
    seconds = round(time.monotonic() - started, 3)
    return Result(check.name, outcome, " ".join(reason.split()), seconds, check.about)


class _Aside:
    """A check on a separate thread."""

    def __init__(self, check: Check, ctx: Context) -> None:
        self._results: list[Result] = []
        self._thread = threading.Thread(
            target=lambda: self._results.append(try_out(check, ctx)),
            name="tinkex-conformance",
            daemon=True,
        )
        self._thread.start()

    def result(self) -> Result:
        self._thread.join()
        return self._results[0]


# --- formatting ---------------------------------------------------------------------------------


#: Width of the outcome column, and of a line.
MARGIN, _WIDTH = 13, 100


def line(result: Result) -> str:
    """Format one result for a terminal; a failure includes the rule."""
    paragraphs = [f"{result.name}: {result.reason}" if result.reason else result.name]
    if result.outcome == "fail":
        paragraphs.append(result.about)
    space = " " * MARGIN
    filled = [
        textwrap.fill(
            paragraph,
            _WIDTH,
            initial_indent=space,
            subsequent_indent=space,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for paragraph in paragraphs
    ]
    return result.outcome.ljust(MARGIN) + "\n".join(filled)[MARGIN:]


def summary(results: Iterable[Result]) -> str:
    """The number of results of each outcome, as text."""
    outcomes = [result.outcome for result in results]
    passed, failed = outcomes.count("pass"), outcomes.count("fail")
    return f"{passed} passed, {failed} failed, {outcomes.count('not offered')} not offered"


def as_json(url: str, results: Sequence[Result]) -> str:
    """All results as JSON."""
    payload = {
        "url": url,
        "ok": all(result.outcome != "fail" for result in results),
        "checks": [attrs.asdict(result) for result in results],
    }
    return json.dumps(payload, indent=2, ensure_ascii=False)
