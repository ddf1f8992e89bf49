"""Snapshots of models: they shorten a restart, and free the memory of idle models.

A model that is not used for a while is kept only as a snapshot; its next operation restores it bit
for bit. Runs on the compute thread.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

from tinkex.server.base_loader import BaseLoader
from tinkex.server.home import ServerFolder, move_into_place
from tinkex.server.journal import Journal
from tinkex.server.limits import Limits
from tinkex.server.live import LiveModel, Work
from tinkex.server.scheduler import Steps

logger = logging.getLogger(__name__)

#: A snapshot is taken when replaying the work since the last one would take this many times as long
#: as the snapshot, so that snapshots cost at most a few percent.
_RATIO = 20.0


class Snapshots:
    """The snapshots of one server's models.

    Args:
        journal: None for a server that cannot be restarted; its snapshots only save memory.
    """

    def __init__(
        self, folder: ServerFolder, journal: Journal | None, loader: BaseLoader, limits: Limits
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._loader = loader
        self._limits = limits
        self._in_memory: dict[str, LiveModel] = {}

    def entered(self, model: LiveModel) -> None:
        """Note that the model is in the engine."""
        model.in_memory = True
        self._in_memory[model.model_id] = model

    def remove(self, engine: Any, model: LiveModel) -> None:
        """Remove an unloaded model from the engine and from the disk."""
        if self._in_memory.pop(model.model_id, None) is not None:
            model.in_memory = False
            engine.unload(model.model_id)
        if self._journal is not None:
            self._journal.remove_model(model.model_id, model.snapshot)
        elif model.snapshot is not None:
            shutil.rmtree(model.snapshot, ignore_errors=True)

    def bring_back(self, engine: Any, model: LiveModel) -> Steps:
        """A part of a job: restores a model from its snapshot if it is not in memory.

        If that fails, the model is broken.
        """
        if model.in_memory or model.snapshot is None or model.broken is not None:
            return
        try:
            yield from self._loader.need(engine, model.base_model)
            engine.restore(model.model_id, model.snapshot)
            model.lora = engine.lora_config(model.model_id)
        except Exception as exc:
            logger.exception("Model %s could not be restored.", model.model_id)
            model.broken = f"it could not be restored from its snapshot ({exc})"
        else:
            self.entered(model)

    def after(self, work: Work, engine: Any) -> None:
        """Take a snapshot of the model after an operation, if one is due."""
        model = work.model
        due = model.seconds > max(self._limits.snapshot_seconds, _RATIO * model.snapshot_seconds)
        if self._journal is None or not model.in_memory or work.name == "UnloadModel":
            return
        if due or model.size > self._limits.snapshot_bytes:
            self._try(engine, model)

    def swap_out(self, engine: Any) -> None:
        """Move models that have been idle for `Limits.idle_model_seconds` to disk."""
        idle_since = time.monotonic() - self._limits.idle_model_seconds
        for model in list(self._in_memory.values()):
            if model.busy or model.used_at > idle_since:
                continue
            if model.snapshot_seq == model.done_seq or self._try(engine, model):
                engine.unload(model.model_id)
                model.in_memory = False
                del self._in_memory[model.model_id]
                logger.info("Idle model %s is kept on disk until it is used.", model.model_id)

    def _try(self, engine: Any, model: LiveModel) -> bool:
        try:
            self._take(engine, model)
        except Exception:
            # Nothing is lost: all operations are in the journal, and the model is in memory.
            logger.exception("A snapshot of model %s failed; it is tried again.", model.model_id)
            model.used_at = time.monotonic()  # not at once
            return False
        return True

    def _take(self, engine: Any, model: LiveModel) -> None:
        started = time.perf_counter()
        if model.snapshot is not None and model.snapshot_seq == model.done_seq:
            return
        place = self._folder.snapshots / f"{model.model_id.replace(':', '_')}_{model.done_seq}"
        shutil.rmtree(place, ignore_errors=True)
        draft = self._folder.draft()
        try:
            engine.snapshot(model.model_id, draft)
            move_into_place(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._replace(model, place)
        model.snapshot_seq = model.done_seq
        model.seconds, model.size = 0.0, 0
        model.snapshot_seconds = time.perf_counter() - started

    def _replace(self, model: LiveModel, place: Path) -> None:
        old, model.snapshot = model.snapshot, place
        if self._journal is not None:
            self._journal.snapshot(
                model.model_id, model.info, place, model.done_seq, model.gradient_failure, old
            )
        elif old is not None:
            shutil.rmtree(old, ignore_errors=True)
