"""Recovery for long runs in scripts: periodic checkpoints, restored when the server is lost.

`keep_alive` wraps a training client and remembers the operations since the last checkpoint. If the
model or its server is lost, it creates a new model from that checkpoint and repeats the same
operations in the same order. So a script sees only a pause, and ends with the same weights as
without the loss. `recover` restores the model for a restarted script.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from tinkex import errors, types
from tinkex.futures import OperationFuture
from tinkex.recipes import run_folder
from tinkex.recipes.callbacks import Callbacks, Checkpoint
from tinkex.recipes.run import Run
from tinkex.sampling import SamplingClient
from tinkex.service import ServiceClient
from tinkex.training import TrainingClient

logger = logging.getLogger("tinkex")

#: Seconds before the first restart; the pause doubles with each restart, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
#: Time limit, in seconds, for closing the client of a lost model.
CLOSE_SECONDS = 1.0
#: Failures after which the model, or the connection to it, is considered lost.
LOST = (
    errors.EngineError,
    errors.APIConnectionError,
    errors.InternalServerError,
    errors.NotFoundError,
    errors.OutcomeUnknownError,
    errors.PromiseExpiredError,
    errors.ClientClosedError,
)
#: Operations that change the model, and are therefore repeated after a restart even if done.
CHANGES = {
    "forward_backward",
    "forward_backward_custom",
    "optim_step",
    "load_state",
    "load_state_with_optimizer",
}
STATE = "state.json"


@attrs.frozen
class Recovered:
    """A model restored from its last checkpoint.

    Attributes:
        training: a client of a new model with the weights and the optimizer of the checkpoint.
        step: optimizer steps before the checkpoint.
        position: the value of `KeptAlive.position` at that checkpoint.
        checkpoint: tinker:// path.
    """

    training: TrainingClient
    step: int
    position: Any
    checkpoint: str


def recover(service: ServiceClient, run: Run | str | Path) -> Recovered | None:
    """
    Restore the model of an interrupted run from its last checkpoint; None if it has none.

    Args:
        run: of `tinkex.finetune`, `tinkex train` or `keep_alive`; or its folder.

    Raises:
        ValueError: If the state of the run cannot be read.
        TinkexError: If the server does not have the checkpoint.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    state = run_folder.read_json(folder / STATE)
    if state is None or not state.get("checkpoint"):
        return None
    path = str(state["checkpoint"])
    training = service.create_training_client_from_state_with_optimizer(path)
    return Recovered(training, int(state.get("step") or 0), state.get("position"), path)


def keep_alive(
    training: TrainingClient,
    every: int = 50,
    *,
    run: Run | str | Path | None = None,
    step: int = 0,
    restarts: int = 5,
    callbacks: Sequence[Any] = (),
    connect: Callable[[], ServiceClient] | None = None,
    pause: Callable[[float], Any] = time.sleep,
) -> KeptAlive:
    """
    A training client that survives the loss of its model or its server.

    Use it as a context manager, in place of *training*. A checkpoint is saved at once, and after
    every *every* optimizer steps; each replaces the previous one, which is deleted.

    Args:
        every: optimizer steps between two checkpoints. Their data is kept in memory.
        run: folder in which the last checkpoint is recorded for `recover`; None records nothing.
        step: optimizer steps that *training* has already taken: `Recovered.step`.
        restarts: most restarts in a row without a checkpoint in between. The pause before a restart
            doubles each time, from 1 s to 60 s.
        callbacks: receive on_save and on_restart; they require *run*.
        connect: opens a new client of the server; by default with the settings of *training*.
        pause: sleeps for a number of seconds; replaceable in tests.

    Raises:
        ValueError: If *every* or *restarts* is less than 1, callbacks are given without *run*, or
            *run* is a run of `tinkex train`, which records its own checkpoints.
    """
    for name, value in (("every", every), ("restarts", restarts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if callbacks and run is None:
        raise ValueError("callbacks need a run to report; give its folder as run.")
    folder = None if run is None else run.folder if isinstance(run, Run) else Path(run)
    if folder is not None and Run(folder).settings:
        raise ValueError(f"{folder} contains a run of another recipe; give another folder as run.")
    return KeptAlive(
        training,
        connect or (lambda: ServiceClient(config=training.server)),
        every=every,
        folder=folder,
        step=step,
        restarts=restarts,
        callbacks=Callbacks(callbacks),
        pause=pause,
    )


@attrs.define(eq=False)
class _Operation:
    """An operation that the script submitted, and the future that it holds."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    future: OperationFuture[Any]
    #: For a periodic checkpoint: the step after which it is saved, and the position.
    saved: tuple[int, Any] | None = None


class KeptAlive:
    """See `keep_alive`. Has the operations of a `TrainingClient`; its futures also resolve after a
    loss.

    Attributes:
        step: optimizer steps submitted so far.
        position: any JSON value, such as the number of the next batch. Its value when a checkpoint
            is requested is stored with the checkpoint.
    """

    def __init__(
        self,
        training: TrainingClient,
        connect: Callable[[], ServiceClient],
        *,
        every: int,
        folder: Path | None,
        step: int,
        restarts: int,
        callbacks: Callbacks,
        pause: Callable[[float], Any],
    ) -> None:
        self.step, self.position = step, None
        self._training, self._connect, self._every = training, connect, every
        self._folder, self._restarts, self._callbacks = folder, restarts, callbacks
        self._pause = pause
        self._service: ServiceClient | None = None  # of the last restart
        #: Deletes old checkpoints, one after the other.
        self._housekeeping = concurrent.futures.ThreadPoolExecutor(1, "tinkex-housekeeping")
        self._housekeeper: ServiceClient | None = None
        self._lock = threading.RLock()  # guards everything below
        self._log: list[_Operation] = []  # since the last checkpoint, in order
        self._checkpoint: str | None = None
        self._generation = 0
        self._restarts_left = restarts
        self._restoring: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._is_closed = False
        self._save()

    def __repr__(self) -> str:
        return f"<KeptAlive {self._training!r} step {self.step}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._training, name)  # get_tokenizer and others that change nothing

    # Operations

    def forward(self, *args: Any, **options: Any) -> OperationFuture[types.ForwardBackwardOutput]:
        """As `TrainingClient.forward`."""
        return self._submit("forward", args, options)

    def forward_backward(
        self, *args: Any, **options: Any
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """As `TrainingClient.forward_backward`."""
        return self._submit("forward_backward", args, options)

    def forward_backward_custom(
        self, *args: Any, **options: Any
    ) -> OperationFuture[types.ForwardBackwardOutput]:
        """As `TrainingClient.forward_backward_custom`; the loss function is called again if the
        model is lost."""
        return self._submit("forward_backward_custom", args, options)

    def optim_step(self, *args: Any, **options: Any) -> OperationFuture[types.OptimStepResponse]:
        """As `TrainingClient.optim_step`; a checkpoint follows every `every` steps."""
        with self._lock:
            future = self._submit("optim_step", args, options)
            self.step += 1
            if self.step % self._every == 0:
                self._save()
        return future

    def save_state(self, *args: Any, **options: Any) -> OperationFuture[types.SaveWeightsResponse]:
        """As `TrainingClient.save_state`."""
        return self._submit("save_state", args, options)

    def save_weights_for_sampler(self, *args: Any, **options: Any) -> OperationFuture[Any]:
        """As `TrainingClient.save_weights_for_sampler`."""
        return self._submit("save_weights_for_sampler", args, options)

    def save_weights_and_get_sampling_client(
        self, *args: Any, **options: Any
    ) -> OperationFuture[SamplingClient]:
        """As `TrainingClient.save_weights_and_get_sampling_client`. The sampling client is lost
        with its server; request a new one."""
        return self._submit("save_weights_and_get_sampling_client", args, options)

    def save_weights_and_get_sampling_client_sync(self, *args: Any, **options: Any) -> Any:
        """The same, but waits for the result."""
        return self.save_weights_and_get_sampling_client(*args, **options).result()

    def load_state(self, *args: Any, **options: Any) -> OperationFuture[Any]:
        """As `TrainingClient.load_state`."""
        return self._submit("load_state", args, options)

    def load_state_with_optimizer(self, *args: Any, **options: Any) -> OperationFuture[Any]:
        """As `TrainingClient.load_state_with_optimizer`."""
        return self._submit("load_state_with_optimizer", args, options)

    def _submit(
        self,
        name: str,
        args: tuple[Any, ...],
        options: dict[str, Any],
        saved: tuple[int, Any] | None = None,
    ) -> OperationFuture[Any]:
        operation = _Operation(name, args, options, OperationFuture(name), saved)
        with self._lock:
            if self._is_closed:
                raise errors.ClientClosedError("this training client is closed.")
            if self._failure is not None:
                raise self._failure
            self._log.append(operation)
            if self._restoring is None:
                try:
                    self._send(operation)
                except BaseException:
                    self._log.remove(operation)
                    raise
        return operation.future

    def _save(self) -> None:
        """Request a checkpoint after the operations submitted so far."""
        number = f"{self.step:06d}-{self._generation}"
        self._submit("save_state", (f"alive-{number}",), {}, (self.step, self.position))

    def _send(self, operation: _Operation) -> None:
        """Submit to the current model; holds the lock. Invalid arguments raise in the call."""
        try:
            inner = getattr(self._training, operation.name)(*operation.args, **operation.options)
        except errors.TinkexError as exc:
            if not is_lost(exc):
                raise
            self._restore(exc)
            return
        generation = self._generation
        inner.add_done_callback(lambda done: self._done(operation, generation, done))

    # Results

    def _done(
        self, operation: _Operation, generation: int, inner: concurrent.futures.Future[Any]
    ) -> None:
        failure = concurrent.futures.CancelledError() if inner.cancelled() else inner.exception()
        with self._lock:
            if failure is not None and not self._is_closed and is_lost(failure):
                if generation == self._generation and self._restoring is None:
                    self._restore(failure)
                return  # it is submitted again
            if failure is not None:
                if operation in self._log:
                    self._log.remove(operation)
            elif operation.saved is not None:
                self._note(operation, inner.result().path)
        if operation.future.done():
            return  # it was repeated
        if failure is not None:
            operation.future.set_exception(failure)
        else:
            operation.future.set_result(inner.result())

    def _note(self, operation: _Operation, path: str) -> None:
        """Record a saved checkpoint: operations before it need not be repeated."""
        step, position = operation.saved or (0, None)
        if operation not in self._log:
            return
        del self._log[: self._log.index(operation) + 1]
        old, self._checkpoint = self._checkpoint, path
        self._restarts_left = self._restarts
        if old is not None:
            self._housekeeping.submit(self._delete, old)
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        run_folder.replace_json(
            self._folder / STATE,
            {"settings": {}, "step": step, "checkpoint": path, "position": position},
        )
        self._callbacks.save(Run(self._folder), Checkpoint(step, path))
        logger.debug("saved %s after step %d; it replaces %s", path, step, old)

    def _delete(self, path: str) -> None:
        """Delete a checkpoint; a failure does not end the run."""
        try:
            if self._housekeeper is None:
                self._housekeeper = self._connect()
            self._housekeeper.create_rest_client().delete_checkpoint_from_tinker_path(path)
        except errors.TinkexError as exc:
            self._housekeeper = None
            logger.debug("the old checkpoint %s could not be deleted: %s", path, exc)

    # After a loss

    def _restore(self, failure: BaseException) -> None:
        """Start restoring the model on a separate thread; holds the lock."""
        self._restoring = threading.Thread(
            target=self._restart, args=(failure,), name="tinkex-recovery", daemon=True
        )
        self._restoring.start()

    def _restart(self, failure: BaseException) -> None:
        seconds = FIRST_PAUSE
        while True:
            with self._lock:
                if self._checkpoint is None or self._restarts_left == 0:
                    self._give_up(failure)
                    return
                self._restarts_left -= 1
                number = self._restarts - self._restarts_left
            logger.warning(
                "The model was lost (%s); restoring it from %s (%d of %d).",
                failure,
                self._checkpoint,
                number,
                self._restarts,
            )
            if self._folder is not None:
                self._callbacks.restart(Run(self._folder), str(failure))
            self._pause(seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE)
            try:
                self._replay()
                return
            except errors.TinkexError as exc:
                if not is_lost(exc):
                    self._give_up(exc)
                    return
                failure = exc

    def _replay(self) -> None:
        """Create a new model from the checkpoint, and repeat the operations since then."""
        with self._lock:
            if self._is_closed:
                return
            self._generation += 1
            old, old_service = self._training, self._service
        threading.Thread(target=_close, args=(old, old_service), daemon=True).start()
        service = self._connect()
        self._service = service
        training = service.create_training_client_from_state_with_optimizer(str(self._checkpoint))
        with self._lock:
            self._training = training
            self._restoring = None
            for operation in list(self._log):
                if self._restoring is not None:
                    return  # lost again; the others are sent after the next restart
                if operation.name in CHANGES or not operation.future.done():
                    self._send(operation)

    def _give_up(self, failure: BaseException) -> None:
        reason = (
            "there is no checkpoint yet"
            if self._checkpoint is None
            else f"it was restored {self._restarts - self._restarts_left} times"
        )
        logger.error("The model is lost, and %s: %s", reason, failure)
        with self._lock:
            self._failure = failure
            self._restoring = None
            left, self._log = self._log, []
        for operation in left:
            if not operation.future.done():
                operation.future.set_exception(failure)

    # The end

    def close(self) -> None:
        """Wait for submitted operations, restoring the model if needed; then close the client."""
        concurrent.futures.wait([operation.future for operation in self._waiting()])
        self._housekeeping.shutdown(wait=True)
        self._end()

    def _waiting(self) -> list[_Operation]:
        with self._lock:
            return list(self._log)

    def _end(self) -> None:
        with self._lock:
            self._is_closed = True
        self._training.close()
        self._housekeeping.shutdown(wait=False, cancel_futures=True)
        for service in (self._service, self._housekeeper):
            if service is not None:
                service.close()

    def __enter__(self) -> KeptAlive:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None:
            self.close()
        else:
            self._end()


def is_lost(failure: BaseException | None) -> bool:
    """True if *failure* or its cause means that the model is lost."""
    while isinstance(failure, errors.PriorOperationFailedError):
        failure = failure.__cause__
    if isinstance(failure, errors.NotOfferedError):
        return False
    if isinstance(failure, errors.RequestFailedError):
        return failure.category == "server"
    return isinstance(failure, LOST)


def _close(training: TrainingClient, service: ServiceClient | None) -> None:
    """Close the clients of the lost model; the server may not answer any more."""
    try:
        training.close(cancel=True, timeout=CLOSE_SECONDS)
        if service is not None:
            service.close()
    except errors.TinkexError as exc:
        logger.debug("closing the lost model: %s", exc)
