"""Where log lines go, and that a program's own logging is left alone."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from tqdm import tqdm

from tinkex.runtime import log_setup


@pytest.fixture
def logger(monkeypatch):
    """The logger as a program finds it: without handlers, below a root without any."""
    logger = logging.Logger("tinkex")
    logger.parent = logging.Logger("root", logging.WARNING)
    monkeypatch.setattr(log_setup, "logger", logger)
    return logger


@pytest.mark.parametrize(
    "name, shown", [("debug", 3), ("info", 2), ("warning", 1)], ids=["debug", "info", "warning"]
)
def test_the_environment_names_the_level(logger, monkeypatch, capsys, name, shown):
    monkeypatch.setenv("TINKEX_LOG", name)
    log_setup.from_environment()
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logger.log(level, "a line")

    assert shown == capsys.readouterr().err.count("a line")


def test_without_it_nothing_is_set_up(logger, monkeypatch):
    monkeypatch.delenv("TINKEX_LOG", raising=False)
    log_setup.from_environment()

    assert ([], logging.NOTSET) == (logger.handlers, logger.level)


def test_a_level_that_there_is_not_is_named(monkeypatch):
    monkeypatch.setenv("TINKEX_LOG", "loud")

    with pytest.raises(ValueError, match="'loud'; set it to debug, info, warning, or unset it"):
        log_setup.from_environment()


def test_setting_a_level_twice_writes_a_line_once(logger, capsys):
    log_setup.set_level(logging.INFO)
    log_setup.set_level(logging.DEBUG)
    logger.debug("a line")

    assert 1 == capsys.readouterr().err.count("a line")


def test_handlers_of_the_program_are_used_instead(logger, capsys):
    stream = io.StringIO()
    logger.parent.addHandler(logging.StreamHandler(stream))
    log_setup.set_level(logging.INFO)
    logger.info("a line")

    assert ("a line\n", "") == (stream.getvalue(), capsys.readouterr().err)


def test_lines_go_to_the_stderr_of_the_moment(logger, monkeypatch):
    """Notebooks and tests replace sys.stderr after the handler was made."""
    log_setup.set_level(logging.INFO)
    for _ in range(2):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        logger.info("a line")

        assert 1 == sys.stderr.getvalue().count("a line")


def test_without_progress_bars_tqdm_is_not_needed(logger, monkeypatch, capsys):
    """Whatever has imported it draws bars; nothing else imports it for a log line."""
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    log_setup.set_level(logging.INFO)
    logger.info("a line")

    assert "a line" in capsys.readouterr().err
    assert "tqdm" not in sys.modules


def test_a_progress_bar_stays_below_the_lines(logger, monkeypatch):
    """The bar is erased, the line written, and the bar drawn again."""
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    log_setup.set_level(logging.INFO)
    with tqdm(total=2, file=screen, ascii=True, mininterval=0) as bar:
        bar.update()
        logger.info("a line")
        lines = screen.getvalue().split("\n")

    assert lines[0].rpartition("\r")[2].strip().endswith("a line")
    assert "50%" in lines[1]


def test_a_line_that_cannot_be_written_ends_nothing(logger, capsys):
    """It is reported as logging reports such things."""
    log_setup.set_level(logging.INFO)
    logger.info("%d lines", "many")

    assert "--- Logging error ---" in capsys.readouterr().err
