"""Weights & Biases. Follows WANDB_PROJECT, WANDB_MODE and its other variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinkex import config
from tinkex.recipes.callbacks import Checkpoint, End, Sample
from tinkex.recipes.run import Run
from tinkex.recipes.trackers import base


class Tracker(base.Tracker):
    """Settings as config, metrics, samples as a table, and the adapter as an artifact."""

    name = "wandb"

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = None
        mode = config.variable("WANDB_MODE") or "online"
        # Otherwise init() would ask for a key in the terminal, and the run would wait.
        if mode == "online" and not wandb.login(prompt=False):
            raise ValueError(
                "the tracker wandb is not logged in; run `wandb login`, set WANDB_API_KEY, or "
                "set WANDB_MODE=offline."
            )

    def on_start(self, run: Run) -> None:
        if self._run is None:
            self._run = self._wandb.init(
                project=config.variable("WANDB_PROJECT") or base.PROJECT,
                name=base.title(run),
                config=run.settings,
                dir=str(run.folder),
                id=self.known_as(run),
                resume="allow",
            )
            self.remember(run, self._run.id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def on_sample(self, run: Run, samples: Sequence[Sample]) -> None:
        if samples:
            rows = [[sample.step, sample.prompt, sample.text] for sample in samples]
            table = self._wandb.Table(columns=["step", "prompt", "text"], data=rows)
            self._run.log({"samples": table}, step=samples[0].step)

    def on_save(self, run: Run, checkpoint: Checkpoint) -> None:
        if checkpoint.adapter is not None:
            artifact = self._wandb.Artifact(f"{base.title(run)}-adapter", type="model")
            artifact.add_dir(checkpoint.adapter)
            self._run.log_artifact(artifact)

    def on_end(self, run: Run, end: End) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(end.status == "failed"))
