"""The operations: what each does with the engine and the store, on the compute thread.

An operation is a generator that yields where other models may run first. The state of its model is
a `LiveModel`; a snapshot may be taken after an operation. Does not know about HTTP, about the order
of operations (see `scheduler`), or about who waits for results.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinkex import types
from tinkex.server.database import CheckpointRow, RunRow, SamplerRow
from tinkex.server.encryption import encrypt_folder
from tinkex.server.home import ServerFolder, move_into_place, sync_tree
from tinkex.server.journal import Journal
from tinkex.server.limits import Limits
from tinkex.server.live import CHANGES_MODEL, LiveModel, LiveSampler, Refused, Work
from tinkex.server.results import explained
from tinkex.server.run_metrics import RunMetrics
from tinkex.server.scheduler import Steps
from tinkex.server.store import Store

logger = logging.getLogger(__name__)

#: A snapshot is taken when repeating the work since the last one would take this many times as
#: long as the snapshot, so that snapshots cost a few percent at most.
_SNAPSHOT_RATIO = 20.0

#: The kind of checkpoint in each segment of a path.
_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


class Workshop:
    """Runs operations for the scheduler.

    `on_sampler` is called (on the compute thread) with each sampling session that an unnamed
    save_weights_for_sampler makes; `on_unloaded` with each model that is gone.
    """

    def __init__(
        self,
        store: Store,
        folder: ServerFolder,
        journal: Journal | None,
        limits: Limits,
        *,
        on_sampler: Callable[[LiveSampler], None],
        on_unloaded: Callable[[LiveModel], None],
    ) -> None:
        self._store = store
        self._folder = folder
        self._journal = journal
        self._limits = limits
        self._on_sampler = on_sampler
        self._on_unloaded = on_unloaded
        self._open: OrderedDict[str, int] = OrderedDict()  # engine_id -> samples in flight
        self.metrics = RunMetrics(store.home.path / "metrics")
        #: Metadata of the loaded base models, by name.
        self.bases: dict[str, Any] = {}

    # Operations on models.

    def steps(self, work: Work, engine: Any) -> Steps:
        """Run one operation; its return value is the result."""
        model = work.model
        started = time.perf_counter()
        try:
            if work.failure is not None:
                self._fail_again(work, work.failure, engine)
                return None
            if work.ended and work.name not in CHANGES_MODEL:
                return None
            if model.broken is not None:
                raise ValueError(f"there is no model {model.model_id} ({model.broken})")
            if isinstance(work.request, Refused):
                self._fail_again(work, f"{work.title}: {work.request.sentence}", engine)
                raise ValueError(work.request.sentence)
            steps = self._operation(work, engine)
            while True:
                try:
                    next(steps)
                except StopIteration as stop:
                    self.metrics.observe(work, stop.value)
                    return stop.value
                model.seconds += time.perf_counter() - started
                yield
                started = time.perf_counter()
        finally:
            model.done_seq = max(model.done_seq, work.seq)
            model.seconds += time.perf_counter() - started
            model.size += work.size

    def _operation(self, work: Work, engine: Any) -> Steps:
        operations: dict[str, Callable[[Work, Any], Steps]] = {
            "CreateModel": self._create_model,
            "Forward": self._forward,
            "ForwardBackward": self._forward_backward,
            "OptimStep": self._optim_step,
            "SaveWeights": self._save_weights,
            "SaveWeightsForSampler": self._save_weights_for_sampler,
            "SaveWeightsExternal": self._save_weights_external,
            "LoadWeights": self._load_weights,
            "UnloadModel": self._unload_model,
        }
        return operations[work.name](work, engine)

    def _fail_again(self, work: Work, failure: str, engine: Any) -> None:
        """Repeat what a failure before a restart did to the model."""
        if work.name == "ForwardBackward":
            self._spoil(work, engine, failure)
        elif work.name == "OptimStep":
            engine.clear_gradients(work.model.model_id)
            work.model.spoilt = None
        elif work.seq == 0:
            work.model.broken = failure

    def load_base(self, engine: Any, base_model: str) -> None:
        engine.load_base(base_model)
        self.bases[base_model] = engine.base_info(base_model)

    def _create_model(self, work: Work, engine: Any) -> Steps:
        request: types.CreateModelRequest = work.request
        model = work.model
        adapter = None if request.adapter is None else Path(request.adapter)
        seed = work.seed if request.lora_config.seed is None else request.lora_config.seed
        try:
            self.load_base(engine, model.base_model)
            yield
            engine.create_model(
                model.model_id, model.base_model, model.lora, seed=seed, adapter=adapter
            )
        except Exception as exc:
            model.broken = f"{work.title}: {explained(exc)[0]}"
            raise
        if adapter is not None:
            model.seconds = math.inf  # snapshot soon: the files may be gone at a restart
        self._enter_run(model)
        return types.CreateModelResponse(model.model_id)

    def _enter_run(self, model: LiveModel) -> None:
        model.created = True
        now = time.time()
        self._store.add_run(
            RunRow(
                model.model_id,
                model.session_id,
                model.owner,
                model.base_model,
                model.lora.rank,
                model.lora.train_mlp,
                model.lora.train_attn,
                model.lora.train_unembed,
                model.user_metadata,
                now,
                now,
            )
        )

    def _forward(self, work: Work, engine: Any) -> Steps:
        request: types.ForwardBackwardRequest = work.request
        result = yield from engine.forward_backward(
            work.model.model_id,
            request.data,
            request.loss_fn,
            request.loss_fn_config,
            forward_only=True,
        )
        return result

    def _forward_backward(self, work: Work, engine: Any) -> Steps:
        request: types.ForwardBackwardRequest = work.request
        try:
            result = yield from engine.forward_backward(
                work.model.model_id, request.data, request.loss_fn, request.loss_fn_config
            )
        except Exception as exc:
            self._spoil(work, engine, f"{work.title}: {explained(exc)[0]}")
            raise
        return result

    def _spoil(self, work: Work, engine: Any, failure: str) -> None:
        engine.clear_gradients(work.model.model_id)
        if work.model.spoilt is None:
            work.model.spoilt = failure

    def _optim_step(self, work: Work, engine: Any) -> Steps:
        model = work.model
        yield from ()
        if model.spoilt is not None:
            reason, model.spoilt = model.spoilt, None
            engine.clear_gradients(model.model_id)
            raise ValueError(
                f"no step was taken, because the gradients are incomplete ({reason}) They were "
                "cleared; send the batch again and step again."
            )
        try:
            return engine.optim_step(model.model_id, work.request.adam_params)
        except Exception:
            engine.clear_gradients(model.model_id)
            raise

    def _save_weights(self, work: Work, engine: Any) -> Steps:
        request: types.SaveWeightsRequest = work.request
        yield from ()
        path = self._save(
            work, engine, "weights", request.path, request, overwrite=request.overwrite
        )
        return types.SaveWeightsResponse(path)

    def _save_weights_for_sampler(self, work: Work, engine: Any) -> Steps:
        request: types.SaveWeightsForSamplerRequest = work.request
        yield from ()
        if request.path is not None:
            path = self._save(work, engine, "sampler_weights", request.path, request)
            return types.SaveWeightsForSamplerResponse(path=path)
        model = work.model
        sampler_id = f"{model.session_id}:sample:{request.sampling_session_seq_id}"
        place = self._folder.samplers / sampler_id.replace(":", "_")
        shutil.rmtree(place, ignore_errors=True)  # left by this operation before a restart
        self._write(engine, model, place, optimizer=False)
        sampler = LiveSampler(
            sampler_id, model.session_id, model.owner, model.base_model, None, place
        )
        self._store.add_sampler(
            SamplerRow(
                sampler_id,
                model.session_id,
                model.owner,
                self._folder.name,
                model.base_model,
                None,
                str(place),
                f"save:{work.origin}",
            )
        )
        self._on_sampler(sampler)
        return types.SaveWeightsForSamplerResponse(sampling_session_id=sampler_id)

    def _save_weights_external(self, work: Work, engine: Any) -> Steps:
        request: types.SaveWeightsExternalRequest = work.request
        yield from ()
        path = self._save(work, engine, "external_weights", request.path, request)
        saved = self._store.checkpoints.named(path)
        return types.SaveWeightsExternalResponse(path, saved.size_bytes if saved else None)

    def _save(
        self,
        work: Work,
        engine: Any,
        segment: str,
        name: str,
        request: types.SaveWeightsRequest
        | types.SaveWeightsForSamplerRequest
        | types.SaveWeightsExternalRequest,
        *,
        overwrite: bool = False,
    ) -> str:
        """Save under a name; returns the tinker path."""
        model = work.model
        training = segment == "weights"
        path = f"tinker://{model.model_id}/{segment}/{types.check_name(name)}"
        there = self._store.checkpoints.named(path)
        if there is not None and there.origin == work.origin:
            return path  # saved just before the server was killed
        if there is not None and not overwrite:
            fix = "overwrite it (overwrite=True), " if training else ""
            raise ValueError(
                f"a checkpoint {path} exists already; choose another name, {fix}or delete it first."
            )
        now = time.time()
        ttl = request.ttl_seconds
        row = CheckpointRow(
            path=path,
            run_id=model.model_id,
            checkpoint_id=f"{segment}/{name}",
            kind=_KINDS[segment],
            owner=model.owner,
            base_model=model.base_model,
            rank=model.lora.rank,
            train_mlp=model.lora.train_mlp,
            train_attn=model.lora.train_attn,
            train_unembed=model.lora.train_unembed,
            directory="",
            size_bytes=0,
            created_at=now,
            expires_at=None if ttl is None else now + ttl,
            public=False,
            user_metadata=getattr(request, "user_metadata", None),
            origin=work.origin,
        )
        keys = getattr(request, "age_encryption_recipients", None)
        draft = self._folder.draft()
        try:
            engine.save(model.model_id, draft, optimizer=training)
            if keys is not None:
                encrypt_folder(draft, keys)
            self._store.checkpoints.add(draft, row)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path

    def _write(self, engine: Any, model: LiveModel, place: Path, *, optimizer: bool) -> None:
        draft = self._folder.draft()
        try:
            engine.save(model.model_id, draft, optimizer=optimizer)
            move_into_place(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _load_weights(self, work: Work, engine: Any) -> Steps:
        request: types.LoadWeightsRequest = work.request
        model = work.model
        try:
            row = self._store.checkpoints.find_model(request.path, model.owner)
            self._store.checkpoints.verify(Path(row.directory))
            if work.seq == 0:
                self.load_base(engine, model.base_model)
                yield
                engine.create_model(model.model_id, model.base_model, model.lora, seed=work.seed)
            self._load(work, engine, Path(row.directory))
        except Exception as exc:
            if work.seq == 0:
                model.broken = f"{work.title}: {explained(exc)[0]}"
            raise
        if work.seq == 0:
            self._enter_run(model)
        model.spoilt = None
        model.seconds = math.inf  # snapshot soon: the checkpoint may be gone at a restart
        return types.LoadWeightsResponse(request.path, model.model_id)

    def _load(self, work: Work, engine: Any, directory: Path) -> None:
        """Load a checkpoint. A model that was created for it is unloaded if that fails."""
        try:
            engine.load(work.model.model_id, directory, optimizer=work.request.optimizer)
        except Exception:
            if work.seq == 0:
                engine.unload(work.model.model_id)
            raise

    def _unload_model(self, work: Work, engine: Any) -> Steps:
        yield from ()
        if work.model.created:
            engine.unload(work.model.model_id)
        if self._journal is not None:
            self._journal.remove_model(work.model.model_id, work.model.snapshot)
        self._on_unloaded(work.model)
        return types.UnloadModelResponse(work.model.model_id)

    # Snapshots.

    def after(self, work: Work, engine: Any) -> None:
        """Take a snapshot of the model if one is due."""
        model = work.model
        due = model.seconds > max(
            self._limits.snapshot_seconds, _SNAPSHOT_RATIO * model.snapshot_seconds
        )
        if self._journal is None or not model.created or work.name == "UnloadModel":
            return
        if due or model.size > self._limits.snapshot_bytes:
            try:
                self._take_snapshot(self._journal, model, engine)
            except Exception:
                # Nothing is lost: the journal has all operations, and the next one tries again.
                logger.exception(
                    "A snapshot of model %s failed; it is retried after the next operation.",
                    model.model_id,
                )

    def _take_snapshot(self, journal: Journal, model: LiveModel, engine: Any) -> None:
        started = time.perf_counter()
        place = self._folder.snapshots / f"{model.model_id.replace(':', '_')}_{model.done_seq}"
        shutil.rmtree(place, ignore_errors=True)
        draft = self._folder.draft()
        try:
            engine.snapshot(model.model_id, draft)
            sync_tree(draft)
            move_into_place(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        journal.snapshot(model.model_id, place, model.done_seq, model.spoilt, model.snapshot)
        model.snapshot = place
        model.seconds, model.size = 0.0, 0
        model.snapshot_seconds = time.perf_counter() - started

    def restore(self, engine: Any, model: LiveModel) -> None:
        """Restore a model from its snapshot after a restart."""
        if model.snapshot is None:
            return
        try:
            self.load_base(engine, model.base_model)
            engine.restore(model.model_id, model.snapshot)
            model.created = True
        except Exception as exc:
            logger.exception("Model %s could not be restored.", model.model_id)
            model.broken = f"it could not be restored after a restart ({exc})"

    # Sampling.

    def submit_sample(
        self,
        engine: Any,
        ticket: str,
        sampler: LiveSampler,
        request: types.SampleRequest,
        on_token: Callable[[int, int, float], None] | None = None,
    ) -> None:
        """Submit a sample request to the engine. Call `sample_ended` when it has ended."""
        engine_id = sampler.engine_id
        if engine_id not in self._open:
            if sampler.directory is not None and not sampler.directory.is_dir():
                raise ValueError(
                    f"the checkpoint {sampler.model_path} of sampling session "
                    f"{sampler.sampler_id} has been deleted or has expired; save the weights "
                    "again and make a new sampling client."
                )
            if sampler.directory is not None:
                self._store.checkpoints.verify(sampler.directory)
            self.load_base(engine, sampler.base_model)
            engine.open_sampler(engine_id, sampler.base_model, directory=sampler.directory)
            self._open[engine_id] = 0
        engine.submit_sample(ticket, engine_id, request, on_token=on_token, share=sampler.owner)
        self._open[engine_id] += 1
        self._open.move_to_end(engine_id)

    def sample_ended(self, engine: Any, sampler: LiveSampler) -> None:
        """Note that a sample request has ended; close idle samplers beyond the limit."""
        if sampler.engine_id in self._open:
            self._open[sampler.engine_id] -= 1
        idle = [engine_id for engine_id, samples in self._open.items() if samples == 0]
        for engine_id in idle[: max(0, len(self._open) - self._limits.open_samplers)]:
            del self._open[engine_id]
            engine.close_sampler(engine_id)

    def close_session_samplers(self, engine: Any, session_id: str) -> None:
        """Remove the samplers of an ended session, with their own snapshots."""
        prefix = str(self._folder.samplers / f"{session_id}_sample_")
        for engine_id in [i for i in self._open if i.startswith(prefix)]:
            del self._open[engine_id]
            engine.close_sampler(engine_id)
        self._store.remove_samplers(session_id)
