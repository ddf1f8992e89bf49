"""What the trackers share: the name of a run, its project, and its number in the tracker."""

from __future__ import annotations

from pathlib import Path

from tinkex.recipes.callbacks import Callback
from tinkex.recipes.run import Run
from tinkex.recipes.run_folder import read_json, replace_json

#: The default project (or experiment); each tracker's environment variable overrides it.
PROJECT = "tinkex"


class Tracker(Callback):
    """A callback that stores the tracker's id of the run in the run's folder.

    So a resumed run continues the same curves.
    """

    #: Name of the tracker, as in `--report-to`.
    name = ""

    def known_as(self, run: Run) -> str | None:
        """The tracker's id of *run* from an earlier start; None at the first start."""
        return (read_json(_path(run)) or {}).get(self.name)

    def remember(self, run: Run, number: str) -> None:
        replace_json(_path(run), {**(read_json(_path(run)) or {}), self.name: number})

    def on_step(self, run: Run, row: dict[str, float]) -> None:
        self.log(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def on_eval(self, run: Run, row: dict[str, float]) -> None:
        self.on_step(run, row)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics of a step; may be called several times for a step."""
        raise NotImplementedError


def _path(run: Run) -> Path:
    return run.folder / "trackers.json"


def title(run: Run) -> str:
    """The title of the run: the name of its folder."""
    return run.folder.resolve().name
