"""The command line: the group of commands, error messages and exit status.

Each command has its own module. Results go to stdout, everything else to stderr. Exit status: 0
success, 1 failure, 2 wrong usage, 130 interrupted. Modules are imported when a command needs them,
so that `tinkex --help` is fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from tinkex import errors
from tinkex._version import __version__
from tinkex.cli import (
    chat,
    checkpoint,
    conformance,
    data,
    doctor,
    export,
    formatting,
    home,
    model,
    run,
    sample,
    serve,
    session,
    train,
    ui,
)
from tinkex.cli.options import add_verbosity, format_option

#: Exit status after Ctrl-C.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    traceback_wanted = "--traceback" in (sys.argv if argv is None else argv)
    try:
        status = cli.main(argv, prog_name="tinkex", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except (errors.TinkexError, ValueError, OSError) as exc:
        if traceback_wanted:
            raise
        click.echo(f"error: {exc}", err=True)
        return 1
    return status if isinstance(status, int) else 0


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--traceback", is_flag=True, help="Show the Python traceback of an error.")
@click.version_option(__version__, prog_name="tinkex")
def cli(traceback: bool) -> None:
    """Fine-tune language models on this machine, an open server or the official service.

    Without --base-url and without TINKER_API_KEY or TINKER_BASE_URL in the environment, commands
    run on the embedded engine (pip install 'tinkex[local]').
    """
    from tinkex import config

    if not config.wants_color():
        click.get_current_context().color = False


for _command in (
    train.train,
    serve.serve,
    ui.ui,
    sample.sample,
    chat.chat,
    conformance.conformance,
    data.data,
    run.run,
    checkpoint.checkpoint,
    session.session,
    model.model,
    export.export,
    export.push,
    doctor.doctor,
    home.home,
):
    cli.add_command(_command)


@cli.command()
@format_option
def version(as_json: bool) -> None:
    """Print the version of tinkex."""
    if as_json:
        formatting.say_json({"version": __version__})
    else:
        formatting.say(f"tinkex {__version__}")


add_verbosity(cli)
