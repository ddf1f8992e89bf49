"""The operations: what each does with the engine and the store, on the compute thread.

An operation is a generator that yields where other models may run first. The state of its model is
a `LiveModel`. Does not know about HTTP, the order of operations (see `scheduler`), or the clients
that wait for results.
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

import attrs

from tinkex import types
from tinkex.server import tracing
from tinkex.server.base_loader import BaseLoader
from tinkex.server.database import CheckpointRow, RunRow, SamplerRow
from tinkex.server.encryption import encrypt_folder
from tinkex.server.home import ServerFolder, move_into_place, tree_bytes
from tinkex.server.journal import Journal
from tinkex.server.limits import Limits
from tinkex.server.live import CHANGES_MODEL, LiveModel, LiveSampler, Refused, Work
from tinkex.server.monitor import Monitor
from tinkex.server.results import explained
from tinkex.server.run_metrics import RunMetrics
from tinkex.server.scheduler import Steps, Wait
from tinkex.server.snapshots import Snapshots
from tinkex.server.store import Store

logger = logging.getLogger(__name__)


@attrs.define
class _OpenSampler:
    """A sampler in the engine: its running samples, and when the last one ended."""

    running: int = 0
    used_at: float = attrs.field(factory=time.monotonic)


#: The kind of checkpoint in each segment of a path.
_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


class Workshop:
    """Runs operations for the scheduler.

    Both callbacks run on the compute thread: `on_sampler` gets each sampling session that an
    unnamed save_weights_for_sampler creates, `on_unloaded` each unloaded model.
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
        self._limits = limits
        self._on_sampler = on_sampler
        self._on_unloaded = on_unloaded
        self._open: OrderedDict[str, _OpenSampler] = OrderedDict()  # by engine_id
        self.loader = BaseLoader(limits.load_seconds)
        self.snapshots = Snapshots(folder, journal, self.loader, limits)
        self.monitor = Monitor()
        self.metrics = RunMetrics(store.home.path / "metrics")
        #: The newest weights saved as `inflight`, by model.
        self._inflight: dict[str, LiveSampler] = {}

    # Operations on models.

    def steps(self, work: Work, engine: Any) -> Steps:
        """Run one operation; its return value is the result."""
        started = time.monotonic()
        span = tracing.begin(work.name, work.trace, work.model.model_id, work.seq)
        try:
            result = yield from self._steps(work, engine)
        except Exception as exc:
            self.monitor.operation_ended(work, started, "failed")
            tracing.end(span, exc)
            raise
        if not work.ended:
            self.monitor.operation_ended(work, started, "done")
        tracing.end(span)
        return result

    def _steps(self, work: Work, engine: Any) -> Steps:
        model = work.model
        model.busy = True
        started = time.perf_counter()
        try:
            if work.ended and work.failure is None and work.name not in CHANGES_MODEL:
                return None
            if work.name == "UnloadModel":  # allowed for a broken model, too
                return self._unload_model(work, engine)
            yield from self.snapshots.bring_back(engine, model)
            if work.failure is not None:
                self._fail_again(work, work.failure, engine)
                return None
            if model.broken is not None:
                raise ValueError(f"there is no model {model.model_id} ({model.broken})")
            if isinstance(work.request, Refused):
                self._fail_again(work, f"{work.title}: {work.request.sentence}", engine)
                raise ValueError(work.request.sentence)
            if work.stored is not None:
                reading = work.stored.read()
                yield Wait(reading, lambda: "its data is read from disk")
                work = attrs.evolve(work, request=reading.result())
            started = time.perf_counter()
            steps = self._operation(work, engine)
            while True:
                try:
                    wait = next(steps)
                except StopIteration as stop:
                    trained = self.metrics.observe(work, stop.value)
                    self.monitor.trained(model.base_model, trained)
                    return stop.value
                model.seconds += time.perf_counter() - started
                yield wait
                started = time.perf_counter()
        finally:
            model.busy = False
            model.used_at = time.monotonic()
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
        }
        return operations[work.name](work, engine)

    def _fail_again(self, work: Work, failure: str, engine: Any) -> None:
        """Repeat the effect on the model of a failure before a restart."""
        if work.name == "ForwardBackward":
            self._drop_gradients(work, engine, failure)
        elif work.name == "OptimStep":
            engine.clear_gradients(work.model.model_id)
            work.model.gradient_failure = None
        elif work.seq == 0:
            work.model.broken = failure

    def _create_model(self, work: Work, engine: Any) -> Steps:
        request: types.CreateModelRequest = work.request
        model = work.model
        adapter = None if request.adapter is None else Path(request.adapter)
        seed = work.seed if request.lora_config.seed is None else request.lora_config.seed
        try:
            yield from self.loader.need(engine, model.base_model)
            engine.create_model(
                model.model_id, model.base_model, model.lora, seed=seed, adapter=adapter
            )
        except Exception as exc:
            model.broken = f"{work.title}: {explained(exc)[0]}"
            raise
        if adapter is not None:
            model.seconds = math.inf  # snapshot soon: the files may be missing at a restart
        self._enter_run(model, engine)
        return types.CreateModelResponse(model.model_id)

    def _enter_run(self, model: LiveModel, engine: Any) -> None:
        model.created = True
        model.lora = engine.lora_config(model.model_id)
        self.snapshots.entered(model)
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
                bool(model.lora.train_unembed),
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
            self._drop_gradients(work, engine, f"{work.title}: {explained(exc)[0]}")
            raise
        return result

    def _drop_gradients(self, work: Work, engine: Any, failure: str) -> None:
        engine.clear_gradients(work.model.model_id)
        if work.model.gradient_failure is None:
            work.model.gradient_failure = failure

    def _optim_step(self, work: Work, engine: Any) -> Steps:
        model = work.model
        yield from ()
        if model.gradient_failure is not None:
            reason, model.gradient_failure = model.gradient_failure, None
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
            sampler_id,
            model.session_id,
            model.owner,
            model.base_model,
            None,
            place,
            model.model_id if request.kind == "inflight" else None,
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
        if request.kind == "inflight":
            self._inflight[model.model_id] = sampler
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
            train_unembed=bool(model.lora.train_unembed),
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
            self._store.checkpoints.check_room(model.owner, tree_bytes(draft))
            move_into_place(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _load_weights(self, work: Work, engine: Any) -> Steps:
        request: types.LoadWeightsRequest = work.request
        model = work.model
        try:
            reader = request.weights_access_token  # already replaced by the name of an owner
            row = self._store.checkpoints.find_model(request.path, model.owner, reader)
            self._store.checkpoints.verify(Path(row.directory))
            if work.seq == 0:
                yield from self.loader.need(engine, model.base_model)
                engine.create_model(model.model_id, model.base_model, model.lora, seed=work.seed)
            self._load(work, engine, Path(row.directory))
        except Exception as exc:
            if work.seq == 0:
                model.broken = f"{work.title}: {explained(exc)[0]}"
            raise
        if work.seq == 0:
            self._enter_run(model, engine)
        model.gradient_failure = None
        model.seconds = math.inf  # snapshot soon: the checkpoint may be missing at a restart
        return types.LoadWeightsResponse(request.path, model.model_id)

    def _load(self, work: Work, engine: Any, directory: Path) -> None:
        """Load a checkpoint. A model that was created for it is unloaded if that fails."""
        try:
            engine.load(work.model.model_id, directory, optimizer=work.request.optimizer)
        except Exception:
            if work.seq == 0:
                engine.unload(work.model.model_id)
            raise

    def _unload_model(self, work: Work, engine: Any) -> types.UnloadModelResponse:
        self.snapshots.remove(engine, work.model)
        self._inflight.pop(work.model.model_id, None)
        self._on_unloaded(work.model)
        return types.UnloadModelResponse(work.model.model_id)

    # Sampling.

    def newest(self, sampler: LiveSampler) -> LiveSampler:
        """The weights to sample from: for an `inflight` sampler, the model's newest such weights.

        After a restart these are the sampler's own weights, until the model saves new ones.
        """
        return self._inflight.get(sampler.follows or "", sampler)

    def submit_sample(
        self,
        engine: Any,
        ticket: str,
        sampler: LiveSampler,
        request: types.SampleRequest,
        on_token: Callable[[int, int, float], None] | None = None,
    ) -> Steps:
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
            yield from self.loader.need(engine, sampler.base_model)
        read = engine.unread_tokenizer(sampler.base_model, request)
        if read is not None:
            yield from self.loader.aside(f"the tokenizer of {sampler.base_model!r}", read)
        if engine_id not in self._open:  # check again: it may have been opened meanwhile
            engine.open_sampler(engine_id, sampler.base_model, directory=sampler.directory)
            self._open[engine_id] = _OpenSampler()
        engine.submit_sample(ticket, engine_id, request, on_token=on_token, share=sampler.owner)
        self._open[engine_id].running += 1
        self._open.move_to_end(engine_id)

    def sample_ended(self, engine: Any, sampler: LiveSampler) -> None:
        """Count a sample request as ended; close idle samplers beyond the limit."""
        opened = self._open.get(sampler.engine_id)
        if opened is not None:
            opened.running -= 1
            opened.used_at = time.monotonic()
        idle = [engine_id for engine_id, opened in self._open.items() if not opened.running]
        for engine_id in idle[: max(0, len(self._open) - self._limits.open_samplers)]:
            self._close(engine, engine_id)

    def close_idle_samplers(self, engine: Any) -> None:
        """Free adapters that have not been sampled from for `Limits.idle_model_seconds`."""
        idle_since = time.monotonic() - self._limits.idle_model_seconds
        for engine_id, opened in list(self._open.items()):
            if not opened.running and opened.used_at < idle_since:
                self._close(engine, engine_id)

    def _close(self, engine: Any, engine_id: str) -> None:
        del self._open[engine_id]
        engine.close_sampler(engine_id)

    def close_session_samplers(self, engine: Any, session_id: str) -> None:
        """Remove the samplers of an ended session, with their own snapshots."""
        prefix = str(self._folder.samplers / f"{session_id}_sample_")
        for model_id, sampler in list(self._inflight.items()):
            if sampler.session_id == session_id:
                del self._inflight[model_id]
        for engine_id in [i for i in self._open if i.startswith(prefix)]:
            self._close(engine, engine_id)
        self._store.remove_samplers(session_id)
