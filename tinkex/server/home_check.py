"""Checks the checkpoints of a home: damaged files, rows without files."""

from __future__ import annotations

from pathlib import Path

import attrs

from tinkex.server.checkpoint_store import damage_of
from tinkex.server.home import Home, HomeError
from tinkex.server.store import Store


@attrs.frozen
class CheckedCheckpoint:
    """One checkpoint.

    Attributes:
        status: "ok", "damaged", or "unknown" if saved by a version without hashes.
        detail: the damage; "" if there is none.
    """

    path: str
    status: str
    detail: str
    directory: str


def check_home(path: Path) -> list[CheckedCheckpoint]:
    """Compare every checkpoint's files with the hashes made at saving. Servers may be running.

    Raises:
        HomeError: If *path* is not a home or cannot be read.
    """
    path = path.expanduser().absolute()
    if not (path / "tinkex.sqlite").is_file():
        raise HomeError(f"{path} is not a home of tinkex: it holds no tinkex.sqlite.")
    store = Store(Home(path))
    try:
        return [
            CheckedCheckpoint(row.path, *_status(row.directory, damage_of(row), row.file_hashes))
            for row in store.checkpoints.all_rows()
        ]
    finally:
        store.close()


def _status(
    directory: str, damage: str | None, hashes: dict[str, str] | None
) -> tuple[str, str, str]:
    if damage is None and not Path(directory).is_dir():
        damage = "its folder is missing"
    if damage is not None:
        return "damaged", damage, directory
    return ("unknown" if hashes is None else "ok"), "", directory
