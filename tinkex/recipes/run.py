"""Run: a run as its folder describes it, finished or not, and what can be done with its model.

Reads the folder whenever it is asked, so that it is also true while the run trains. Any recipe
whose state.json has the keys of `run_folder.State` gets one.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from tinkex.recipes import run_folder


class Rows(list[dict[str, Any]]):
    """A list of dicts that can become a DataFrame."""

    def to_pandas(self) -> Any:
        """A pandas.DataFrame with a column per key. Needs pandas (tinkex[data])."""
        import pandas  # type: ignore[import-not-found,import-untyped,unused-ignore]

        return pandas.DataFrame(list(self))


class Run:
    """A run in its folder. Made by `tinkex.finetune` and `tinkex.load_run`.

    Args:
        folder: of the run.
        base_url, api_key: of the server that holds its weights; as for `ServiceClient`.
    """

    def __init__(
        self, folder: str | Path, base_url: str | None = None, api_key: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self._address = {"base_url": base_url, "api_key": api_key}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Run {self.folder} [{self.description}]>"

    # What the folder says

    @property
    def state(self) -> dict[str, Any]:
        """The content of state.json; {} before the run has begun."""
        return run_folder.read_json(self.folder / "state.json") or {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the run was started with."""
        return dict(self.state.get("settings") or {})

    @property
    def base_model(self) -> str:
        return str(self.settings.get("base_model") or "")

    @property
    def step(self) -> int:
        """The last step of which there is a row of metrics, or a checkpoint; 0 before the first."""
        return max([int(row["step"]) for row in self.metrics] + [int(self.state.get("step") or 0)])

    @property
    def total_steps(self) -> int:
        return int(self.state.get("total_steps") or 0)

    @property
    def checkpoint(self) -> str | None:
        """tinker:// path of the last state, with optimizer, that was saved."""
        path: str | None = self.state.get("checkpoint")
        return path

    @property
    def sampler_path(self) -> str | None:
        """tinker:// path of the final weights; None until the run is finished."""
        path: str | None = self.state.get("sampler_path")
        return path

    @property
    def is_finished(self) -> bool:
        return self.sampler_path is not None

    @property
    def description(self) -> str:
        """Where the run stands: finished, or the step of its last checkpoint."""
        state = self.state
        if state.get("sampler_path"):
            return "finished"
        return f"saved after step {state.get('step') or 0} of {state.get('total_steps') or '?'}"

    @property
    def adapter(self) -> Path | None:
        """Folder of the PEFT adapter; None until the run is finished."""
        folder = self.folder / "adapter"
        return folder if self.is_finished and folder.is_dir() else None

    @property
    def metrics(self) -> Rows:
        """metrics.jsonl: a dict per step, in order; `to_pandas()` makes a DataFrame."""
        return Rows(run_folder.read_rows(self.folder / "metrics.jsonl"))

    @property
    def samples(self) -> Rows:
        """samples.jsonl: what the model said as training went, with "step", "prompt", "text"."""
        return Rows(run_folder.read_rows(self.folder / "samples.jsonl"))


def load_run(folder: str | Path, base_url: str | None = None, api_key: str | None = None) -> Run:
    """
    The run in *folder*, finished or not.

    Args:
        base_url, api_key: of the server that holds its weights; by default as for `ServiceClient`.

    Raises:
        ValueError: If there is no run in *folder*, or its state cannot be read.
    """
    run = Run(folder, base_url, api_key)
    if not run.state:
        raise ValueError(f"there is no run in {folder}: it has no state.json.")
    return run
