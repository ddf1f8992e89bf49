"""Where log lines go: TINKEX_LOG, and -v and -q of the command line.

Without these, tinkex adds no handler: Python prints warnings to stderr, and a program that sets up
`logging` itself decides.
"""

from __future__ import annotations

import logging
import sys

from tinkex import config

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

logger = logging.getLogger("tinkex")


class StderrHandler(logging.Handler):
    """Writes to stderr as it is at that moment, above progress bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a line."""
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
        except Exception:  # as logging's own handlers: a log line never ends a program
            self.handleError(record)


def from_environment() -> None:
    """Log at the level that TINKEX_LOG names, if it is set.

    Raises:
        ValueError: If it names no level.
    """
    name = config.log_level()
    if name is None:
        return
    if name not in LEVELS:
        raise ValueError(f"TINKEX_LOG is {name!r}; set it to {', '.join(LEVELS)}, or unset it.")
    set_level(LEVELS[name])


def set_level(level: int) -> None:
    """Log from *level* on; to stderr, unless the program has set up handlers itself."""
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False  # handlers that a program adds to the root later would repeat it
