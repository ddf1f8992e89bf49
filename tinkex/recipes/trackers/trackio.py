"""trackio: a local database, which `trackio show` displays. Follows TRACKIO_DIR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinkex import config
from tinkex.recipes.callbacks import Checkpoint, End, Sample
from tinkex.recipes.run import Run
from tinkex.recipes.trackers import base


class Tracker(base.Tracker):
    """Settings as config, metrics, samples as a table, and the adapter as an artifact."""

    name = "trackio"

    def __init__(self) -> None:
        import trackio

        self._trackio = trackio
        self._run: Any = None

    def on_start(self, run: Run) -> None:
        if self._run is None:
            self._run = self._trackio.init(
                project=config.variable("TRACKIO_PROJECT") or base.PROJECT,
                name=base.title(run),
                config=run.settings,
                resume="allow",
                embed=False,
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def on_sample(self, run: Run, samples: Sequence[Sample]) -> None:
        if samples:
            rows = [[sample.step, sample.prompt, sample.text] for sample in samples]
            table = self._trackio.Table(columns=["step", "prompt", "text"], data=rows)
            self._run.log({"samples": table}, step=samples[0].step)

    def on_save(self, run: Run, checkpoint: Checkpoint) -> None:
        if checkpoint.adapter is not None:
            name = f"{base.title(run)}-adapter"
            self._run.log_artifact(checkpoint.adapter, name=name, type="model")

    def on_end(self, run: Run, end: End) -> None:
        if self._run is not None:
            self._run.finish()
