"""`tinkex doctor`: run the steps of tinkex.diagnostics and print their findings."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.options import format_option, key_option

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex.diagnostics import Finding

_COLORS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": None}
_WIDTH = 100
_INDENT = 20
#: No line break between a method and its path.
_METHOD = re.compile(r"\b(GET|PUT|POST|DELETE) ")


@click.command()
@click.argument("url", required=False)
@click.option(
    "--base-model",
    help="Find out what this model would need on this machine, without loading it: which path "
    "computes it, in which number type, and its memory.",
)
@format_option
@key_option
def doctor(url: str | None, base_model: str | None, as_json: bool, api_key: str | None) -> int:
    """Find out what works and what does not, here or at URL, and how to fix it.

    Without URL it checks the server in TINKER_BASE_URL, or this machine and the embedded engine.
    The steps go from the host name to the models of the server. A failed step ends the check with
    exit status 1 if later steps depend on it. Changes nothing on the server.
    """
    from tinkex import diagnostics

    findings = []
    for finding in diagnostics.examine(url, api_key, base_model=base_model):
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


COMMANDS = (doctor,)
