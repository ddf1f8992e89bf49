"""ServiceClient: opens a session on a server, and creates the other clients.

This is the entry point. With neither a URL nor a key it starts the embedded engine. Long, because
it is one class, mostly documentation of public methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs
import requests

from tinkex import types, wire
from tinkex.config import Config, Patience, SamplingLimits
from tinkex.futures import OperationFuture, awaits_value
from tinkex.runtime.connection import HURRIED_TIMEOUT, connect
from tinkex.runtime.custom_loss import LossHandle, make_handle
from tinkex.runtime.ending import is_normal_end
from tinkex.runtime.new_model import check_base_model
from tinkex.runtime.queue_state import QueueStateObserver, check_observer
from tinkex.runtime.restore import check_restore, copy_headers, restore
from tinkex.runtime.retry import Retry
from tinkex.runtime.session import Session
from tinkex.sampling import SamplingClient, check_source
from tinkex.training import TrainingClient

if TYPE_CHECKING:
    from tinkex.rest import RestClient


class ServiceClient(types.Ready):
    """A session on a server.

    Use it as a context manager, or close it: its clients end with it. Arguments override *config*,
    *config* the environment, and the environment the defaults.

    Without names, the arguments are (base_url, api_key); or, as in the official SDK,
    (user_metadata, project_id), where the first is a dict.

    Args:
        base_url: of the server; by default TINKER_BASE_URL, or the official service if there is a
            key, or else the embedded engine.
        api_key: by default TINKER_API_KEY.
        user_metadata: stored with the session.
        project_id: by default TINKER_PROJECT_ID.
        display_name: of the session, in listings.
        timeout: seconds to wait for the response to a request; replaces `patience.request`.
        patience: time limits of waits.
        sampling: limits of concurrent sampling.
        config: all settings in one object.
        session: a requests.Session for all requests; it is not closed.
        default_headers, proxies, verify, hooks: for all requests; see `tinkex.Config`.
        default_headers_overrides: alias of default_headers.

    Raises:
        ValueError, TypeError: For an invalid setting.
        TinkexError: If the server cannot be reached or refuses, within seconds.
    """

    def __init__(
        self,
        *positional: Any,
        base_url: str | None = None,
        api_key: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        project_id: str | None = None,
        display_name: str | None = None,
        timeout: float | None = None,
        patience: Patience | None = None,
        sampling: SamplingLimits | None = None,
        config: Config | None = None,
        session: requests.Session | None = None,
        default_headers: Mapping[str, str] | None = None,
        default_headers_overrides: Mapping[str, str] | None = None,
        proxies: Mapping[str, str] | None = None,
        verify: bool | str | None = None,
        hooks: Mapping[str, Any] | None = None,
    ) -> None:
        named = {
            "base_url": base_url,
            "api_key": api_key,
            "user_metadata": user_metadata,
            "project_id": project_id,
        }
        base_url, api_key, user_metadata, project_id = _with_positional(positional, named)
        user_metadata = types.check_metadata(user_metadata)
        if display_name is not None and (not isinstance(display_name, str) or not display_name):
            raise TypeError(f"display_name must be a non-empty str or None, got {display_name!r}.")
        if default_headers is not None and default_headers_overrides is not None:
            raise TypeError(
                "default_headers_overrides is another name of default_headers; give only one."
            )
        settings, engine = connect(
            base_url,
            api_key,
            settings=config,
            project_id=project_id,
            patience=_with_timeout(patience, config, timeout),
            sampling=sampling,
            session=session,
            default_headers=default_headers or default_headers_overrides,
            proxies=proxies,
            verify=verify,
            hooks=hooks,
        )
        self._session = Session(
            settings, user_metadata=user_metadata, display_name=display_name, engine=engine
        )

    @property
    def session_id(self) -> str:
        return self._session.session_id

    @property
    def base_url(self) -> str:
        return self._session.config.base_url

    def get_console_url(self) -> str:
        """The session's page in the official service's console; on other servers, its API
        address."""
        return self._session.config.console_url("sessions", self.session_id)

    # Training.

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool | None = None,
        user_metadata: dict[str, Any] | None = None,
        optimizer: types.OptimizerConfig | None = None,
        *,
        adapter: str | None = None,
        queue_state_observer: QueueStateObserver | None = None,
    ) -> TrainingClient:
        """Create a model: *base_model* with a fresh LoRA adapter.

        Args:
            base_model: name of the model, from `get_server_capabilities`; or a model directory
                (local server).
            rank: of the adapter.
            seed: of its initialization; None lets the server choose.
            train_mlp, train_attn, train_unembed: which linear layers are adapted. None lets the
                server choose: our own adapts the head unless it is tied to the embedding.
            user_metadata: stored with the model.
            optimizer: configuration of its optimizer; None is AdamW.
            adapter: a PEFT adapter folder to start from (local server only).
            queue_state_observer: called as (state, reason) when the server pauses training;
                by default a warning is logged.

        Raises:
            ValueError, TypeError: For invalid arguments, before anything is sent.
            RequestFailedError: If the server cannot load the base model; the message has the
                reason.
        """
        return self._new_model(
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            user_metadata,
            optimizer,
            adapter=adapter,
            queue_state_observer=queue_state_observer,
        )()

    def create_lora_training_client_async(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool | None = None,
        user_metadata: dict[str, Any] | None = None,
        optimizer: types.OptimizerConfig | None = None,
        *,
        adapter: str | None = None,
        queue_state_observer: QueueStateObserver | None = None,
    ) -> OperationFuture[TrainingClient]:
        """`create_lora_training_client`, as a future. Invalid arguments raise in the call."""
        return self._session.in_background(
            self._new_model(
                base_model,
                rank,
                seed,
                train_mlp,
                train_attn,
                train_unembed,
                user_metadata,
                optimizer,
                adapter=adapter,
                queue_state_observer=queue_state_observer,
            ),
            f"create_lora_training_client of {base_model}",
        )

    def _new_model(
        self,
        base_model: str,
        rank: int,
        seed: int | None,
        train_mlp: bool,
        train_attn: bool,
        train_unembed: bool | None,
        user_metadata: dict[str, Any] | None,
        optimizer: types.OptimizerConfig | None,
        *,
        adapter: str | None,
        queue_state_observer: QueueStateObserver | None,
    ) -> Callable[[], TrainingClient]:
        """Check all arguments, and return the function that creates the model."""
        check_base_model(base_model)
        base_model = self._recorded(base_model)
        check_observer(queue_state_observer)
        types.optimizer_config(optimizer)
        if adapter is not None and not isinstance(adapter, str):
            raise TypeError(f"adapter must be the path of a PEFT adapter folder, got {adapter!r}.")
        return partial(
            TrainingClient.create,
            self._session,
            base_model,
            types.LoraConfig(rank, seed, train_unembed, train_mlp, train_attn),
            user_metadata=types.check_metadata(user_metadata),
            adapter=adapter,
            optimizer=optimizer,
            queue_state_observer=queue_state_observer,
        )

    def create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        """Create a model with the weights saved at *path* and a fresh optimizer.

        Args:
            path: `tinker://...`, from `save_state`.
            base_model: a variant of the checkpoint's base model to load the weights into; None is
                the checkpoint's.
            user_metadata: stored with the new model.
            weights_access_token: a key that may read the checkpoint, if this client's key may not.
            optimizer: configuration of the new model's optimizer; None is AdamW.
        """
        return self._restored(
            False, path, base_model, user_metadata, weights_access_token, optimizer
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> TrainingClient:
        """Create a model with the weights and the optimizer state saved at *path*.

        Arguments as for `create_training_client_from_state`.
        """
        return self._restored(True, path, base_model, user_metadata, weights_access_token)

    def create_training_client_from_state_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        weights_access_token: str | None = None,
        optimizer: types.OptimizerConfig | None = None,
    ) -> OperationFuture[TrainingClient]:
        """`create_training_client_from_state`, as a future."""
        check_restore(path, user_metadata, base_model, weights_access_token)
        types.optimizer_config(optimizer)
        return self._session.in_background(
            lambda: self._restored(
                False, path, base_model, user_metadata, weights_access_token, optimizer
            ),
            f"create_training_client_from_state of {path}",
        )

    def create_training_client_from_state_with_optimizer_async(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, Any] | None = None,
        weights_access_token: str | None = None,
    ) -> OperationFuture[TrainingClient]:
        """`create_training_client_from_state_with_optimizer`, as a future."""
        check_restore(path, user_metadata, base_model, weights_access_token)
        return self._session.in_background(
            lambda: self._restored(True, path, base_model, user_metadata, weights_access_token),
            f"create_training_client_from_state_with_optimizer of {path}",
        )

    def _restored(
        self,
        optimizer: bool,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, Any] | None,
        weights_access_token: str | None,
        optimizer_of_new: types.OptimizerConfig | None = None,
    ) -> TrainingClient:
        made = restore(
            self._session,
            path,
            optimizer=optimizer,
            base_model=base_model,
            user_metadata=user_metadata,
            weights_access_token=weights_access_token,
            optimizer_config=types.optimizer_config(optimizer_of_new),
        )
        return TrainingClient(self._session, **attrs.asdict(made))

    def copy_weights(
        self,
        path: str,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> OperationFuture[str]:
        """Copy a checkpoint into a new training run of this session; returns a future of its path.

        Args:
            path: `tinker://...`, of this user's or of a public checkpoint.
            ttl_seconds: when the server may delete the copy; None is never.
            weights_access_token: a key that may read the checkpoint, if this client's may not.
        """
        check_restore(path, weights_access_token=weights_access_token)
        ttl_seconds = types.check_ttl(ttl_seconds)

        def copy() -> str:
            request = types.CopyWeightsRequest(
                source_path=path,
                session_id=self.session_id,
                model_seq_id=self._session.model_numbers.take(),
                ttl_seconds=ttl_seconds,
            )
            headers = copy_headers(weights_access_token)
            return self._session.call(wire.COPY_WEIGHTS, request, headers=headers).tinker_path

        return self._session.in_background(copy, f"copy_weights of {path}")

    def create_custom_loss(
        self, fn: Callable[..., Any], input_ranks: Mapping[str, int]
    ) -> OperationFuture[LossHandle]:
        """A loss of one datum for `TrainingClient.forward_backward_custom`; a finished future.

        It is computed locally by torch for each datum, and summed.

        Args:
            fn: called with the log-probabilities of a datum and the loss inputs that its other
                parameters name, as tensors; returns (loss, metrics).
            input_ranks: number of dimensions of each of these inputs.
        """
        future: OperationFuture[LossHandle] = OperationFuture("create_custom_loss")
        future.set_result(make_handle(fn, input_ranks, self.session_id))
        return future

    # Sampling.

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """A sampling client of saved weights, or of a base model.

        Args:
            model_path: `tinker://...`, from `save_weights_for_sampler`; or give
            base_model: the name of a model, which is sampled without an adapter.
            retry_config: when a failed request is sent again.
            record_stability_info: have the server record each sample, for losses that refer to it
                by the sample's sequence_id.
        """
        return SamplingClient.create(
            self._session,
            model_path=model_path,
            base_model=base_model and self._recorded(base_model),
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
    ) -> OperationFuture[SamplingClient]:
        """`create_sampling_client`, as a future."""
        check_source(model_path, base_model, retry_config)
        return self._session.in_background(
            lambda: self.create_sampling_client(
                model_path, base_model, retry_config, record_stability_info
            ),
            f"create_sampling_client of {model_path or base_model}",
        )

    def _recorded(self, base_model: str) -> str:
        """For the embedded engine, a folder's absolute path: it is stored in checkpoints, which may
        be loaded in another working directory."""
        if self._session.engine is None or not isinstance(base_model, str):
            return base_model
        from tinkex.text.tokenizer import resolve_base_model  # only the embedded engine needs it

        return resolve_base_model(base_model)

    # The server.

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The base models that the server supports."""
        return self._session.call(wire.CAPABILITIES)

    def health(self) -> types.HealthResponse:
        """Check that the server answers."""
        return self._session.call(wire.HEALTHZ)

    get_server_capabilities_async = awaits_value(get_server_capabilities)

    def create_rest_client(self) -> RestClient:
        """A client for stored runs, checkpoints and sessions."""
        from tinkex.rest import RestClient  # only here: few scripts need it

        return RestClient(connection=self._session)

    def get_telemetry(self) -> Any:
        """The telemetry reporter, or None if telemetry is off (the default)."""
        return self._session.telemetry

    def close(self, status: str = "success", detail: str | None = None) -> types.Done:
        """Wait for submitted operations, then end the session. Safe to call twice.

        The embedded engine ends with its last session. The wait is limited by `patience.close`.

        Args:
            status: "success", "errored" or "interrupted"; stored by the server. close() waits only
                with "success"; otherwise it drops unfinished operations, and logs their number.
            detail: a description; stored by the server.

        Raises:
            ClientClosedError: If operations were not finished in time, with their number. Only
                logged while another exception is being handled.
        """
        wait = self._session.config.patience.close if status == "success" else None
        self._session.finish(status, detail, wait=wait)
        return types.Done()

    def __enter__(self) -> ServiceClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if is_normal_end(exc):
            self.close()
        elif isinstance(exc, Exception):
            self.close("errored")
        else:
            self._session.finish("interrupted", timeout=HURRIED_TIMEOUT)

    def __repr__(self) -> str:
        state = "closed" if self._session.is_closed else "open"
        return f"<ServiceClient of {self.base_url} [session {self.session_id}, {state}]>"


def _with_positional(positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """base_url, api_key, user_metadata and project_id, given by position or by name."""
    first = positional[0] if positional else None
    names = ("user_metadata", "project_id") if isinstance(first, Mapping) else tuple(named)
    if len(positional) > 2:
        raise TypeError(
            f"ServiceClient takes 2 arguments without names, {names[0]} and {names[1]}, got "
            f"{len(positional)}; name the others."
        )
    for name, value in zip(names, positional):
        if value is not None and named[name] is not None:
            raise TypeError(f"ServiceClient got {name} twice, with its name and without.")
        named[name] = value if value is not None else named[name]
    return tuple(named.values())


def _with_timeout(
    patience: Patience | None, settings: Config | None, timeout: float | None
) -> Patience | None:
    """*patience* with *timeout* seconds for a request."""
    if timeout is None:
        return patience
    before = patience or (settings.patience if settings else None) or Patience()
    return attrs.evolve(before, request=timeout)
