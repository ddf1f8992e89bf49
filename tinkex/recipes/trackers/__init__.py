"""Trackers: callbacks that send a run's settings, metrics and adapter to another program.

Each module here is one tracker, named after its package, as in `--report-to`. It has a class
`Tracker` without constructor arguments; the constructor raises if the tracker cannot be used.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

from tinkex import errors


def names() -> list[str]:
    """The names of all trackers."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")


def create(wanted: Sequence[str]) -> list[Any]:
    """
    Create the trackers named in *wanted*.

    Raises:
        ValueError: If there is no tracker with that name, or it is not logged in.
        MissingExtraError: If its package is not installed.
    """
    for name in wanted:
        if name not in names():
            raise ValueError(f"there is no tracker {name!r}; there are {', '.join(names())}.")
    return [_create(name) for name in dict.fromkeys(wanted)]


def _create(name: str) -> Any:
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        return module.Tracker()
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"the tracker {name} needs the package {exc.name}, which is not installed: "
            "pip install 'tinkex[trackers]'."
        ) from exc
    except ValueError:
        raise
    except Exception as exc:  # each package has its own exceptions
        reason = " ".join(str(exc).split())[:300]
        raise ValueError(f"the tracker {name} cannot be used: {reason}") from exc
