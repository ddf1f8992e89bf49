"""What a check is: a function with a rule for its docstring, and what comes out of it.

Knows nothing of servers.
"""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import attrs

from tinkex.conformance.asking import Broken, NotOffered
from tinkex.conformance.lab import Lab
from tinkex.errors import TinkexError

Outcome = Literal["pass", "fail", "not offered"]

#: A check returns what it saw, in a few words, or None.
Function = Callable[[Lab], "str | None"]


@attrs.frozen
class Check:
    """One rule.

    Attributes:
        name: a few words; about: what is checked, and which server breaks it.
        writes: whether it makes sessions, models or checkpoints on the server.
        aside: whether it waits for long, and may run beside the others.
    """

    name: str
    about: str
    function: Function
    writes: bool = True
    aside: bool = False


@attrs.frozen
class Result:
    """What came out of a check; `reason` is why, or what was seen."""

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


def run(checks: Sequence[Check], lab: Lab) -> Iterator[Result]:
    """The results, in the order of *checks*; each as soon as it is there."""
    aside = {check.name: _Aside(check, lab) for check in checks if check.aside}
    for check in checks:
        yield aside[check.name].result() if check.aside else try_out(check, lab)


def try_out(check: Check, lab: Lab) -> Result:
    """The result of one check. Whatever goes wrong is a failure with its reason."""
    started = time.monotonic()
    outcome: Outcome = "pass"
    try:
        reason = check.function(lab) or ""
    except NotOffered as exc:
        outcome, reason = "not offered", str(exc)
    except (Broken, TinkexError) as exc:
        outcome, reason = "fail", str(exc)
    except Exception as exc:  # a check must not end the run
        outcome, reason = "fail", f"the check broke off: {type(exc).__name__}: {exc}"
    seconds = round(time.monotonic() - started, 3)
    return Result(check.name, outcome, " ".join(reason.split()), seconds, check.about)


class _Aside:
    """A check on a thread of its own."""

    def __init__(self, check: Check, lab: Lab) -> None:
        self._results: list[Result] = []
        self._thread = threading.Thread(
            target=lambda: self._results.append(try_out(check, lab)),
            name="tinkex-conformance",
            daemon=True,
        )
        self._thread.start()

    def result(self) -> Result:
        self._thread.join()
        return self._results[0]


# --- showing ------------------------------------------------------------------------------------


#: Columns of the outcome, before the rest of a line; and of all.
MARGIN, _WIDTH = 13, 100


def line(result: Result) -> str:
    """One result for a terminal; under a failure, the rule."""
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
    """How many of each outcome."""
    outcomes = [result.outcome for result in results]
    passed, failed = outcomes.count("pass"), outcomes.count("fail")
    return f"{passed} passed, {failed} failed, {outcomes.count('not offered')} not offered"


def as_json(url: str, results: Sequence[Result]) -> str:
    """Everything, for programs."""
    payload = {
        "url": url,
        "ok": all(result.outcome != "fail" for result in results),
        "checks": [attrs.asdict(result) for result in results],
    }
    return json.dumps(payload, indent=2, ensure_ascii=False)
