"""TensorBoard: event files in the folder `tensorboard` of the run.

Look at them with `tensorboard --logdir RUN`. Needs the package tensorboard, not PyTorch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from tinkex.recipes.callbacks import Checkpoint, End, Sample
from tinkex.recipes.run import Run
from tinkex.recipes.trackers import base


class Tracker(base.Tracker):
    """Scalars, and the settings, samples and final checkpoint as text."""

    name = "tensorboard"

    def __init__(self) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: F401
        from tensorboard.summary.writer import event_file_writer  # noqa: F401

        self._writer: Any = None

    def on_start(self, run: Run) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(run.folder / "tensorboard"))
        self._write(run.step, self._text("settings", json.dumps(run.settings, indent=2)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in metrics.items()]
        self._write(step, Summary(value=values))

    def on_sample(self, run: Run, samples: Sequence[Sample]) -> None:
        for number, sample in enumerate(samples):
            text = f"{sample.prompt}\n\n---\n\n{sample.text}"
            self._write(sample.step, self._text(f"samples/{number}", text))

    def on_save(self, run: Run, checkpoint: Checkpoint) -> None:
        if checkpoint.adapter is not None:
            text = f"{checkpoint.adapter} ({checkpoint.path})"
            self._write(checkpoint.step, self._text("adapter", text))

    def on_end(self, run: Run, end: End) -> None:
        if self._writer is not None:
            self._writer.close()

    @staticmethod
    def _text(tag: str, text: str) -> Any:
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        size = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        plugin = SummaryMetadata.PluginData(plugin_name="text")
        value = Summary.Value(
            tag=tag,
            metadata=SummaryMetadata(plugin_data=plugin),
            tensor=TensorProto(dtype="DT_STRING", string_val=[text.encode()], tensor_shape=size),
        )
        return Summary(value=[value])

    def _write(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
