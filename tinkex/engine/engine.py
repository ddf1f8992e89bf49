"""The engine: base models, the adapters that are trained on them, and samplers, by id.

Does not know about HTTP, users, sequence numbers or where files are kept. Single-threaded: one
thread makes all calls; only `base_info` may be called from others. Invalid arguments raise
ValueError with a full sentence. Long, because it is one class with every operation.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import torch
from torch import Tensor

from tinkex import types
from tinkex.engine import (
    checkpoints,
    cpu_attention,
    cpu_decoding,
    cpu_kernels,
    cpu_rows,
    finished_lora,
    int8,
    loading,
    lora,
    losses,
    optim,
)
from tinkex.engine.base_model import BaseModel, SamplingState
from tinkex.engine.block_decoding import BlockDecoding
from tinkex.engine.cpu_parallel import Workers, available_cores
from tinkex.engine.decode_graph import CudaCapture
from tinkex.engine.fast_path import FastModel, FastSampling
from tinkex.engine.memory import keep_freed_memory, total_memory
from tinkex.engine.row_operations import TORCH_ROWS, RowOperations
from tinkex.engine.sample_requests import OnToken, make_job
from tinkex.engine.sampler import Sampler
from tinkex.engine.training_pass import Pass, check_tokens, prepare

logger = logging.getLogger("tinkex.engine")

#: Fraction of the machine's memory that keys and values of running samples may take.
SAMPLING_SHARE = 0.25


@attrs.frozen
class BaseInfo:
    """Metadata of a base model.

    Attributes:
        tokenizer_id: from which clients load its tokenizer.
        tokenizer_source: where it is on this machine; "" if it is found by its id.
    """

    name: str
    architecture: str
    tokenizer_id: str
    vocab_size: int
    max_context_length: int
    tokenizer_source: str = ""

    @property
    def supported_model(self) -> types.SupportedModel:
        """The same as an entry of get_server_capabilities."""
        return types.SupportedModel(self.name, self.max_context_length)


@attrs.define(eq=False)
class _Loaded:
    """A base model in memory, and what its models and samplers share."""

    info: BaseInfo
    base: BaseModel
    workspace: lora.Workspace
    sampler: Sampler


@attrs.define(eq=False)
class _Model:
    """An adapter in training.

    Attributes:
        can_merge: whether passes may fold it into copies of the base model's matrices.
        version: counts changes of the weights.
    """

    loaded: _Loaded
    layout: lora.Layout
    weights: Tensor
    gradient: Tensor
    optimizer: optim.AdamW
    can_merge: bool
    version: int = 0

    @property
    def info(self) -> checkpoints.Info:
        return checkpoints.Info(self.loaded.info.name, self.layout.shape)


@attrs.frozen(eq=False)
class _Adapter:
    """A sampler: a base model and, unless it is the bare base, a finished adapter."""

    loaded: _Loaded
    finished: finished_lora.Finished | None


class Engine:
    """Base models, models and samplers in memory.

    Args:
        device: "auto" (an accelerator if there is one), "cpu", "cuda", ...
        threads: processor threads to compute with; None is all that the process may use.
        dtype: of base weights and activations: "auto" (float32 on a CPU, bfloat16 on an
            accelerator), "float32" or "bfloat16". Adapters and optimizers are always float32.
            "int8" is for sampling on a CPU only: matrices are rounded, so nothing is trained, and
            no log-probabilities of prompts are given.
        names: directories (or GGUF files) by name; only the name is shown to clients.
        weights_folder: where weights that do not fit in memory stay on disk; None refuses them.
        compiled: True decodes and attends with code that the machine's C compiler compiles
            (cpu_decoding.py, cpu_attention.py), on a CPU with such a compiler and for families of
            the fast path.
        in_blocks: True samples in blocks of steps with a static cache (block_decoding.py), for
            families of the fast path; None does so on CUDA only.

    Raises:
        ValueError: If the device cannot be used or the dtype is unknown.
    """

    def __init__(
        self,
        *,
        device: str = "auto",
        threads: int | None = None,
        dtype: str = "auto",
        names: Mapping[str, str] | None = None,
        weights_folder: Path | None = None,
        in_blocks: bool | None = None,
        compiled: bool = True,
    ) -> None:
        self._weights_folder = weights_folder
        self._directories = dict(names or {})
        self._names = {place: name for name, place in self._directories.items()}
        self._device = loading.device_of(device)
        self._dtype = loading.dtype_of(dtype, self._device)
        is_cuda = self._device.type == "cuda"
        self._in_blocks = is_cuda if in_blocks is None else in_blocks
        self._capture = CudaCapture(self._device) if is_cuda and self._in_blocks else None
        self._compiled = compiled and self._device.type == "cpu"
        if self._compiled:  # compiles while a model is being read, the first time on a machine
            threading.Thread(
                target=cpu_kernels.load_all, name="tinkex-compile", daemon=True
            ).start()
        self._is_rounded = dtype == loading.INT8
        self._workers = Workers(threads or available_cores(), on_cpu=self._device.type == "cpu")
        keep_freed_memory()
        self._bases: dict[str, _Loaded] = {}
        self._asked: dict[str, str] = {}  # requested name -> canonical name, of loaded base models
        self._models: dict[str, _Model] = {}
        self._samplers: dict[str, _Adapter] = {}
        self._tickets: dict[Hashable, Sampler] = {}
        self._adapters: weakref.WeakValueDictionary[tuple[str, str, int], finished_lora.Finished]
        self._adapters = weakref.WeakValueDictionary()

    # -- base models -------------------------------------------------------------------------

    def load_base(self, base_model: str) -> None:
        """Load "tiny", a Hugging Face directory or a hub id, unless it is loaded already.

        Raises:
            ValueError: With what was tried and what to do, when it cannot be loaded.
        """
        if not self.has_base(base_model):
            self.enter_base(base_model, self.read_base(base_model))

    def has_base(self, base_model: str) -> bool:
        """True if the base model is loaded. Looks at no file."""
        return base_model in self._asked

    def read_base(
        self, base_model: str, on_progress: loading.Progress = loading.no_progress
    ) -> loading.Loaded:
        """Read a base model for `enter_base`. May be called from any thread, as it changes nothing.

        Args:
            on_progress: called with the bytes read so far and the bytes of all weights; an
                exception that it raises stops the reading.

        Raises:
            ValueError: With what was tried and what to do, when it cannot be loaded.
        """
        name = self._canonical(base_model)
        source = self._directories.get(name, name)
        loaded = loading.load(source, self._device, self._dtype, on_progress, self._weights_folder)
        if self._is_rounded:
            loaded = attrs.evolve(loaded, base=_rounded(name, loaded.base))
        if self._compiled and isinstance(loaded.base, FastModel):
            loaded = attrs.evolve(loaded, base=_compiled(loaded.base))
        return attrs.evolve(loaded, name=name)

    def enter_base(self, base_model: str, loaded: loading.Loaded) -> None:
        """Make a base model that `read_base` has read available."""
        name = self._asked[base_model] = loaded.name
        if name not in self._bases:
            self._bases[name] = self._describe(name, loaded)

    def _canonical(self, base_model: str) -> str:
        """One name for one model: the given name of a directory, else `loading.canonical`."""
        if base_model in self._directories:
            return base_model
        place = loading.canonical(base_model)
        return self._names.get(place, place)

    def _describe(self, name: str, loaded: loading.Loaded) -> _Loaded:
        is_mapped = name in self._directories
        info = BaseInfo(
            name,
            loaded.architecture,
            name if is_mapped else loaded.tokenizer_id,
            loaded.base.vocab,
            loaded.base.context,
            loaded.tokenizer_id if is_mapped else "",
        )
        memory = int(total_memory(self._device) * SAMPLING_SHARE)
        new_state = self._state_maker(loaded.base, memory)
        operations: RowOperations = TORCH_ROWS
        if self._compiled:
            operations = cpu_rows.rows_for(self._device, torch.float32)
        sampler = Sampler(
            loaded.base, loaded.load_decode, memory, self._workers, new_state, operations
        )
        return _Loaded(info, loaded.base, lora.Workspace(), sampler)

    def _state_maker(
        self, base: BaseModel, memory: int
    ) -> Callable[[], SamplingState | BlockDecoding] | None:
        """What makes the sampling state of *base*; None for its own."""
        if not isinstance(base, FastModel):
            return None
        if self._in_blocks:
            return partial(BlockDecoding, base, self._workers, memory, self._capture)
        compiled = cpu_decoding.step_of(base) if self._compiled else None
        return partial(FastSampling, base, self._workers, compiled=compiled)

    def _check_exact(self, lacks: str) -> None:
        if self._is_rounded:
            raise ValueError(
                f"this server {lacks}: its weights are int8, which are for sampling. Use a server "
                "with another --dtype."
            )

    def base_info(self, base_model: str) -> BaseInfo:
        """Metadata of a loaded base model."""
        return self._base(base_model).info

    def _base(self, base_model: str) -> _Loaded:
        loaded = self._bases.get(self._asked.get(base_model, base_model))
        if loaded is None:
            there = ", ".join(sorted(self._bases)) or "none"
            raise ValueError(f"base model {base_model!r} is not loaded here; loaded are: {there}.")
        return loaded

    # -- models ------------------------------------------------------------------------------

    def create_model(
        self,
        model_id: str,
        base_model: str,
        lora_config: types.LoraConfig,
        *,
        seed: int,
        adapter: Path | None = None,
    ) -> None:
        """A new adapter: A from *seed*, B zero; or started from a PEFT *adapter* directory.

        A `train_unembed` of None adapts the head unless it is tied to the embedding and something
        else is adapted. PEFT's merge of an adapter of a tied head is wrong: it changes the
        embedding, too.

        Raises:
            ValueError: If the id is taken, or the adapter does not fit.
        """
        if model_id in self._models:
            raise ValueError(f"model {model_id!r} already exists; choose another id.")
        self._check_exact("trains no model")
        loaded = self._base(base_model)
        attn, mlp = lora_config.train_attn, lora_config.train_mlp
        unembed = lora_config.train_unembed
        if unembed is None:
            is_adapted = (
                adapter is not None
                and checkpoints.read_info(adapter, loaded.base.linears).shape.train_unembed
            )
            unembed = is_adapted or not (loaded.base.has_tied_head and (attn or mlp))
        shape = lora.Shape(lora_config.rank, attn, mlp, unembed)
        if shape.train_unembed and loaded.base.has_tied_head:
            logger.warning(
                "Model %s trains an adapter of the head, but the head of %s is tied to its "
                "embedding. PEFT's merge_and_unload would change the embedding, too; create the "
                "model with train_unembed=False if the adapter is to be merged by PEFT.",
                model_id,
                loaded.info.name,
            )
        layout = lora.Layout(loaded.base.linears, shape)
        weights = lora.initialise(layout, seed, self._device)
        if adapter is not None:
            checkpoints.read_adapter(adapter, layout, weights)
        self._models[model_id] = self._new_model(loaded, layout, weights)

    def _new_model(self, loaded: _Loaded, layout: lora.Layout, weights: Tensor) -> _Model:
        optimizer = optim.AdamW(layout.size, self._device)
        can_merge = lora.can_merge(layout.linears)
        return _Model(loaded, layout, weights, torch.zeros_like(weights), optimizer, can_merge)

    def lora_config(self, model_id: str) -> types.LoraConfig:
        """Rank and adapted groups of a model's adapter, with every default filled in."""
        shape = self._model(model_id).layout.shape
        return types.LoraConfig(
            shape.rank,
            train_unembed=shape.train_unembed,
            train_mlp=shape.train_mlp,
            train_attn=shape.train_attn,
        )

    def unload(self, model_id: str) -> None:
        """Forget a model."""
        self._model(model_id)
        del self._models[model_id]

    def _model(self, model_id: str) -> _Model:
        model = self._models.get(model_id)
        if model is None:
            raise ValueError(
                f"there is no model {model_id!r} on this server (any more); create one, or load "
                "a checkpoint into a new one."
            )
        return model

    # -- training ----------------------------------------------------------------------------

    @torch.no_grad()
    def forward_backward(
        self,
        model_id: str,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        *,
        forward_only: bool = False,
    ) -> Generator[None, None, types.ForwardBackwardOutput]:
        """Loss and log-probabilities of *data*; unless *forward_only*, add to the gradient.

        A generator: it yields where other work may run first, and returns the result. If it fails
        or is closed after the first yield, the gradient may be partial; call `clear_gradients`.

        Raises:
            ValueError: Before the gradient is touched, naming the datum and the fix.
        """
        self._check_exact("trains no model")
        model = self._model(model_id)
        config = losses.complete_config(loss_fn, loss_fn_config)
        types.check_data(data, loss_fn)
        check_tokens(data, model.loaded.base)
        inputs = prepare(data, loss_fn, config)
        loaded = model.loaded
        merges = model.can_merge and sum(map(len, inputs)) >= loaded.base.width // 2
        linears = lora.TrainedLinears(
            loaded.base.linears,
            model.layout,
            model.weights,
            None if forward_only else model.gradient,
            loaded.workspace if merges else None,
            (model, model.version),
        )
        run = Pass(
            loaded.base, linears, self._workers, inputs, loss_fn, config, forward_only=forward_only
        )
        for batch in run.batches:
            run.compute(batch)
            yield
        return run.output()

    def optim_step(self, model_id: str, params: types.AdamParams) -> types.OptimStepResponse:
        """One AdamW step on the accumulated gradient, which is then cleared.

        Raises:
            ValueError: If the gradient is not finite; it is dropped and the weights stay.
        """
        model = self._model(model_id)
        metrics = {}
        norm = float(torch.linalg.vector_norm(model.gradient))
        if not np.isfinite(norm):
            model.gradient.zero_()
            raise ValueError(
                f"the accumulated gradient has norm {norm}; the step was not taken and the "
                "gradient dropped. Look for extreme weights, advantages or logprobs in the data."
            )
        if norm == 0:
            metrics["no_gradient"] = 1.0  # nothing was accumulated; clients may warn
        if params.grad_clip_norm > 0:
            metrics["unclipped_grad_l2:mean"] = norm
            optim.clip_(model.gradient, norm, params.grad_clip_norm)
        model.optimizer.step(model.weights, model.gradient, params)
        model.gradient.zero_()
        model.version += 1
        return types.OptimStepResponse(metrics)

    def clear_gradients(self, model_id: str) -> None:
        """Drop the gradient accumulated since the last step."""
        self._model(model_id).gradient.zero_()

    # -- checkpoints -------------------------------------------------------------------------

    def save(self, model_id: str, directory: Path, *, optimizer: bool) -> None:
        """Write adapter (PEFT's format) and, if asked, optimizer into an empty directory."""
        model = self._model(model_id)
        checkpoints.write_adapter(directory, model.info, model.layout, model.weights)
        if optimizer:
            state = model.optimizer
            checkpoints.write_optimizer(directory, state.m, state.v, state.steps)

    def load(self, model_id: str, directory: Path, *, optimizer: bool) -> None:
        """Load a checkpoint's weights, and its optimizer state or else a fresh one.

        Raises:
            ValueError: If it does not fit the model, or holds no optimizer state.
        """
        model = self._model(model_id)
        info = checkpoints.read_info(directory, model.loaded.base.linears)
        if info.shape != model.layout.shape:
            raise ValueError(
                f"the checkpoint {str(directory)!r} is of {info.shape.words}, the model of "
                f"{model.layout.shape.words}; create the model to match."
            )
        checkpoints.check_base(info, model.loaded.info.name, directory)
        weights = torch.zeros_like(model.weights)
        checkpoints.read_adapter(directory, model.layout, weights)
        fresh = optim.AdamW(model.layout.size, self._device)
        if optimizer:
            fresh.m, fresh.v, fresh.steps = self._optimizer_state(directory, model.layout.size)
        model.weights, model.optimizer = weights, fresh
        model.gradient.zero_()
        model.version += 1

    def _optimizer_state(self, directory: Path, size: int) -> tuple[Tensor, Tensor, int]:
        m, v, steps = checkpoints.read_optimizer(directory)
        if m.shape != (size,) or v.shape != (size,):
            raise ValueError(
                f"the optimizer state in {str(directory)!r} is of {m.numel()} parameters, the "
                f"model has {size}."
            )
        return m.to(self._device), v.to(self._device), steps

    def snapshot(self, model_id: str, directory: Path) -> None:
        """Write everything live - weights, optimizer, gradient - into an empty directory."""
        model = self._model(model_id)
        state = model.optimizer
        tensors = {
            "weights": model.weights,
            "gradient": model.gradient,
            "m": state.m,
            "v": state.v,
            "steps": torch.tensor(state.steps),
        }
        checkpoints.write_live(directory, model.info, tensors)

    def restore(self, model_id: str, directory: Path) -> None:
        """Restore a model from its snapshot; create the model if it does not exist."""
        info, tensors = checkpoints.read_live(directory)
        loaded = self._base(info.base_model)
        layout = lora.Layout(loaded.base.linears, info.shape)
        if tensors["weights"].shape != (layout.size,):
            raise ValueError(f"the snapshot {str(directory)!r} is of another base model.")
        tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        model = self._new_model(loaded, layout, tensors["weights"])
        model.gradient = tensors["gradient"]
        model.optimizer.m, model.optimizer.v = tensors["m"], tensors["v"]
        model.optimizer.steps = int(tensors["steps"])
        self._models[model_id] = model

    # -- sampling ----------------------------------------------------------------------------

    def open_sampler(
        self, sampler_id: str, base_model: str, *, directory: Path | None = None
    ) -> None:
        """A sampler of the adapter in *directory*, or of the bare base model.

        Raises:
            ValueError: If the id is taken, or the adapter cannot be read or does not fit.
        """
        if sampler_id in self._samplers:
            raise ValueError(f"sampler {sampler_id!r} already exists; choose another id.")
        loaded = self._base(base_model)
        finished = None if directory is None else self._finished(loaded, directory)
        self._samplers[sampler_id] = _Adapter(loaded, finished)

    def _finished(self, loaded: _Loaded, directory: Path) -> finished_lora.Finished:
        """The adapter in *directory*; one copy for all samplers of it."""
        info = checkpoints.read_info(directory, loaded.base.linears)
        checkpoints.check_base(info, loaded.info.name, directory)
        file = (directory / checkpoints.ADAPTER).resolve()
        key = (loaded.info.name, str(file), file.stat().st_mtime_ns)
        finished = self._adapters.get(key)
        if finished is None:
            layout = lora.Layout(loaded.base.linears, info.shape)
            flat = torch.zeros(layout.size, device=self._device)
            checkpoints.read_adapter(directory, layout, flat)
            finished = finished_lora.Finished(layout, flat, loaded.base.dtype)
            self._adapters[key] = finished
        return finished

    def close_sampler(self, sampler_id: str) -> None:
        """Forget a sampler; requests already submitted are still answered."""
        self._sampler(sampler_id)
        del self._samplers[sampler_id]

    def _sampler(self, sampler_id: str) -> _Adapter:
        adapter = self._samplers.get(sampler_id)
        if adapter is None:
            raise ValueError(
                f"there is no sampler {sampler_id!r} on this server (any more); create a new "
                "sampling client."
            )
        return adapter

    def unread_tokenizer(
        self, base_model: str, request: types.SampleRequest
    ) -> Callable[[], None] | None:
        """A callable that loads the tokenizer that stop strings need; None if nothing is to be
        loaded.

        Call it from any thread. Otherwise `submit_sample` loads it and blocks the engine's thread.
        """
        return self._base(base_model).sampler.unread_decoder(request.sampling_params.stop)

    def submit_sample(
        self,
        ticket: Hashable,
        sampler_id: str,
        request: types.SampleRequest,
        *,
        on_token: OnToken | None = None,
        share: Hashable = None,
    ) -> None:
        """Queue a request; `sample_step` returns *ticket* with its answer.

        Args:
            share: the share of the running batch that it counts towards. Shares take turns, and
                none can fill the batch while another waits.
            on_token: called with (sequence, token id, logprob) as tokens appear.

        Raises:
            ValueError: If the request does not fit the model.
        """
        adapter = self._sampler(sampler_id)
        job = make_job(ticket, request, adapter.finished, adapter.loaded.base, on_token, share)
        if job.wants_scores:
            self._check_exact("gives no log-probabilities of prompts")
        adapter.loaded.sampler.submit(job)
        self._tickets[ticket] = adapter.loaded.sampler

    def sample_step(self) -> list[tuple[Hashable, types.SampleResponse | Exception]]:
        """Admit waiting requests, advance running sequences by a token, return the outcomes."""
        done = []
        for loaded in self._bases.values():
            if loaded.sampler.is_busy:
                done += loaded.sampler.step()
        for ticket, _ in done:
            self._tickets.pop(ticket, None)
        return done

    def cancel_sample(self, ticket: Hashable) -> None:
        """Drop a request; nothing happens if it is not there."""
        sampler = self._tickets.pop(ticket, None)
        if sampler is not None:
            sampler.cancel(ticket)

    def free_idle(self) -> None:
        """Free caches that only make the next operation faster. Call it when nothing runs."""
        for loaded in self._bases.values():
            loaded.workspace.clear()
            loaded.sampler.free_idle()

    @property
    def has_samples(self) -> bool:
        """True if `sample_step` has something to do."""
        return any(loaded.sampler.is_busy for loaded in self._bases.values())


def _rounded(name: str, base: BaseModel) -> BaseModel:
    """The base model with matrices of 8 bits.

    Raises:
        ValueError: If the model is on the generic path.
    """
    if not isinstance(base, FastModel):
        raise ValueError(
            f"base model {name!r} cannot be rounded to int8: its family is computed by "
            "transformers' own code. Use a server with another --dtype."
        )
    return attrs.evolve(base, linears=int8.quantized(base.linears))


def _compiled(base: FastModel) -> FastModel:
    """The base model with compiled operations, where this machine and the model support them."""
    attention = cpu_attention.kernel_for(base.device, base.dtype, base.spec.head_dim)
    return attrs.evolve(base, attention=attention, rows=cpu_rows.rows_for(base.device, base.dtype))
