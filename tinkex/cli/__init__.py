"""The command line: the group of commands, error messages and exit status.

Each command has its own module, which lists it in `COMMANDS`; no other registration is needed. Only
the module of the running command is imported, or all modules for `tinkex --help`; they import their
dependencies when a command runs.

Results go to stdout, everything else to stderr. Exit status: 0 success, 1 failure, 2 wrong usage,
130 interrupted.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import click

from tinkex import errors
from tinkex._version import __version__
from tinkex.cli import formatting
from tinkex.cli.options import add_verbosity, format_option

#: Modules that are separate programs: `python -m tinkex.cli.demo`.
PROGRAMS = ("demo",)

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


class _Commands(click.Group):
    """The commands of the modules in this folder, each imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        for module in _modules():
            self._load(module)
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            # Most modules are named after their command; others are searched.
            named = [module for module in _modules() if module == cmd_name]
            for module in named or _modules():
                self._load(module)
        return super().get_command(ctx, cmd_name)

    def _load(self, module: str) -> None:
        loaded = importlib.import_module(f"{__name__}.{module}")
        for command in getattr(loaded, "COMMANDS", ()):
            if command.name not in self.commands:
                add_verbosity(command)
                self.add_command(command)


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if module.name not in PROGRAMS]


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
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


@cli.command()
@format_option
def version(as_json: bool) -> None:
    """Print the version of tinkex."""
    if as_json:
        formatting.say_json({"version": __version__})
    else:
        formatting.say(f"tinkex {__version__}")


add_verbosity(cli)
