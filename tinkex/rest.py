"""RestClient: what is stored on the server - runs, checkpoints, sessions.

Knows the lookups and changes of stored things; every method returns its value, for each is one
short request. Downloading is download.py's, exporting export.py's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from tinkex import errors, types, wire
from tinkex.checkpoints import download, export
from tinkex.config import Config
from tinkex.runtime.connection import Connection, connect

T = TypeVar("T")

AccessScope = Literal["owned", "accessible"]

PAGE = 100


class RestClient:
    """Lists and changes what is stored on a server. Needs no session.

    Paths are `tinker://<training run>/<weights or sampler_weights>/<name>`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        config: Config | None = None,
        connection: Connection | None = None,
    ) -> None:
        self._owns_connection = connection is None
        if connection is None:
            settings, engine = connect(base_url, api_key, settings=config)
            connection = Connection(settings, engine=engine)
        self._connection = connection

    # Training runs.

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> types.TrainingRunsResponse:
        """One page of training runs, newest first."""
        query = {**_page(limit, offset), "access_scope": _scope(access_scope)}
        return self._connection.call(wire.LIST_TRAINING_RUNS, query=query)

    def iter_training_runs(
        self, access_scope: AccessScope = "owned", *, page: int = PAGE
    ) -> Iterator[types.TrainingRun]:
        """All training runs, page by page as they are needed."""

        def fetch(offset: int) -> tuple[list[types.TrainingRun], types.Cursor | None]:
            response = self.list_training_runs(page, offset, access_scope)
            return response.training_runs, response.cursor

        return _all_pages(fetch)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """One training run. NotFoundError if there is none of this id."""
        return self._connection.call(
            wire.GET_TRAINING_RUN,
            query={"access_scope": _scope(access_scope)},
            run_id=_id(training_run_id),
        )

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """The training run that a checkpoint is of."""
        return self.get_training_run(_parsed(tinker_path).training_run_id, access_scope)

    # Checkpoints.

    def list_checkpoints(self, training_run_id: str) -> types.CheckpointsListResponse:
        """All checkpoints of one training run."""
        return self._connection.call(wire.LIST_CHECKPOINTS, run_id=_id(training_run_id))

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> types.CheckpointsListResponse:
        """One page of checkpoints of all runs, newest first."""
        return self._connection.call(wire.LIST_USER_CHECKPOINTS, query=_page(limit, offset))

    def iter_user_checkpoints(self, *, page: int = PAGE) -> Iterator[types.Checkpoint]:
        """All checkpoints of all runs, page by page as they are needed."""

        def fetch(offset: int) -> tuple[list[types.Checkpoint], types.Cursor | None]:
            response = self.list_user_checkpoints(page, offset)
            return response.checkpoints, response.cursor

        return _all_pages(fetch)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> types.WeightsInfoResponse:
        """What a checkpoint is of: base model, rank, flags."""
        _parsed(tinker_path)
        return self._connection.call(wire.WEIGHTS_INFO, types.WeightsInfoRequest(tinker_path))

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> None:
        """Delete a checkpoint; its id has its segment: `weights/<name>`."""
        self._on_checkpoint(wire.DELETE_CHECKPOINT, training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Delete a checkpoint."""
        self._on_path(wire.DELETE_CHECKPOINT, tinker_path)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Let every key of the server read a checkpoint."""
        self._on_path(wire.PUBLISH_CHECKPOINT, tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> None:
        """Keep a published checkpoint to its owner again."""
        self._on_path(wire.UNPUBLISH_CHECKPOINT, tinker_path)

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> None:
        """Let a checkpoint expire in *ttl_seconds* from now; None is never."""
        request = types.SetTtlRequest(types.check_ttl(ttl_seconds))
        self._on_path(wire.SET_CHECKPOINT_TTL, tinker_path, request)

    def get_checkpoint_archive_url(
        self, tinker_path: str, *, on_wait: Callable[[float], None] | None = None
    ) -> types.CheckpointArchiveUrlResponse:
        """Where the archive of a checkpoint can be fetched.

        A server that is still packing it (503) is asked again, 6 times in all, 30 s apart.
        """
        return download.archive_url(self._connection, _parsed(tinker_path), on_wait)

    def download_checkpoint(
        self,
        tinker_path: str,
        output_dir: str | Path,
        force: bool = False,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Path:
        """Fetch a checkpoint as a folder of files (a PEFT adapter).

        Streamed to disk, resumed where the connection breaks, checked, unpacked safely, and moved
        into place when it is whole.

        Args:
            output_dir: the folder to make.
            force: replace what is there; it stays until the new one is complete.
            progress: called with (bytes so far, total bytes or None).

        Returns:
            *output_dir* as a Path.

        Raises:
            FileExistsError: If *output_dir* is there and not empty, without *force*.
            DownloadError: If what comes is not whole, or not safe to unpack.
        """
        return download.download(
            self._connection, _parsed(tinker_path), _folder(output_dir), force, progress
        )

    def export_checkpoint(
        self,
        tinker_path: str,
        output_dir: str | Path,
        merge: bool = False,
        *,
        base_model: str | None = None,
        force: bool = False,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Path:
        """Fetch a checkpoint for use without this package.

        Args:
            output_dir: the folder to make: a PEFT adapter (adapter_config.json and
                adapter_model.safetensors).
            merge: make it a whole Hugging Face model instead: the base model with the adapter
                folded in, and its tokenizer. Needs `tinkex[local]` and the base model.
            base_model: a directory, a hub id or "tiny"; by default what the server says. It is
                what the adapter names as its base, and what is merged into.
            force, progress: as for `download_checkpoint`.

        Returns:
            *output_dir* as a Path.

        Raises:
            FileExistsError: If *output_dir* is there and not empty, without *force*.
            ValueError: If the base model cannot be found, or is not the adapter's.
            DownloadError: If what comes is not whole, not safe to unpack, or no adapter.
            MissingExtraError: If *merge* needs what is not installed.
        """
        parsed = _parsed(tinker_path)
        try:
            base_model = base_model or self.get_weights_info_by_tinker_path(tinker_path).base_model
        except errors.NotOfferedError:
            pass  # the adapter itself may say it
        return export.export(
            self._connection,
            parsed,
            _folder(output_dir),
            base_model,
            merge=merge,
            force=force,
            progress=progress,
        )

    # Sessions and samplers.

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> types.ListSessionsResponse:
        """One page of session ids, newest first."""
        query = {**_page(limit, offset), "access_scope": _scope(access_scope)}
        return self._connection.call(wire.LIST_SESSIONS, query=query)

    def iter_sessions(
        self, access_scope: AccessScope = "owned", *, page: int = PAGE
    ) -> Iterator[str]:
        """All session ids, page by page as they are needed."""

        def fetch(offset: int) -> tuple[list[str], types.Cursor | None]:
            response = self.list_sessions(page, offset, access_scope)
            return response.sessions, response.cursor

        return _all_pages(fetch)

    def get_session(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> types.GetSessionResponse:
        """The training runs and samplers of a session."""
        return self._connection.call(
            wire.GET_SESSION,
            query={"access_scope": _scope(access_scope)},
            session_id=_id(session_id),
        )

    def get_sampler(self, sampler_id: str) -> types.GetSamplerResponse:
        """What a sampler samples from."""
        return self._connection.call(wire.GET_SAMPLER, sampler_id=_id(sampler_id))

    # The server.

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The base models that the server offers."""
        return self._connection.call(wire.CAPABILITIES)

    def health(self) -> types.HealthResponse:
        """Ask the server for its health."""
        return self._connection.call(wire.HEALTHZ)

    def close(self) -> None:
        """Close the connection, if it is this client's own. Safe to call twice."""
        if self._owns_connection:
            self._connection.close()

    def __enter__(self) -> RestClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RestClient of {self._connection.config.base_url}>"

    def _on_path(self, endpoint: wire.Endpoint[Any], tinker_path: str, request: Any = None) -> None:
        parsed = _parsed(tinker_path)
        self._on_checkpoint(endpoint, parsed.training_run_id, parsed.checkpoint_id, request)

    def _on_checkpoint(
        self,
        endpoint: wire.Endpoint[Any],
        training_run_id: str,
        checkpoint_id: str,
        request: Any = None,
    ) -> None:
        self._connection.call(
            endpoint,
            request,
            run_id=_id(training_run_id),
            checkpoint_id=_checkpoint_id(checkpoint_id),
        )


def _parsed(tinker_path: str) -> types.ParsedCheckpointTinkerPath:
    return types.ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)


def _folder(value: str | Path) -> Path:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise TypeError(f"output_dir must be the path of a folder to make, got {value!r}.")
    return Path(value)


def _checkpoint_id(value: object) -> str:
    parts = value.split("/") if isinstance(value, str) else []
    if len(parts) != 2 or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"checkpoint_id {value!r} must have its segment, as in weights/0001.")
    return str(value)


def _page(limit: int, offset: int) -> dict[str, int]:
    for name, value, least in (("limit", limit, 1), ("offset", offset, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return {"limit": limit, "offset": offset}


def _scope(access_scope: str) -> str:
    if access_scope not in ("owned", "accessible"):
        raise ValueError(f'access_scope must be "owned" or "accessible", got {access_scope!r}.')
    return access_scope


def _id(value: object) -> str:
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value:
        raise ValueError(f"an id must be a non-empty str without a slash, got {value!r}.")
    return value


def _all_pages(fetch: Callable[[int], tuple[list[T], types.Cursor | None]]) -> Iterator[T]:
    """Everything, page after page; ends at an empty page or when the server's total is reached.

    A server that knows no pages sends the same again: that is the end, too.
    """
    offset, before = 0, None
    while True:
        items, cursor = fetch(offset)
        if not items or items == before:
            return
        yield from items
        offset, before = offset + len(items), items
        if cursor is not None and cursor.total_count and offset >= cursor.total_count:
            return
