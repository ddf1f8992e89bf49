"""-v and -q: on every command, to stderr, and stdout stays as it is."""

from __future__ import annotations

import logging
import subprocess
import sys

import click
import pytest

from tests.support.fake_server import FakeServer
from tests.support.served import served
from tinkex import cli


@pytest.fixture(autouse=True)
def _logger_as_it_was():
    """The commands run in this process, and set up its logging."""
    logger = logging.getLogger("tinkex")
    before = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.level, logger.handlers, logger.propagate = before
    logger.setLevel(before[0])


def commands(command=cli.cli, name="tinkex"):
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for below in command.list_commands(context):
            yield from commands(command.get_command(context, below), f"{name} {below}")


@pytest.mark.parametrize(
    "name, command", list(commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_has_them(name, command):
    help_text = command.get_help(click.Context(command, info_name=name))

    assert "-v, --verbose" in help_text
    assert "-q, --quiet" in help_text


@pytest.mark.parametrize(
    "arguments, levels",
    [
        (["sample", "-v"], ["INFO"]),
        (["-v", "sample"], ["INFO"]),
        (["sample", "-vv"], ["INFO", "DEBUG"]),
        (["sample"], []),
        (["sample", "-q"], []),
    ],
    ids=str,
)
def test_they_set_what_is_logged(arguments, levels):
    """The result on stdout is the same; the log goes to stderr."""
    options = ["tiny", "--prompt", "hi", "--max-tokens", "1"]
    with served(FakeServer()) as url:
        done = subprocess.run(
            [sys.executable, "-m", "tinkex", *arguments, "--base-url", url, *options],
            capture_output=True,
            text=True,
        )

    assert 0 == done.returncode, done.stderr
    assert done.stdout.strip()
    assert levels == [level for level in ("INFO", "DEBUG") if f" {level} tinkex: " in done.stderr]
    assert bool(done.stderr) == bool(levels)


def test_a_quiet_training_prints_its_result_alone(train, capsys):
    assert 0 == train("-q")

    printed = capsys.readouterr()
    assert printed.out
    assert "" == printed.err
