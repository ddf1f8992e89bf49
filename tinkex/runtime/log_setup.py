"""Where log lines go: TINKEX_LOG, and -v and -q of the command line.

Without these, tinkex adds no handler: Python prints warnings to stderr, unless the program sets up
`logging` itself.
"""

from __future__ import annotations

import logging
import sys

from tinkex import config

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

logger = logging.getLogger("tinkex")


class StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, above progress bars if there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as a line."""
        try:
            line = self.format(record)
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr)
        except Exception:  # like logging's handlers: a log line must not end the program
            self.handleError(record)


def from_environment() -> None:
    """Log at the level that TINKEX_LOG names, if it is set.

    Raises:
        ValueError: If it is not the name of a level.
    """
    name = config.log_level()
    if name is None:
        return
    if name not in LEVELS:
        raise ValueError(f"TINKEX_LOG is {name!r}; set it to {', '.join(LEVELS)}, or unset it.")
    set_level(LEVELS[name])


def set_level(level: int) -> None:
    """Log messages of *level* and above; to stderr, unless the program has set up handlers."""
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False  # handlers added to the root logger later would repeat lines
