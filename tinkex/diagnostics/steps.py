"""Steps of a diagnosis: each has a time limit and ends in a finding.

Does not know what a step examines or how findings are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any, Literal

import attrs

from tinkex import errors
from tinkex.runtime.executor import on_daemon_thread

Status = Literal["ok", "warning", "failed", "skipped"]


@attrs.frozen
class Limits:
    """Time limits in seconds.

    Attributes:
        connect: of a connection.
        answer: of a request.
        step: of a step.
        engine: of starting the embedded engine, which imports torch.
    """

    connect: float = 3.0
    answer: float = 5.0
    step: float = 20.0
    engine: float = 90.0


@attrs.frozen
class Finding:
    """The result of one step.

    Attributes:
        step: name of the step.
        status: "failed" means that later steps make no sense; "skipped" that they were not run.
        text: what was found.
        advice: what to do about it; "" if there is nothing to do.
        details: the same for programs.
    """

    step: str
    status: Status
    text: str
    advice: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)


class Failed(Exception):
    """Raised in a step that the following steps depend on."""

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.text, self.advice = text, advice


@attrs.frozen
class Step:
    """One thing to examine: `function` returns a finding within `limit` seconds."""

    name: str
    limit: float
    function: Callable[[], Finding]


def run(steps: list[Step]) -> Iterator[Finding]:
    """Run *steps* until one fails; then yield one finding that names the steps not run."""
    for number, step in enumerate(steps):
        finding = _finding(step)
        yield finding
        if finding.status == "failed":
            left = ", ".join(one.name for one in steps[number + 1 :])
            if left:
                yield Finding("not run", "skipped", left)
            break


def _finding(step: Step) -> Finding:
    future = on_daemon_thread(step.function, "tinkex-doctor")
    if not wait([future], step.limit).done:
        advice = "The machine or the network may be overloaded; try again, or ask the operator."
        return Finding(step.name, "failed", f"not finished within {step.limit:.0f} s", advice)
    try:
        found: Finding = future.result()
        return found
    except Failed as exc:
        return Finding(step.name, "failed", exc.text, exc.advice)
    except (errors.TinkexError, OSError, ValueError) as exc:
        return Finding(step.name, "failed", str(exc))
