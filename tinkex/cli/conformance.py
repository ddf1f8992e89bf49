"""`tinkex conformance`: run the checks of tinkex.conformance and print their results."""

from __future__ import annotations

from typing import Any

import click

from tinkex.cli import formatting
from tinkex.cli.options import format_option, key_option, option

_OUTCOME_COLORS = {"pass": "green", "fail": "red", "not offered": None}


@click.command()
@click.argument("url")
@click.option(
    "--write",
    is_flag=True,
    help="Also run the checks that create a session, models and checkpoints on the server; these "
    "are deleted at the end.",
)
@click.option("--base-model", help="Model to train. Default: the first that the server offers.")
@click.option(
    "--other-api-key",
    help="Key of a second user, to check that users cannot see each other's work.",
)
@click.option(
    "--restart",
    metavar="COMMAND",
    help="Shell command that restarts the server, to check what survives.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="TEXT",
    help="Run only checks with TEXT in their name. May be repeated.",
)
@option(
    "--patience", click.FloatRange(1), 120.0, "Seconds to wait for the result of one operation."
)
@format_option
@key_option
def conformance(url: str, api_key: str | None, as_json: bool, write: bool, **options: Any) -> int:
    """Check whether the training server at URL follows the Tinker API.

    Each check is a rule that some server breaks today. Its outcome is pass, fail or not offered,
    with the reason. Without --write nothing is changed on the server. Exit status 1 if a check
    fails.
    """
    from tinkex import conformance as rules

    results = []
    for result in rules.check(url, api_key, write=write, **options):
        results.append(result)
        if not as_json:
            color = _OUTCOME_COLORS[result.outcome]
            text = rules.line(result)
            formatting.say(click.style(text[: rules.MARGIN], fg=color) + text[rules.MARGIN :])
    if as_json:
        formatting.say(rules.as_json(url, results))
    else:
        formatting.say(f"\n{rules.summary(results)}.")
    return 1 if any(result.outcome == "fail" for result in results) else 0


COMMANDS = (conformance,)
