"""MLflow. Follows MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import attrs

from tinkex import config
from tinkex.recipes.callbacks import Checkpoint, End, Sample
from tinkex.recipes.run import Run
from tinkex.recipes.trackers import base

#: Longest value of a parameter, in characters.
MAX_PARAMETER = 500
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Tracker(base.Tracker):
    """Settings as parameters, metrics, samples as text, and the adapter as artifacts."""

    name = "mlflow"

    def __init__(self) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient()
        self._number = ""

    def on_start(self, run: Run) -> None:
        if self._number:
            return
        known = self.known_as(run)
        if known is None:
            known = self._create(run)
        else:
            self._client.update_run(known, status="RUNNING")
        self._number = known

    def _create(self, run: Run) -> str:
        name = config.variable("MLFLOW_EXPERIMENT_NAME") or base.PROJECT
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        created = self._client.create_run(experiment, run_name=base.title(run))
        number = str(created.info.run_id)
        for key, value in run.settings.items():
            self._client.log_param(number, key, str(value)[:MAX_PARAMETER])
        self.remember(run, number)
        return number

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(key, value, now, step) for key, value in metrics.items()]
        self._client.log_batch(self._number, metrics=values)

    def on_sample(self, run: Run, samples: Sequence[Sample]) -> None:
        if samples:
            said = {"samples": [attrs.asdict(sample) for sample in samples]}
            self._client.log_dict(self._number, said, f"samples/step-{samples[0].step:06d}.json")

    def on_save(self, run: Run, checkpoint: Checkpoint) -> None:
        if checkpoint.adapter is not None:
            self._client.log_artifacts(self._number, checkpoint.adapter, "adapter")

    def on_end(self, run: Run, end: End) -> None:
        if self._number:
            self._client.set_terminated(self._number, _STATUS[end.status])
