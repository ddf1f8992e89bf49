"""`tinkex run`: list training runs, and show one with its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import click

from tinkex.cli import formatting
from tinkex.cli.checkpoint import checkpoint_table
from tinkex.cli.listing import (
    first,
    limit_option,
    lora,
    metadata_rows,
    open_rest,
    page_for,
    print_count,
    scope_option,
)
from tinkex.cli.options import format_option, server_options
from tinkex.cli.selection import newest_first

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex import types


@click.group()
def run() -> None:
    """List training runs."""


@run.command("list")
@limit_option
@scope_option
@format_option
@server_options
def list_runs(limit: int, access_scope: Any, as_json: bool, **server: str | None) -> None:
    """List training runs, most recently used first."""
    with open_rest(**server) as rest:
        runs, more = first(rest.iter_training_runs(access_scope, page=page_for(limit)), limit)
    if as_json:
        formatting.say_json({"runs": [attrs.asdict(run) for run in runs], "more": more})
        return
    print_count("training run", len(runs), more)
    if runs:
        headings = ("Run", "Base model", "LoRA", "Status", "Last used", "Last checkpoint")
        formatting.say(formatting.table(headings, [_run_row(run) for run in runs]))


def _run_row(run: types.TrainingRun) -> tuple[str, ...]:
    last = [c for c in (run.last_checkpoint, run.last_sampler_checkpoint) if c is not None]
    newest = max(last, key=lambda checkpoint: checkpoint.time or "", default=None)
    return (
        run.training_run_id,
        run.base_model,
        lora(run),
        _status(run),
        formatting.when(run.last_request_time),
        newest.checkpoint_id if newest else "none",
    )


def _status(run: types.TrainingRun) -> str:
    return "corrupted" if run.corrupted else "good"


@run.command("info")
@click.argument("run_id", metavar="RUN")
@scope_option
@format_option
@server_options
def run_info(run_id: str, access_scope: Any, as_json: bool, **server: str | None) -> None:
    """Show a training run and its checkpoints."""
    from tinkex import errors

    with open_rest(**server) as rest:
        run = rest.get_training_run(run_id, access_scope)
        try:
            checkpoints = newest_first(rest.list_checkpoints(run_id).checkpoints)
        except errors.NotOfferedError as exc:
            click.echo(f"Checkpoints are not listed: {exc}", err=True)
            checkpoints = []
    if as_json:
        listed = [attrs.asdict(checkpoint) for checkpoint in checkpoints]
        formatting.say_json({**attrs.asdict(run), "checkpoints": listed})
        return
    rows = [
        ("Run", run.training_run_id),
        ("Base model", run.base_model),
        ("Owner", run.model_owner),
        ("LoRA", lora(run)),
        ("Status", _status(run)),
        ("Last used", formatting.when(run.last_request_time)),
        *metadata_rows(run.user_metadata),
    ]
    formatting.say(formatting.facts(rows))
    if checkpoints:
        formatting.say(f"\n{checkpoint_table(checkpoints)}")


COMMANDS = (run,)
