"""`tinkex report` and `tinkex compare`: runs as HTML pages, and their settings as a table.

Imports happen when a command runs, so that `tinkex --help` is fast.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tinkex.cli import formatting


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write. Default: report.html in the folder of the run.",
)
def report(run: Path, target: Path | None) -> None:
    """Write a report of RUN as one HTML file: curves, samples, data, speed and settings.

    RUN is the --output folder of a run, finished or not.
    """
    from tinkex.recipes import report as reports
    from tinkex.recipes.run import load_run

    formatting.say(str(reports.write(load_run(run), target)))


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write an HTML file with the curves of the runs in one chart.",
)
def compare(runs: tuple[Path, ...], target: Path | None) -> None:
    """Print the settings in which RUNS differ, and their losses.

    RUNS are the --output folders of two or more runs.
    """
    from tinkex.recipes import report as reports
    from tinkex.recipes.run import load_run

    if len(runs) < 2:
        raise click.UsageError("name at least two runs to compare.")
    found = [load_run(folder) for folder in runs]
    rows = [
        [key, *(json.dumps(value) if not isinstance(value, str) else value for value in values)]
        for key, values in reports.differences(found).items()
    ]
    losses = [[row["eval_loss"] for row in run.metrics if "eval_loss" in row] for run in found]
    for name, place in (("loss before", 0), ("loss after", -1)):
        rows.append([name, *(f"{one[place]:.4f}" if one else "-" for one in losses)])
    formatting.say(formatting.table(["", *map(str, runs)], rows))
    if target is not None:
        reports.compare(found, target)
        formatting.say(str(target))


COMMANDS = (report, compare)
