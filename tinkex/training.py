"""TrainingClient: one model, trained by operations that run in the order of the calls.

Defines the operations of a model and the checks of their arguments. runtime/model_queue.py and
worker.py send them in order, polling.py waits for results. Long, because it is one class, mostly
documentation of public methods.
"""

from __future__ import annotations

import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import attrs

from tinkex import config, errors, types, wire
from tinkex.futures import (
    OperationFuture,
    awaits_future,
    awaits_result,
    awaits_value,
    gather,
)
from tinkex.runtime import batching, custom_loss
from tinkex.runtime.connection import connect
from tinkex.runtime.ending import exit_timeout, is_normal_end
from tinkex.runtime.model_queue import ModelQueue
from tinkex.runtime.new_model import check_base_model, create_model
from tinkex.runtime.queue_state import PauseWarning, QueueStateObserver, check_observer
from tinkex.runtime.retry import Retry, check_retry
from tinkex.runtime.session import Session
from tinkex.runtime.worker import Turn
from tinkex.sampling import SamplingClient, SamplingClientFuture

if TYPE_CHECKING:
    from tinkex.text import tokenizer

logger = logging.getLogger("tinkex")

#: Reasons of pauses, if the server gives none.
PAUSE_REASONS = {
    "paused_rate_limit": "concurrent training clients rate limit hit",
    "paused_capacity": "Tinker backend is running short on capacity, please wait",
}


@attrs.frozen
class ClientSpec:
    """The arguments with which a supervisor (re)starts a training client; picklable, without
    secrets.

    The key is taken from the environment where `start` is called.

    Attributes:
        options: of `TrainingClient.start`.
        restart: "temporary": a client that ended is not restarted automatically, because its
            model's state is on the server and only its owner knows where to resume.
        shutdown: seconds to give `close`.
    """

    options: Mapping[str, Any]
    restart: str = "temporary"
    shutdown: float = 5.0

    def start(self) -> TrainingClient:
        """Start a new client with these options."""
        return TrainingClient.start(**self.options)


class TrainingClient(types.Ready):
    """One model on the server: a LoRA adapter in training.

    Operations return a future at once. They run in the order of the calls: from one thread in the
    order it makes them, from several in the order in which the calls return. When one cannot be
    submitted, those called after it fail, too (`PriorOperationFailedError`), until you have seen
    the failure; so an optimizer step never follows gradients that did not arrive.

    Make one with `ServiceClient.create_lora_training_client` or `TrainingClient.start`; close it,
    or use it as a context manager. Leaving the block by an exception cancels what is not sent.
    """

    def __init__(
        self,
        session: Session,
        model_id: str,
        *,
        base_model: str | None = None,
        queue_state_observer: QueueStateObserver | None = None,
        first_seq_id: int = 1,
        owns_session: bool = False,
        name: str | None = None,
    ) -> None:
        self.model_id = model_id
        self.name = name
        self._session = session
        self._base_model = base_model
        self._warn_of_pause = PauseWarning(
            f"Training is paused for {model_id}", PAUSE_REASONS, session.transport.waits.now
        )
        self._queue = ModelQueue(
            session,
            model_id,
            name=name or model_id,
            on_queue_state=queue_state_observer or self._warn_of_pause,
            first_seq_id=first_seq_id,
            owns_session=owns_session,
        )
        self._lock = threading.Lock()  # guards the two below
        self._info: types.GetInfoResponse | None = None
        #: True if there may be an accumulated gradient on the server; an attached model may have an
        #: earlier one.
        self._has_gradient = first_seq_id > 1

    # Starting.

    @classmethod
    def start(
        cls,
        base_model: str | None = None,
        *,
        model_id: str | None = None,
        lora_config: types.LoraConfig | Mapping[str, Any] | None = None,
        user_metadata: dict[str, Any] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        session_id: str | None = None,
        model_seq_id: int | None = None,
        seq_id: int = 0,
        name: str | None = None,
        queue_state_observer: QueueStateObserver | None = None,
        patience: config.Patience | None = None,
        adapter: str | None = None,
        config: config.Config | None = None,
    ) -> TrainingClient:
        """Create a model in a new session, or attach to an existing one.

        Args:
            base_model: of the new model; required without model_id.
            model_id: attach to this model; nothing is created.
            lora_config: of the new model's adapter; a LoraConfig, or a dict of its fields.
            base_url, api_key: of the server; without them (and without TINKER_*) the embedded
                engine.
            patience, config: as for `ServiceClient`.
            session_id: use this session of the server instead of a new one.
            model_seq_id: number of the new model in the session; by default the next one.
            seq_id: with model_id, the number of the last operation sent to it.
            name: of the client, in thread names and reprs.

        Raises:
            ValueError, TypeError: For invalid arguments, before anything is sent.
            TinkexError: If the server cannot be reached or refuses.
        """
        if model_id is None:
            check_base_model(base_model)
        lora_config = _check_start(model_id, seq_id, model_seq_id, lora_config)
        user_metadata = types.check_metadata(user_metadata)
        check_observer(queue_state_observer)
        settings, engine = connect(base_url, api_key, settings=config, patience=patience)
        session = Session(settings, session_id=session_id, engine=engine)
        options: dict[str, Any] = {
            "queue_state_observer": queue_state_observer,
            "owns_session": True,
            "name": name,
        }
        try:
            if model_id is not None:
                return cls(session, model_id, first_seq_id=seq_id + 1, **options)
            return cls.create(
                session,
                str(base_model),
                lora_config,
                user_metadata=user_metadata,
                model_seq_id=model_seq_id,
                adapter=adapter,
                **options,
            )
        except BaseException:
            session.close("errored")
            raise

    @classmethod
    def spec(cls, base_model: str | None = None, **options: Any) -> ClientSpec:
        """A `ClientSpec` with these arguments of `start`, for a supervisor.

        Raises:
            ValueError: If it would contain a secret (api_key), or names neither a base model nor a
                model.
        """
        if "api_key" in options:
            raise ValueError(
                "a spec is pickled and logged, so it takes no api_key; set TINKER_API_KEY where "
                "the client is started."
            )
        if options.get("model_id") is None:
            check_base_model(base_model)
        known = inspect.signature(cls.start).parameters
        for name, value in options.items():
            if name not in known:
                raise TypeError(
                    f"{name} is not an option of TrainingClient.start ({', '.join(known)})."
                )
            _check_picklable(name, value)
        return ClientSpec({"base_model": base_model, **options})

    @classmethod
    def create(
        cls,
        session: Session,
        base_model: str,
        lora_config: types.LoraConfig,
        *,
        user_metadata: dict[str, Any] | None = None,
        model_seq_id: int | None = None,
        adapter: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
        **options: Any,
    ) -> TrainingClient:
        """Create a model in *session*. The number of a refused model is reused."""
        made = create_model(
            session,
            base_model,
            lora_config,
            user_metadata=user_metadata,
            model_seq_id=model_seq_id,
            adapter=adapter,
            optimizer_config=types.optimizer_config(optimizer),
        )
        return cls(session, made.model_id, base_model=base_model, **options)

    @property
    def server(self) -> config.Config:
        """Settings for another client of the same server: `ServiceClient(config=training.server)`.

        Without an address for the embedded engine, which a new client starts again.
        """
        settings = self._session.config
        if self._session.engine is None:
            return settings
        return attrs.evolve(settings, base_url="", api_key="")

    # Training.

    def forward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """Compute the loss of *data* and its log-probabilities; gradients do not change.

        Args:
            data: any number of datums; sent in several requests if needed.
            loss_fn: a name in `types.LOSS_FUNCTIONS`.
            loss_fn_config: its settings.
            poll_timeout: seconds until the future fails with APITimeoutError; None is never.

        Raises:
            ValueError, TypeError: Naming the datum, the input and the fix; nothing is sent.
        """
        return self._batches(wire.FORWARD, data, loss_fn, loss_fn_config, poll_timeout)

    def forward_backward(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """Compute the loss of *data*, and add its gradients to the model's.

        Arguments and errors as for `forward`.
        """
        return self._batches(wire.FORWARD_BACKWARD, data, loss_fn, loss_fn_config, poll_timeout)

    forward_async = awaits_future(forward)
    forward_backward_async = awaits_future(forward_backward)

    def forward_backward_custom(
        self,
        data: Sequence[types.Datum],
        loss_fn: custom_loss.LossFunction,
        *,
        loss_type_input: str | None = None,
        framework: str | None = None,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """Train on a custom loss, computed locally from the log-probabilities of the targets.

        Both passes have one place in the queue: the next call is sent after both.

        Args:
            data: datums with target_tokens (other inputs are only for your function).
            loss_fn: called once, on another thread, with (data, logprobs): an array for each
                datum, in the shape of its target_tokens. Returns (loss, metrics), or (loss,
                metrics, gradients) with d loss / d logprobs for each datum.
            loss_type_input: "logprobs", the only kind of input, or None.
            framework: "torch", "autograd" or "jax" passes arrays of the framework and
                differentiates; "numpy" uses your gradients; None uses torch if it is installed,
                else autograd, else your gradients.

        Raises:
            ValueError, TypeError, MissingExtraError: Before anything is sent. Exceptions of loss_fn
                are raised unchanged by the future, and no gradient is sent.
        """
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (data, logprobs), got {loss_fn!r}.")
        if loss_type_input not in (None, "logprobs"):
            raise ValueError(
                f'loss_type_input must be "logprobs" or None, got {loss_type_input!r}.'
            )
        if isinstance(loss_fn, custom_loss.LossHandle):
            framework = framework or "torch"
            if loss_fn.session_id != self._session.session_id:
                raise ValueError(
                    f"the loss {loss_fn.name!r} was made in session {loss_fn.session_id}; make it "
                    "with the ServiceClient of this client."
                )
        chosen = custom_loss.check(data, framework)
        config.check_seconds("poll_timeout", poll_timeout, or_none=True)
        data = list(data)
        forward_data = custom_loss.forward_data(data)
        what = f"forward_backward_custom on {self.model_id}"

        def run(turn: Turn, future: OperationFuture[types.ForwardBackwardOutput]) -> None:
            first = self._queue.send_batches(
                turn, wire.FORWARD, forward_data, "cross_entropy", None, what, poll_timeout
            )
            joined: OperationFuture[types.ForwardBackwardOutput] = OperationFuture(what)
            gather(first, batching.join, joined)
            logprobs = custom_loss.logprobs_of(turn.wait_for(joined), data)
            loss = custom_loss.evaluate(data, logprobs, loss_fn, chosen)
            second = self._queue.send_batches(
                turn, wire.FORWARD_BACKWARD, loss.data, "cross_entropy", None, what, poll_timeout
            )
            gather(
                second,
                lambda outputs: custom_loss.with_metrics(batching.join(outputs), loss),
                future,
            )

        future = self._queue.put(run, what, partial(_count_tokens, data))
        self._note_gradient(True)
        return future

    forward_backward_custom_async = awaits_future(forward_backward_custom)

    def optim_step(
        self,
        optim_params: types.OptimParams | Mapping[str, float] | None = None,
        *,
        adam_params: types.AdamParams | Mapping[str, float] | None = None,
        learning_rate: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        eps: float | None = None,
        weight_decay: float | None = None,
        grad_clip_norm: float | None = None,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.OptimStepResponse]:
        """Apply the accumulated gradients by one AdamW step, and clear them.

        Logs a warning if no `forward_backward` was called since the last step: then there is no
        gradient to apply. The embedded engine also sets the metric "no_gradient" in the result.

        Args:
            optim_params: an AdamParams, or a dict of its fields; None uses the defaults. For a
                model with another optimizer, its params.
            adam_params: alias of optim_params.
            learning_rate, beta1, beta2, eps, weight_decay, grad_clip_norm: single fields of
                AdamParams, as in `optim_step(learning_rate=1e-4)`; they replace those of
                *optim_params*.

        Raises:
            ValueError, TypeError: For values that AdamParams does not accept; nothing is sent.
        """
        fields = {
            "learning_rate": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_clip_norm": grad_clip_norm,
        }
        if optim_params is not None and adam_params is not None:
            raise TypeError("adam_params is another name of optim_params; give only one.")
        given = adam_params if optim_params is None else optim_params
        if isinstance(given, types.DimuonParams):
            step = partial(types.OptimStepRequest, adam_params=None, optimizer_params=given)
            if any(value is not None for value in fields.values()):
                raise TypeError("single fields are those of AdamParams; set them in DimuonParams.")
        else:
            params = types.as_params(types.AdamParams, given, "optim_params", **fields)
            step = partial(types.OptimStepRequest, adam_params=params)
        future = self._queue.operation(
            wire.OPTIM_STEP,
            lambda seq_id: step(self.model_id, seq_id),
            poll_timeout,
        )
        if not self._note_gradient(False):
            logger.warning(
                "optim_step on %s: no forward_backward was called since the last step, so there "
                "is no gradient to apply",
                self.model_id,
            )
        return future

    optim_step_async = awaits_future(optim_step)

    def _note_gradient(self, is_there: bool) -> bool:
        """Record whether the model has a gradient now; returns the previous value."""
        with self._lock:
            before, self._has_gradient = self._has_gradient, is_there
        return before

    # Saving and loading.

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, Any] | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.SaveWeightsResponse]:
        """Save weights and optimizer under *name*; the result's `path` loads them again.

        Args:
            ttl_seconds: when the server may delete it; None is never.
            overwrite: replace an existing checkpoint with this name.
        """
        name, ttl_seconds = types.check_name(name), types.check_ttl(ttl_seconds)
        user_metadata = types.check_metadata(user_metadata)
        if not isinstance(overwrite, bool):
            raise TypeError(f"overwrite must be True or False, got {overwrite!r}.")
        return self._queue.operation(
            wire.SAVE_WEIGHTS,
            lambda seq_id: types.SaveWeightsRequest(
                self.model_id, seq_id, name, ttl_seconds, overwrite, user_metadata
            ),
            poll_timeout,
            saves=f"save_state({name!r}) of {self.model_id}",
        )

    save_state_async = awaits_future(save_state)

    def load_state(
        self,
        path: str,
        weights_access_token: str | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.LoadWeightsResponse]:
        """Load the weights saved at *path* (tinker://...); the optimizer starts from zero.

        Args:
            weights_access_token: a key that may read the checkpoint, if this client's may not.
        """
        return self._load(path, False, weights_access_token, poll_timeout)

    load_state_async = awaits_future(load_state)

    def load_state_with_optimizer(
        self,
        path: str,
        weights_access_token: str | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.LoadWeightsResponse]:
        """Load weights and optimizer saved at *path* (tinker://...).

        Args:
            weights_access_token: a key that may read the checkpoint, if this client's may not.
        """
        return self._load(path, True, weights_access_token, poll_timeout)

    load_state_with_optimizer_async = awaits_future(load_state_with_optimizer)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, Any] | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.SaveWeightsForSamplerResponse]:
        """Save the weights, without optimizer, for sampling clients."""
        name, ttl_seconds = types.check_name(name), types.check_ttl(ttl_seconds)
        user_metadata = types.check_metadata(user_metadata)
        return self._queue.operation(
            wire.SAVE_WEIGHTS_FOR_SAMPLER,
            lambda seq_id: types.SaveWeightsForSamplerRequest(
                self.model_id,
                seq_id,
                path=name,
                ttl_seconds=ttl_seconds,
                user_metadata=user_metadata,
            ),
            poll_timeout,
            saves=f"save_weights_for_sampler({name!r}) of {self.model_id}",
        )

    save_weights_for_sampler_async = awaits_future(save_weights_for_sampler)

    def save_weights_external(
        self,
        name: str,
        ttl_seconds: int | None = None,
        age_encryption_recipients: Sequence[str] | None = None,
        *,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.SaveWeightsExternalResponse]:
        """Save the weights as files with URLs from `RestClient.get_external_weights_urls`.

        Args:
            ttl_seconds: when the server may delete them; None is never.
            age_encryption_recipients: up to 10 public keys (`age1...`, or SSH's); every file is
                encrypted to them and gets the suffix `.age`. None leaves the files readable.
        """
        name, ttl_seconds = types.check_name(name), types.check_ttl(ttl_seconds)
        recipients = types.check_recipients(age_encryption_recipients)
        return self._queue.operation(
            wire.SAVE_WEIGHTS_EXTERNAL,
            lambda seq_id: types.SaveWeightsExternalRequest(
                self.model_id, seq_id, name, ttl_seconds, recipients
            ),
            poll_timeout,
            saves=f"save_weights_external({name!r}) of {self.model_id}",
        )

    save_weights_external_async = awaits_future(save_weights_external)

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
        kind: types.SamplingClientKind = "snapshot",
        *,
        path: str | None = None,
        ttl_seconds: int | None = None,
        poll_timeout: float | None = None,
    ) -> SamplingClientFuture:
        """A sampling client of the current weights, whatever is trained later.

        The future can also be used as the client: it then waits for it.

        Args:
            name: keep the weights as a checkpoint with this name; None keeps them only during the
                session.
            retry_config: when a failed request is sent again.
            record_stability_info: as for `ServiceClient.create_sampling_client`.
            kind: "snapshot": fixed weights; or "inflight": weights that a server may replace by
                newer ones while samples are running.
            path: alias of *name*.
        """
        if name is not None and path is not None:
            raise TypeError("path is another name of the argument name; give only one.")
        name = path if name is None else name
        if name is not None:
            types.check_name(name)
        if kind not in ("snapshot", "inflight"):
            raise ValueError(f'kind must be "snapshot" or "inflight", got {kind!r}.')
        ttl_seconds = types.check_ttl(ttl_seconds)
        check_retry(retry_config)
        config.check_seconds("poll_timeout", poll_timeout, or_none=True)
        what = f"save_weights_and_get_sampling_client of {self.model_id}"
        options = {"retry_config": retry_config, "record_stability_info": record_stability_info}

        def run(turn: Turn, future: OperationFuture[SamplingClient]) -> None:
            saved: OperationFuture[types.SaveWeightsForSamplerResponse]
            saved = OperationFuture(what, turn.progress)
            self._save_for_sampler(turn, saved, name, kind, ttl_seconds, poll_timeout)
            gather([saved], lambda r: self._sampler_of(r[0], **options), future)

        future = self._queue.put(run, what, saves=what, make=SamplingClientFuture)
        return cast(SamplingClientFuture, future)

    save_weights_and_get_sampling_client_async = awaits_result(save_weights_and_get_sampling_client)

    def _save_for_sampler(
        self,
        turn: Turn,
        saved: OperationFuture[types.SaveWeightsForSamplerResponse],
        path: str | None,
        kind: str,
        ttl_seconds: int | None,
        poll_timeout: float | None,
    ) -> None:
        """Send the save; one without a name uses a number of the session, if it is accepted."""

        def send(seq_id: int) -> None:
            numbers = self._session.sampler_numbers
            with nullcontext() if path is not None else numbers.lent() as number:
                request = types.SaveWeightsForSamplerRequest(
                    self.model_id,
                    seq_id,
                    path=path,
                    sampling_session_seq_id=number,
                    kind=kind,
                    ttl_seconds=ttl_seconds,
                )
                self._queue.start(wire.SAVE_WEIGHTS_FOR_SAMPLER, request, saved, poll_timeout)

        turn.send(send)

    def save_weights_and_get_sampling_client_sync(
        self, name: str | None = None, **options: Any
    ) -> SamplingClient:
        """`save_weights_and_get_sampling_client`, but waits for the client."""
        return self.save_weights_and_get_sampling_client(name, **options).result()

    def _sampler_of(
        self, saved: types.SaveWeightsForSamplerResponse, **options: Any
    ) -> SamplingClient:
        if saved.sampling_session_id is not None:
            return SamplingClient(
                self._session,
                saved.sampling_session_id,
                base_model=self._base_model,
                **options,
            )
        if saved.path is None:
            raise errors.APIResponseValidationError(
                "save_weights_for_sampler returned neither path nor session"
            )
        # Not with self.create_sampling_client: this client may have been closed meanwhile.
        return SamplingClient.create(
            self._session,
            model_path=saved.path,
            tokenizer_model=self._base_model,
            **options,
        )

    def create_sampling_client(
        self,
        model_path: str,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """A sampling client of the weights saved at *model_path*.

        Other arguments as for `ServiceClient.create_sampling_client`.
        """
        types.ParsedCheckpointTinkerPath.from_tinker_path(model_path)
        self._queue.check_open("create_sampling_client")
        return SamplingClient.create(
            self._session,
            model_path=model_path,
            tokenizer_model=self._base_model,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    def create_sampling_client_async(
        self,
        model_path: str,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
    ) -> OperationFuture[SamplingClient]:
        """`create_sampling_client`, as a future."""
        self._queue.check_open("create_sampling_client")
        types.ParsedCheckpointTinkerPath.from_tinker_path(model_path)
        check_retry(retry_config)
        create = partial(
            self.create_sampling_client, model_path, retry_config, record_stability_info
        )
        return self._session.in_background(create, f"create_sampling_client of {model_path}")

    # Lookups.

    def get_info(self) -> types.GetInfoResponse:
        """The server's description of this model; requested once."""
        self._queue.check_open("get_info")
        with self._lock:
            info = self._info
        if info is None:
            request = types.GetInfoRequest(self.model_id)
            info = self._session.call(wire.GET_INFO, request)
            with self._lock:
                self._info = info
        return info

    get_info_async = awaits_value(get_info)

    def get_console_url(self) -> str:
        """The model's page in the official service's console; on other servers, its API address."""
        return self._session.config.console_url("training_runs", self.model_id)

    def get_tokenizer(
        self,
        *,
        load_fn: tokenizer.LoadFunction | None = None,
        info_fn: Callable[[TrainingClient], types.GetInfoResponse] | None = None,
        load_fun: tokenizer.LoadFunction | None = None,
        info_fun: Callable[[TrainingClient], types.GetInfoResponse] | None = None,
    ) -> Any:
        """The model's tokenizer: an object with encode(text) and decode(ids).

        Args:
            load_fn: loads it from its id; None loads it from the hub or a folder.
            info_fn: returns the model's info; None requests it from the server.
            load_fun, info_fun: aliases of these two.

        Raises:
            TypeError: If one of them is not a function, or is given under both names.
            TokenizerError: If it cannot be loaded, with what was tried.
        """
        from tinkex.text import tokenizer  # only here: many scripts send tokens

        load_fn = tokenizer.same_argument("load_fn", load_fn, "load_fun", load_fun)
        info_fn = tokenizer.same_argument("info_fn", info_fn, "info_fun", info_fun)
        tokenizer.check_load_fn(load_fn)
        if info_fn is not None and not callable(info_fn):
            raise TypeError(f"info_fn must be a function of this client, got {info_fn!r}.")
        info = info_fn(self) if info_fn is not None else self.get_info()
        name = info.base_model or self._base_model or "unknown"
        identifier = tokenizer.tokenizer_id(name, info.model_data.tokenizer_id)
        return tokenizer.load(identifier, load_fn=load_fn)

    def encode(self, text: str, **options: Any) -> list[int]:
        """Token ids of *text*, by the model's tokenizer; options as for `get_tokenizer`."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}.")
        ids: list[int] = self.get_tokenizer(**options).encode(text)
        return ids

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, **options: Any
    ) -> str:
        """Text of token ids, by the model's tokenizer.

        Args:
            skip_special_tokens: omit special tokens, such as the one that ends a text.
            options: as for `get_tokenizer`.
        """
        settings = {"skip_special_tokens": True} if skip_special_tokens else {}
        text: str = self.get_tokenizer(**options).decode(ids, **settings)
        return text

    def get_telemetry(self) -> Any:
        """The telemetry reporter of the session, or None where telemetry is off (the default)."""
        return self._session.telemetry

    # Ending.

    def unload_model(self) -> OperationFuture[types.UnloadModelResponse]:
        """Unload the model on the server, after all earlier calls.

        Later calls raise ClientClosedError. If the client owns the session
        (`TrainingClient.start`), it ends, too.

        Raises (from the future):
            NotOfferedError: If the server has no such endpoint; the model then ends with the
                session.
        """
        return self._queue.unload()

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Wait for submitted operations, and end the client's thread. Safe to call twice.

        Args:
            cancel: do not wait; cancel unsent operations. Sent operations still resolve, unless the
                client owns the session.
            timeout: time limit in seconds, by default `patience.close`. Then unsent operations are
                dropped.

        Raises:
            ClientClosedError: If operations were not finished in time, with their number. Only
                logged while another exception is being handled, and with cancel.
        """
        self._queue.close(cancel=cancel, timeout=timeout)

    def __enter__(self) -> TrainingClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(cancel=not is_normal_end(exc), timeout=exit_timeout(exc))

    def __repr__(self) -> str:
        return f"<TrainingClient {self.name or self.model_id} [{self._queue.state}]>"

    # Queue state.

    def on_queue_state_change(
        self, queue_state: str, queue_state_reason: str | None = None
    ) -> None:
        """The default observer: warns that training is paused, at most once a minute."""
        self._warn_of_pause(queue_state, queue_state_reason)

    # Submitting.

    def _batches(
        self,
        operation: wire.Operation[types.ForwardBackwardOutput],
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        poll_timeout: float | None,
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        data, settings = self._checked(data, loss_fn, loss_fn_config)
        config.check_seconds("poll_timeout", poll_timeout, or_none=True)
        what = f"{operation.path} on {self.model_id}"

        def run(turn: Turn, future: OperationFuture[types.ForwardBackwardOutput]) -> None:
            parts = self._queue.send_batches(
                turn, operation, data, loss_fn, settings, what, poll_timeout
            )
            gather(parts, batching.join, future)

        result = self._queue.put(run, what, partial(_count_tokens, data))
        if operation is wire.FORWARD_BACKWARD:
            self._note_gradient(True)
        return result

    def _checked(
        self,
        data: Sequence[types.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
    ) -> tuple[list[types.Datum], dict[str, float | str] | None]:
        """The checked arguments of a batch; copies the list, because the caller may change it."""
        settings = types.check_config(loss_fn, loss_fn_config)
        types.check_data(data, loss_fn)
        return list(data), settings

    def _load(
        self,
        path: str,
        optimizer: bool,
        weights_access_token: str | None,
        poll_timeout: float | None,
    ) -> OperationFuture[types.LoadWeightsResponse]:
        types.ParsedCheckpointTinkerPath.from_tinker_path(path)
        if weights_access_token is not None and not isinstance(weights_access_token, str):
            raise TypeError("weights_access_token must be a str or None.")
        return self._queue.operation(
            wire.LOAD_WEIGHTS,
            lambda seq_id: types.LoadWeightsRequest(
                path,
                optimizer,
                model_id=self.model_id,
                seq_id=seq_id,
                weights_access_token=weights_access_token,
            ),
            poll_timeout,
        )


def _count_tokens(data: list[types.Datum]) -> int:
    """Text tokens that the model reads."""
    return sum(batching.count_tokens(datum.model_input) for datum in data)


def _check_start(
    model_id: object, seq_id: object, model_seq_id: object, lora_config: object
) -> types.LoraConfig:
    """Check the options of `start` that are not checked elsewhere."""
    if model_id is not None and (not isinstance(model_id, str) or not model_id):
        raise TypeError(f"model_id must be the id of a model on the server, got {model_id!r}.")
    for name, value in (("seq_id", seq_id), ("model_seq_id", model_seq_id)):
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not is_number and (name == "seq_id" or value is not None):
            raise ValueError(f"{name} must be an integer >= 0, got {value!r}.")
    return types.as_params(types.LoraConfig, lora_config, "lora_config")


def _check_picklable(name: str, value: object) -> None:
    try:
        pickle.dumps(value)
    except Exception as exc:  # pickling may raise anything
        raise ValueError(
            f"{name}={value!r} cannot be pickled ({exc}), and a spec must be: give a function of a "
            "module rather than a lambda, or set it where the client is started."
        ) from exc
