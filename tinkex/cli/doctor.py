"""`tinkex doctor`: run the steps of tinkex.diagnostics and print their findings."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.options import format_option, key_option

if TYPE_CHECKING:  # for annotations alone: neither numpy nor requests is loaded for --help
    from tinkex.diagnostics import Finding

_COLORS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": None}
_WIDTH = 100
_INDENT = 20
#: A method stays on the line of its path.
_METHOD = re.compile(r"\b(GET|PUT|POST|DELETE) ")


@click.command()
@click.argument("url", required=False)
@format_option
@key_option
def doctor(url: str | None, as_json: bool, api_key: str | None) -> int:
    """Say what works and what does not, here or at URL, and what to do.

    Without URL: with the server in TINKER_BASE_URL, or on this machine with the embedded engine.
    Takes each step from the name of the host to the models on offer, until one fails without which
    nothing works; the exit status is then 1. Changes nothing on the server.
    """
    from tinkex import diagnostics

    findings = []
    for finding in diagnostics.examine(url, api_key):
        findings.append(finding)
        if not as_json:
            formatting.say(_shown(finding))
    good = all(finding.status != "failed" for finding in findings)
    if as_json:
        formatting.say_json({"ok": good, "steps": [attrs.asdict(finding) for finding in findings]})
    return 0 if good else 1


def _shown(finding: Finding) -> str:
    margin = " " * _INDENT
    text = textwrap.fill(
        _METHOD.sub("\\1\N{NO-BREAK SPACE}", finding.text),
        _WIDTH,
        initial_indent=f"{finding.status:8} {finding.step:10} ",
        subsequent_indent=margin,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace("\N{NO-BREAK SPACE}", " ")
    color = _COLORS[finding.status]
    text = click.style(text[:8], fg=color, bold=finding.status == "failed") + text[8:]
    if finding.advice:
        text += "\n" + textwrap.fill(
            finding.advice, _WIDTH, initial_indent=f"{margin}-> ", subsequent_indent=f"{margin}   "
        )
    return text
