"""SamplingClient: samples from one set of weights, for many prompts at once, in any order.

Handles the arguments and results of samples; runtime/sample_queue.py decides how many run at once.
Long, because it is one class, mostly documentation of public methods.
"""

from __future__ import annotations

import base64
import json
import logging
import queue
import random
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Union

import attrs
import numpy as np

from tinkex import errors, types, wire
from tinkex.config import Config, check_seconds
from tinkex.futures import OperationFuture, awaits_result, awaits_value, gather
from tinkex.runtime.connection import connect
from tinkex.runtime.ending import is_normal_end
from tinkex.runtime.queue_state import PauseWarning
from tinkex.runtime.responses import is_missing_route, not_offered
from tinkex.runtime.retry import ONCE, Retry, check_retry
from tinkex.runtime.sample_queue import SampleQueue
from tinkex.runtime.sample_stream import read_events
from tinkex.runtime.session import Session

if TYPE_CHECKING:
    from tinkex.text import tokenizer

logger = logging.getLogger("tinkex")

Prompt = Union[types.ModelInput, Sequence[int], np.ndarray, str]
#: Sampling parameters: an object, or a dict of its fields.
Params = Union[types.SamplingParams, Mapping[str, Any], None]


PAUSE_REASONS = {
    "paused_rate_limit": "concurrent sampler weights limit hit",
    "paused_capacity": "Tinker backend is running short on capacity, please wait",
}


class SamplingClient(types.Ready):
    """Samples from one fixed set of weights.

    All methods may be called from any thread, thousands of times without waiting. Make one with
    `ServiceClient.create_sampling_client` or `TrainingClient.save_weights_and_get_sampling_client`.
    It can be pickled: the copy takes its key from the environment, and numbers its samples
    separately.
    """

    def __init__(
        self,
        session: Session,
        sampling_session_id: str,
        *,
        base_model: str | None = None,
        model_path: str | None = None,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
        clone: int = 0,
        owns_session: bool = False,
    ) -> None:
        self.sampling_session_id = sampling_session_id
        self._record_stability_info = record_stability_info
        self.model_path = model_path
        self._session = session
        self._base_model = base_model
        self._retry = retry_config
        self._lock = threading.Lock()  # guards _tokenizer
        self._tokenizer: Any = None
        self._warn_of_pause = PauseWarning(
            f"Sampling is paused for {sampling_session_id}",
            PAUSE_REASONS,
            session.transport.waits.now,
        )
        self._queue = SampleQueue(
            session,
            sampling_session_id,
            retry=retry_config,
            clone=clone,
            owns_session=owns_session,
            on_queue_state=self._warn_of_pause,
        )

    @classmethod
    def create(
        cls,
        session: Session,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        tokenizer_model: str | None = None,
        retry_config: Retry | None = None,
        record_stability_info: bool = False,
    ) -> SamplingClient:
        """A client of the weights at *model_path*, or of *base_model* without an adapter.

        Raises:
            ValueError: If neither is given, or the path is not valid.
        """
        check_source(model_path, base_model, retry_config)
        with session.sampler_numbers.lent() as number:
            request = types.CreateSamplingSessionRequest(
                session.session_id, number, base_model, model_path
            )
            created = session.call(wire.CREATE_SAMPLING_SESSION, request)
        return cls(
            session,
            created.sampling_session_id,
            base_model=base_model or tokenizer_model,
            model_path=model_path,
            retry_config=retry_config,
            record_stability_info=record_stability_info,
        )

    # Sampling.

    def sample(
        self,
        prompt: Prompt,
        num_samples: int = 1,
        sampling_params: Params = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: types.Stop = None,
        seed: int | None = None,
        poll_timeout: float | None = None,
    ) -> OperationFuture[types.SampleResponse]:
        """Sample *num_samples* continuations of *prompt*.

        Args:
            prompt: a ModelInput, token ids (list or array), or text (encoded by the model's
                tokenizer).
            sampling_params: a SamplingParams, or a dict of its fields; by default temperature 1,
                to the end of text or the context's end.
            max_tokens, temperature, top_k, top_p, stop, seed: single fields of SamplingParams, as
                in `sample(prompt, max_tokens=3)`; they replace those of *sampling_params*.
            include_prompt_logprobs, topk_prompt_logprobs, topk_sample_logprobs,
            target_prompt_logprobs, prompt_alt_tokens_k, prompt_logprobs_last_n: see
                `types.SampleRequest`.
            poll_timeout: seconds until the future fails with APITimeoutError; None is never.

        Raises:
            ValueError, TypeError: For invalid arguments; nothing is sent.
        """
        request = types.SampleRequest(
            prompt=self._as_input(prompt),
            sampling_params=types.as_params(
                types.SamplingParams,
                sampling_params,
                "sampling_params",
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop=stop,
                seed=seed,
            ),
            num_samples=num_samples,
            sampling_session_id=self.sampling_session_id,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            record_stability_info=self._record_stability_info,
        )
        check_seconds("poll_timeout", poll_timeout, or_none=True)
        return self._queue.submit(request, poll_timeout, self._show_text)

    def compute_logprobs(
        self, prompt: Prompt, prompt_logprobs_last_n: int | None = None
    ) -> OperationFuture[list[float | None]]:
        """The log-probability of each token of *prompt* given the previous ones; None for the
        first."""
        sampled = self.sample(
            prompt,
            sampling_params=types.SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        future: OperationFuture[list[float | None]]
        future = OperationFuture(f"compute_logprobs of {self.sampling_session_id}")
        future.set_running_or_notify_cancel()
        self._session.pending.add(self.sampling_session_id, future, ordered=False)
        gather([sampled], lambda r: _prompt_logprobs(r[0]), future)
        return future

    sample_async = awaits_result(sample)
    compute_logprobs_async = awaits_result(compute_logprobs)

    def sample_many(
        self,
        prompts: Iterable[Prompt],
        num_samples: int = 1,
        sampling_params: Params = None,
        *,
        in_flight: int = 2000,
        progress: bool = False,
        **options: Any,
    ) -> Iterator[tuple[int, types.SampleResponse]]:
        """Sample from every prompt, yielding (index of the prompt, response) as they finish.

        Args:
            prompts: any number; consumed as there is room, so it may be a generator.
            in_flight: how many are in flight at a time.
            progress: show a progress bar on stderr.
            options: further arguments of `sample`.

        Raises:
            The exception of the first failed sample; samples in flight are abandoned.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts must be a list (or other iterable) of prompts, got {prompts!r}."
            )
        if not isinstance(in_flight, int) or isinstance(in_flight, bool) or in_flight < 1:
            raise ValueError(f"in_flight must be a positive integer, got {in_flight!r}.")
        return self._sample_many(
            prompts, num_samples, sampling_params, in_flight, progress, options
        )

    def _sample_many(
        self,
        prompts: Iterable[Prompt],
        num_samples: int,
        sampling_params: Params,
        in_flight: int,
        progress: bool,
        options: dict[str, Any],
    ) -> Iterator[tuple[int, types.SampleResponse]]:
        done: queue.SimpleQueue[tuple[int, OperationFuture[types.SampleResponse]]]
        done = queue.SimpleQueue()
        waiting = enumerate(prompts)
        total = len(prompts) if isinstance(prompts, Sequence) else None
        under_way: set[OperationFuture[types.SampleResponse]] = set()
        try:
            with _ProgressBar(total, progress) as bar:
                while True:
                    while len(under_way) < in_flight and (item := next(waiting, None)) is not None:
                        index, prompt = item
                        future = self.sample(prompt, num_samples, sampling_params, **options)
                        under_way.add(future)
                        future.add_done_callback(lambda f, i=index: done.put((i, f)))  # type: ignore[misc]
                    if not under_way:
                        return
                    index, future = done.get()
                    under_way.remove(future)
                    bar.update()
                    yield index, future.result()
        finally:
            self._session.pending.forget(under_way)

    def sample_stream(
        self,
        prompt: Prompt,
        num_samples: int = 1,
        sampling_params: Params = None,
        **fields: Any,
    ) -> Iterator[types.SampleStreamChunk]:
        """Sample, yielding each token as the server generates it.

        Args:
            sampling_params: a SamplingParams, or a dict of its fields.
            fields: single fields of SamplingParams, as for `sample`.

        Raises:
            NotOfferedError: From a server that does not stream.
            RequestFailedError: If the server fails during the stream.
            EngineError: If the embedded engine dies during the stream.
        """
        request = types.SampleRequest(
            prompt=self._as_input(prompt),
            sampling_params=types.as_params(
                types.SamplingParams, sampling_params, "sampling_params", **fields
            ),
            num_samples=num_samples,
            sampling_session_id=self.sampling_session_id,
            record_stability_info=self._record_stability_info,
        )
        self._queue.check_open()
        return self._stream(attrs.evolve(request, seq_id=self._queue.take_number()))

    def _stream(self, request: types.SampleRequest) -> Iterator[types.SampleStreamChunk]:
        transport = self._session.transport
        body = wire.dumps(wire.to_json(request, wire.STREAM_SAMPLE.tag))
        headers = {"Accept": "text/event-stream", "Content-Type": wire.JSON}
        url = transport.url(wire.STREAM_SAMPLE.path)
        try:
            with transport.open_stream("POST", url, body, headers) as stream:
                yield from read_events(stream.lines())
        except errors.APIStatusError as exc:
            if is_missing_route(exc):
                raise not_offered(exc, wire.STREAM_SAMPLE.path) from exc
            raise
        except errors.APIConnectionError as exc:
            if died := transport.obituary():
                raise errors.EngineError(died) from exc
            raise

    def _show_text(self, response: types.SampleResponse) -> None:
        """Show text in the repr of a response, once a tokenizer is loaded."""
        if self._tokenizer is not None:
            types.show_with(response, self._tokenizer)

    # Prompts and text.

    def get_tokenizer(
        self,
        *,
        load_fn: tokenizer.LoadFunction | None = None,
        load_fun: tokenizer.LoadFunction | None = None,
    ) -> Any:
        """The tokenizer of the model: an object with encode(text) and decode(ids).

        Args:
            load_fn: loads it by its id; None loads it from the hub or a folder.
            load_fun: alias of load_fn.
        """
        from tinkex.text import tokenizer  # only here: many scripts send tokens

        load_fn = tokenizer.same_argument("load_fn", load_fn, "load_fun", load_fun)
        with self._lock:
            if self._tokenizer is not None and load_fn is None:
                return self._tokenizer
        loaded = tokenizer.load(
            tokenizer.tokenizer_id(self.get_base_model(), self._told_tokenizer()), load_fn=load_fn
        )
        with self._lock:
            self._tokenizer = loaded
        return loaded

    def _told_tokenizer(self) -> str | None:
        """The server's tokenizer id for a checkpoint's model, or None."""
        if self.model_path is None:
            return None
        run = types.ParsedCheckpointTinkerPath.from_tinker_path(self.model_path).training_run_id
        try:
            info = self._session.call(wire.GET_INFO, types.GetInfoRequest(run), retry=ONCE)
        except errors.TinkexError:
            return None
        return info.model_data.tokenizer_id

    def get_base_model(self) -> str:
        """The name of the base model."""
        if self._base_model is None:
            sampler = self._session.call(wire.GET_SAMPLER, sampler_id=self.sampling_session_id)
            self._base_model = sampler.base_model
        return self._base_model

    get_base_model_async = awaits_value(get_base_model)

    def encode(self, text: str) -> list[int]:
        """Token ids of *text*, by the model's tokenizer."""
        ids: list[int] = self.get_tokenizer().encode(text)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids, by the model's tokenizer.

        Args:
            skip_special_tokens: omit special tokens, such as the one that ends a text.
        """
        settings = {"skip_special_tokens": True} if skip_special_tokens else {}
        text: str = self.get_tokenizer().decode(ids, **settings)
        return text

    def _as_input(self, prompt: Prompt) -> types.ModelInput:
        if isinstance(prompt, str):
            prompt = self.encode(prompt)
        if not isinstance(prompt, types.ModelInput):
            prompt = types.ModelInput.from_ints(prompt)
        if prompt.length == 0:
            raise ValueError("the prompt is empty; give at least one token.")
        return prompt

    # Ending.

    @property
    def limit(self) -> int:
        """How many samples are currently submitted at a time; lower after a 429, then rising
        again."""
        return self._queue.limit

    def close(self, *, cancel: bool = False, timeout: float | None = None) -> None:
        """Wait for submitted samples, and accept no more. Safe to call twice.

        Args:
            cancel: do not wait; fail unfinished samples.
            timeout: time limit in seconds, by default `patience.close`. Then unfinished samples
                fail.

        Raises:
            ClientClosedError: If samples were not finished in time, with their number. Only logged
                while another exception is being handled, and with cancel.
        """
        self._queue.close(cancel=cancel, timeout=timeout)

    def __enter__(self) -> SamplingClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(cancel=not is_normal_end(exc))

    def __repr__(self) -> str:
        return f"<SamplingClient {self.sampling_session_id} [{self._queue.state}]>"

    def __reduce__(self) -> tuple[Any, ...]:
        settings = self._session.config.without_secrets()
        return _unpickled, (settings, self._parts(), self._retry)

    def _parts(self) -> dict[str, Any]:
        """The identity of this sampler on its server."""
        return {
            "session_id": self._session.session_id,
            "sampling_session_id": self.sampling_session_id,
            "base_model": self._base_model,
            "model_path": self.model_path,
            "record_stability_info": self._record_stability_info,
        }

    def get_sampler_handle(self) -> str:
        """A text from which `from_sampler_handle` makes a client of the same sampler, in any
        process and any number of times. It contains no key."""
        parts = {**self._parts(), "base_url": self._session.config.base_url}
        return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """A client of the sampler of *handle*, with separate sample numbers.

        Args:
            handle: from `get_sampler_handle`.
            api_key: by default TINKER_API_KEY of this process.

        Raises:
            ValueError: If *handle* is not a sampler handle.
        """
        try:
            parts = json.loads(base64.urlsafe_b64decode(handle))
            base_url = parts.pop("base_url")
            names = set(parts)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ValueError(_NO_HANDLE) from exc
        if names != set(_HANDLE_PARTS) or not isinstance(base_url, str):
            raise ValueError(_NO_HANDLE)
        return _unpickled(Config(base_url=base_url, api_key=api_key or ""), parts, None)

    def get_telemetry(self) -> Any:
        """The telemetry reporter of the session, or None if telemetry is off (the default)."""
        return self._session.telemetry

    def on_queue_state_change(
        self, queue_state: str, queue_state_reason: str | None = None
    ) -> None:
        """Warn that sampling is paused, at most once a minute."""
        self._warn_of_pause(queue_state, queue_state_reason)


def check_source(model_path: object, base_model: object, retry_config: object = None) -> None:
    """Raise ValueError or TypeError unless the arguments name a source of samples."""
    if model_path is None and base_model is None:
        raise ValueError("Either model_path or base_model must be provided")
    if model_path is not None:
        types.ParsedCheckpointTinkerPath.from_tinker_path(model_path)  # type: ignore[arg-type]
    if base_model is not None and (not isinstance(base_model, str) or not base_model.strip()):
        raise TypeError(f"base_model must be the name of a model, got {base_model!r}.")
    check_retry(retry_config)


def _prompt_logprobs(response: types.SampleResponse) -> list[float | None]:
    logprobs = response.prompt_logprobs
    if logprobs is None:
        raise errors.APIResponseValidationError("the server gave no prompt logprobs.")
    return logprobs


class _ProgressBar:
    """A tqdm bar on stderr, or nothing."""

    def __init__(self, total: int | None, show: bool) -> None:
        self._bar: Any = None
        if show:
            from tqdm.auto import tqdm  # a widget in a notebook

            self._bar = tqdm(total=total, unit="sample")

    def update(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()


_HANDLE_PARTS = (
    "session_id",
    "sampling_session_id",
    "base_model",
    "model_path",
    "record_stability_info",
)
_NO_HANDLE = "handle must be a text that get_sampler_handle() returned; this is something else."


def _unpickled(given: Config, parts: dict[str, Any], retry: Retry | None) -> SamplingClient:
    """A copy of a client, possibly in another process, with separate sample numbers."""
    settings, engine = connect(settings=given)
    session = Session(settings, session_id=parts["session_id"], engine=engine, heartbeat=False)
    sampling_session_id = parts["sampling_session_id"]
    clone = random.randrange(1, 2**30)
    if session.features.sample_join_sampling_session:
        request = types.JoinSamplingSessionRequest(sampling_session_id)
        clone = session.call(wire.JOIN_SAMPLING_SESSION, request).client_counter
    return SamplingClient(
        session,
        sampling_session_id,
        base_model=parts["base_model"],
        model_path=parts["model_path"],
        record_stability_info=parts["record_stability_info"],
        retry_config=retry,
        clone=clone,
        owns_session=True,
    )


class SamplingClientFuture(OperationFuture[SamplingClient]):
    """The future of a sampling client, which can also be used as the client.

    `future.sample(...)` waits for the client and samples from it.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.result(), name)
