"""ServiceClient: opens a session on a server, and creates the other clients.

This is the entry point. With neither a URL nor a key it starts the embedded engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import attrs
import requests

from tinkex import types, wire
from tinkex.config import Config, Patience, SamplingLimits
from tinkex.futures import OperationFuture
from tinkex.rest import RestClient
from tinkex.runtime.connection import HURRIED_TIMEOUT, connect
from tinkex.runtime.ending import is_normal_end
from tinkex.runtime.new_model import check_base_model
from tinkex.runtime.pending import drop
from tinkex.runtime.queue_state import QueueStateObserver, check_observer
from tinkex.runtime.restore import check_restore, restore
from tinkex.runtime.retry import Retry
from tinkex.runtime.session import Session
from tinkex.sampling import SamplingClient, check_source
from tinkex.text.tokenizer import resolve_base_model
from tinkex.training import TrainingClient


class ServiceClient:
    """A session on a server.

    Use it as a context manager, or close it: its clients end with it. Arguments win over *config*,
    *config* over the environment, the environment over defaults.

    Args:
        base_url: of the server; by default TINKER_BASE_URL, or the official service if there is a
            key, or else the embedded engine.
        api_key: by default TINKER_API_KEY.
        user_metadata: stored with the session.
        project_id: by default TINKER_PROJECT_ID.
        patience: how long to wait for what.
        sampling: limits of concurrent sampling.
        config: all settings in one object.
        session: a requests.Session that all requests go through; it is not closed.
        default_headers, proxies, verify, hooks: for all requests; see `tinkex.Config`.

    Raises:
        ValueError, TypeError: For a setting that cannot be right.
        TinkexError: If the server cannot be reached or refuses, within seconds.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        user_metadata: dict[str, Any] | None = None,
        project_id: str | None = None,
        patience: Patience | None = None,
        sampling: SamplingLimits | None = None,
        config: Config | None = None,
        session: requests.Session | None = None,
        default_headers: Mapping[str, str] | None = None,
        proxies: Mapping[str, str] | None = None,
        verify: bool | str | None = None,
        hooks: Mapping[str, Any] | None = None,
    ) -> None:
        user_metadata = types.check_metadata(user_metadata)
        settings, engine = connect(
            base_url,
            api_key,
            settings=config,
            project_id=project_id,
            patience=patience,
            sampling=sampling,
            session=session,
            default_headers=default_headers,
            proxies=proxies,
            verify=verify,
            hooks=hooks,
        )
        self._session = Session(settings, user_metadata=user_metadata, engine=engine)

    @property
    def session_id(self) -> str:
        return self._session.session_id

    @property
    def base_url(self) -> str:
        return self._session.config.base_url

    # Training.

    def create_lora_training_client(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, Any] | None = None,
        *,
        adapter: str | None = None,
        queue_state_observer: QueueStateObserver | None = None,
    ) -> TrainingClient:
        """A new model: *base_model* with a fresh LoRA adapter.

        Args:
            base_model: name of the model, as `get_server_capabilities` lists it; or a model
                directory (local server).
            rank: of the adapter.
            seed: of its initialization; None lets the server choose.
            train_mlp, train_attn, train_unembed: which linear layers are adapted.
            user_metadata: stored with the model.
            adapter: a PEFT adapter folder to start from (local server only).
            queue_state_observer: called as (state, reason) when the server pauses training;
                by default a warning is logged.

        Raises:
            ValueError, TypeError: For wrong arguments, before anything is sent.
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
            adapter=adapter,
            queue_state_observer=queue_state_observer,
        )()

    def create_lora_training_client_async(
        self, base_model: str, *args: Any, **options: Any
    ) -> OperationFuture[TrainingClient]:
        """`create_lora_training_client`, as a future. Wrong arguments raise in the call."""
        return self._session.in_background(
            self._new_model(base_model, *args, **options),
            f"create_lora_training_client of {base_model}",
        )

    def _new_model(
        self,
        base_model: str,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, Any] | None = None,
        *,
        adapter: str | None = None,
        queue_state_observer: QueueStateObserver | None = None,
    ) -> Callable[[], TrainingClient]:
        """Check all arguments, and return the function that creates the model."""
        check_base_model(base_model)
        base_model = self._recorded(base_model)
        check_observer(queue_state_observer)
        if adapter is not None and not isinstance(adapter, str):
            raise TypeError(f"adapter must be the path of a PEFT adapter folder, got {adapter!r}.")
        return partial(
            TrainingClient.create,
            self._session,
            base_model,
            types.LoraConfig(rank, seed, train_unembed, train_mlp, train_attn),
            user_metadata=types.check_metadata(user_metadata),
            adapter=adapter,
            queue_state_observer=queue_state_observer,
        )

    def create_training_client_from_state(
        self, path: str, user_metadata: dict[str, Any] | None = None
    ) -> TrainingClient:
        """A new model with the weights saved at *path*; its optimizer starts fresh.

        Args:
            path: `tinker://...`, from `save_state`.
            user_metadata: stored with the new model.
        """
        made = restore(self._session, path, optimizer=False, user_metadata=user_metadata)
        return TrainingClient(self._session, **attrs.asdict(made))

    def create_training_client_from_state_with_optimizer(
        self, path: str, user_metadata: dict[str, Any] | None = None
    ) -> TrainingClient:
        """A new model with the weights and the optimizer state saved at *path*."""
        made = restore(self._session, path, optimizer=True, user_metadata=user_metadata)
        return TrainingClient(self._session, **attrs.asdict(made))

    def create_training_client_from_state_async(
        self, path: str, user_metadata: dict[str, Any] | None = None
    ) -> OperationFuture[TrainingClient]:
        """`create_training_client_from_state`, as a future."""
        check_restore(path, user_metadata)
        return self._session.in_background(
            lambda: self.create_training_client_from_state(path, user_metadata),
            f"create_training_client_from_state of {path}",
        )

    def create_training_client_from_state_with_optimizer_async(
        self, path: str, user_metadata: dict[str, Any] | None = None
    ) -> OperationFuture[TrainingClient]:
        """`create_training_client_from_state_with_optimizer`, as a future."""
        check_restore(path, user_metadata)
        return self._session.in_background(
            lambda: self.create_training_client_from_state_with_optimizer(path, user_metadata),
            f"create_training_client_from_state_with_optimizer of {path}",
        )

    # Sampling.

    def create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Retry | None = None,
    ) -> SamplingClient:
        """A sampling client of saved weights, or of a base model.

        Args:
            model_path: `tinker://...`, from `save_weights_for_sampler`; or give
            base_model: the name of a model, which is sampled without an adapter.
            retry_config: when a failed request is sent again.
        """
        return SamplingClient.create(
            self._session,
            model_path=model_path,
            base_model=base_model and self._recorded(base_model),
            retry_config=retry_config,
        )

    def create_sampling_client_async(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: Retry | None = None,
    ) -> OperationFuture[SamplingClient]:
        """`create_sampling_client`, as a future."""
        check_source(model_path, base_model, retry_config)
        return self._session.in_background(
            lambda: self.create_sampling_client(model_path, base_model, retry_config),
            f"create_sampling_client of {model_path or base_model}",
        )

    def _recorded(self, base_model: str) -> str:
        """For the embedded engine a folder's absolute path: checkpoints record it, and may be
        loaded from another working directory."""
        is_embedded = self._session.engine is not None and isinstance(base_model, str)
        return resolve_base_model(base_model) if is_embedded else base_model

    # The server.

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The base models that the server supports."""
        return self._session.call(wire.CAPABILITIES)

    def health(self) -> types.HealthResponse:
        """Check that the server answers."""
        return self._session.call(wire.HEALTHZ)

    def create_rest_client(self) -> RestClient:
        """A client for stored runs, checkpoints and sessions."""
        return RestClient(connection=self._session)

    def get_telemetry(self) -> Any:
        """The telemetry reporter, or None where telemetry is off (the default)."""
        return self._session.telemetry

    def close(self, reason: str = "success", detail: str | None = None) -> None:
        """Wait until what was submitted is done, then end the session. Safe to call twice.

        The embedded engine ends with its last session. The wait takes `patience.close` at most.

        Args:
            reason: "success", "errored" or "interrupted"; stored by the server. Only with "success"
                does close() wait; else it drops what is not done, and logs how much.
            detail: more about it, in words; stored by the server.

        Raises:
            ClientClosedError: If something was not done in time; says how much. Only logged while
                another exception is being handled.
        """
        wait = self._session.config.patience.close if reason == "success" else 0.0
        left = self._session.finish(reason, detail, wait=wait)
        drop(left, whose=f"session {self.session_id}", normal_end=wait > 0, seconds=wait)

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
            left = self._session.finish("interrupted", timeout=HURRIED_TIMEOUT)
            drop(left, whose=f"session {self.session_id}", normal_end=False)

    def __repr__(self) -> str:
        state = "closed" if self._session.is_closed else "open"
        return f"<ServiceClient of {self.base_url} [session {self.session_id}, {state}]>"
