"""Selects the checkpoints for a command: by path, pattern, run, type and age."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

import attrs

from tinkex.cli import formatting
from tinkex.cli.listing import PAGE

if TYPE_CHECKING:  # only annotations need these: --help must not import numpy and requests
    from tinkex import types
    from tinkex.rest import RestClient


@attrs.frozen
class Selection:
    """Selects checkpoints: one of the patterns (if any) and all other conditions must match.

    Args:
        patterns: see `tinkex checkpoint --help`.
        run_id: only checkpoints of this run.
        kind: "training" or "sampler".
        older_than: minimum age in seconds.
    """

    patterns: tuple[str, ...] = ()
    run_id: str | None = None
    kind: str | None = None
    older_than: int | None = None

    @property
    def is_filtered(self) -> bool:
        return any(value is not None for value in (self.run_id, self.kind, self.older_than))

    def fits(self, checkpoint: types.Checkpoint, now: datetime) -> bool:
        patterns = self.patterns or ("tinker://*",)
        return (
            any(matches(checkpoint.tinker_path, pattern) for pattern in patterns)
            and self.kind in (None, checkpoint.checkpoint_type)
            and self._is_old_enough(checkpoint, now)
        )

    def _is_old_enough(self, checkpoint: types.Checkpoint, now: datetime) -> bool:
        if self.older_than is None:
            return True
        made = formatting.moment(checkpoint.time)
        return made is not None and now - made > timedelta(seconds=self.older_than)

    def listed(self, rest: RestClient, page: int = PAGE) -> Iterator[types.Checkpoint]:
        """The matching checkpoints on the server, newest first."""
        now = datetime.now(timezone.utc)
        if self.run_id is None:
            found = rest.iter_user_checkpoints(page=page)
        else:
            found = iter(newest_first(rest.list_checkpoints(self.run_id).checkpoints))
        return (checkpoint for checkpoint in found if self.fits(checkpoint, now))


def matches(path: str, pattern: str) -> bool:
    """True if *pattern* matches *path*: all of it with tinker://, else its last segments."""
    if pattern.startswith("tinker://"):
        return fnmatch.fnmatchcase(path, pattern)
    segments, wanted = path.removeprefix("tinker://").split("/"), pattern.split("/")
    ends = segments[-len(wanted) :]
    return len(ends) == len(wanted) and all(map(fnmatch.fnmatchcase, ends, wanted))


def is_pattern(path: str) -> bool:
    """True if *path* is a pattern, which may match several paths or the end of one."""
    return not path.startswith("tinker://") or any(letter in path for letter in "*?[")


def newest_first(checkpoints: Sequence[types.Checkpoint]) -> list[types.Checkpoint]:
    """*checkpoints* by their time, newest first."""
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.time or "", reverse=True)
