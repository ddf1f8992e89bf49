"""RestClient: the objects stored on a server: runs, checkpoints, sessions.

Lookups and changes of stored objects; every method is one short request and returns its value.
Downloading is in download.py, exporting in export.py. Long, because it is one class, mostly
documentation of public methods.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from tinkex import errors, types, wire
from tinkex.checkpoints import download, export
from tinkex.config import Config
from tinkex.futures import OperationFuture, awaits_value
from tinkex.runtime.connection import Connection, connect
from tinkex.runtime.restore import copy_headers

T = TypeVar("T")

AccessScope = Literal["owned", "accessible"]

PAGE = 100


class RestClient(types.Ready):
    """Lists and changes stored objects on a server. Needs no session.

    Returned values also have the methods of a finished future, as in
    `list_training_runs().result()`.

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
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> types.TrainingRunsResponse:
        """One page of training runs, newest first; only of *project_id* if given."""
        query = {
            **_page(limit, offset),
            "access_scope": _scope(access_scope),
            "project_id": project_id,
        }
        return self._connection.call(wire.LIST_TRAINING_RUNS, query=query)

    def iter_training_runs(
        self, access_scope: AccessScope = "owned", *, page: int = PAGE
    ) -> Iterator[types.TrainingRun]:
        """All training runs; pages are fetched as needed."""

        def fetch(offset: int) -> tuple[list[types.TrainingRun], types.Cursor | None]:
            response = self.list_training_runs(page, offset, access_scope)
            return response.training_runs, response.cursor

        return _all_pages(fetch)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """One training run. NotFoundError if there is none with this id."""
        return self._connection.call(
            wire.GET_TRAINING_RUN,
            query={"access_scope": _scope(access_scope)},
            run_id=_id(training_run_id),
        )

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> types.TrainingRun:
        """The training run of a checkpoint."""
        return self.get_training_run(_parsed(tinker_path).training_run_id, access_scope)

    def get_run_metrics(self, training_run_id: str, after: int = 0) -> types.RunMetricsResponse:
        """The metrics of a training run: a point per optimizer step, and reported points.

        Servers of tinkex have it.

        Args:
            after: `next` of an earlier response, to get only new points.
        """
        return self._connection.call(
            wire.RUN_METRICS,
            query={"after": _at_least(0, "after", after)},
            run_id=_id(training_run_id),
        )

    def report_run_metrics(
        self,
        training_run_id: str,
        points: Sequence[Mapping[str, float]],
        samples: Sequence[types.RunSample] = (),
    ) -> None:
        """Add custom metrics and samples to a training run, for the server's web page.

        Servers of tinkex have it.

        Args:
            points: up to 1,000 dicts of finite numbers by name, including "step".
            samples: up to 100. The server keeps the newest 200 of a run, and the first 4,000
                characters of each text.
        """
        checked = [_point(number, point) for number, point in enumerate(points)]
        self._connection.call(
            wire.REPORT_METRICS,
            types.ReportMetricsRequest(checked, _run_samples(samples)),
            run_id=_id(training_run_id),
        )

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
        """All checkpoints of all runs; pages are fetched as needed."""

        def fetch(offset: int) -> tuple[list[types.Checkpoint], types.Cursor | None]:
            response = self.list_user_checkpoints(page, offset)
            return response.checkpoints, response.cursor

        return _all_pages(fetch)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> types.WeightsInfoResponse:
        """Base model, rank and flags of a checkpoint."""
        _parsed(tinker_path)
        return self._connection.call(wire.WEIGHTS_INFO, types.WeightsInfoRequest(tinker_path))

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> types.Done:
        """Delete a checkpoint; its id includes the segment: `weights/<name>`."""
        return self._on_checkpoint(wire.DELETE_CHECKPOINT, training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> types.Done:
        """Delete a checkpoint."""
        return self._on_path(wire.DELETE_CHECKPOINT, tinker_path)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> types.Done:
        """Make a checkpoint readable with every key of the server."""
        return self._on_path(wire.PUBLISH_CHECKPOINT, tinker_path)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> types.Done:
        """Make a published checkpoint private again."""
        return self._on_path(wire.UNPUBLISH_CHECKPOINT, tinker_path)

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> types.Done:
        """Let a checkpoint expire *ttl_seconds* from now; None is never."""
        request = types.SetTtlRequest(types.check_ttl(ttl_seconds))
        return self._on_path(wire.SET_CHECKPOINT_TTL, tinker_path, request)

    def get_checkpoint_archive_url(
        self,
        training_run_id: str,
        checkpoint_id: str | None = None,
        *,
        on_wait: Callable[[float], None] | None = None,
    ) -> types.CheckpointArchiveUrlResponse:
        """The URL of a checkpoint's archive.

        If the server is still packing it (503), the request is repeated, 6 times in total, 30 s
        apart.

        Args:
            training_run_id: together with checkpoint_id (`weights/<name>`); or only the
                checkpoint's path, `tinker://...`.
            on_wait: called with the seconds of each wait.
        """
        path = training_run_id
        if checkpoint_id is not None:
            path = f"tinker://{_id(training_run_id)}/{_checkpoint_id(checkpoint_id)}"
        return download.archive_url(self._connection, _parsed(path), on_wait)

    def get_checkpoint_archive_url_from_tinker_path(
        self, tinker_path: str
    ) -> types.CheckpointArchiveUrlResponse:
        """`get_checkpoint_archive_url` for a path."""
        return self.get_checkpoint_archive_url(tinker_path)

    def get_external_weights_urls(self, tinker_path: str) -> types.ExternalWeightsUrlsResponse:
        """URLs of the files of external weights, which need no key until they expire.

        Args:
            tinker_path: `tinker://<training run>/external_weights/<name>`, from
                `save_weights_external`.
        """
        parsed = _parsed(tinker_path)
        if parsed.checkpoint_type != "external":
            raise ValueError(
                f"{tinker_path!r} has no URLs of single files; only external weights have "
                "(tinker://<training run>/external_weights/<name>, from save_weights_external)."
            )
        return self._connection.call(
            wire.EXTERNAL_WEIGHTS_URLS,
            run_id=parsed.training_run_id,
            checkpoint_id=parsed.checkpoint_id,
        )

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> OperationFuture[str]:
        """Copy a checkpoint into a new training run; returns a finished future of its path.

        Args:
            path: of this user's or of a public checkpoint.
            destination_project_id: the project that the copy belongs to.
            ttl_seconds: when the server may delete the copy; None is never.
            weights_access_token: a key that may read the checkpoint, if this client's key may not.
        """
        _parsed(path)
        request = types.CopyWeightsRequest(
            source_path=path,
            destination_project_id=destination_project_id,
            ttl_seconds=types.check_ttl(ttl_seconds),
        )
        headers = copy_headers(weights_access_token)
        future: OperationFuture[str] = OperationFuture(f"copy_weights of {path}")
        copied = self._connection.call(wire.COPY_WEIGHTS, request, headers=headers)
        future.set_result(copied.tinker_path)
        return future

    def download_checkpoint(
        self,
        tinker_path: str,
        output_dir: str | Path,
        force: bool = False,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Path:
        """Download a checkpoint as a folder of files (a PEFT adapter).

        Streamed to disk, resumed after broken connections, verified, unpacked safely, and moved
        into place when complete.

        Args:
            output_dir: the folder to make.
            force: replace an existing folder, once the new one is complete.
            progress: called with (bytes so far, total bytes or None).

        Returns:
            *output_dir* as a Path.

        Raises:
            FileExistsError: If *output_dir* is there and not empty, without *force*.
            DownloadError: If the download is incomplete, or not safe to unpack.
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
        """Download a checkpoint for use with other programs.

        Args:
            output_dir: the folder to make: a PEFT adapter (adapter_config.json and
                adapter_model.safetensors).
            merge: write a complete Hugging Face model instead: the base model with the adapter
                merged in, and its tokenizer. Needs `tinkex[local]` and the base model.
            base_model: a directory, a hub id or "tiny"; by default from the server. It is named in
                the adapter as its base, and used for merging.
            force, progress: as for `download_checkpoint`.

        Returns:
            *output_dir* as a Path.

        Raises:
            FileExistsError: If *output_dir* is there and not empty, without *force*.
            ValueError: If the base model cannot be found, or is not the adapter's.
            DownloadError: If the download is incomplete, not safe to unpack, or not an adapter.
            MissingExtraError: If *merge* needs packages that are not installed.
        """
        parsed = _parsed(tinker_path)
        try:
            base_model = base_model or self.get_weights_info_by_tinker_path(tinker_path).base_model
        except errors.NotOfferedError:
            pass  # the adapter itself may name it
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
        """All session ids; pages are fetched as needed."""

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

    def search_sessions(self, request: types.SessionSearchRequest) -> types.SessionSearchResponse:
        """One page of the sessions that match *request*, newest first."""
        if not isinstance(request, types.SessionSearchRequest):
            raise TypeError(f"request must be a types.SessionSearchRequest, got {request!r}.")
        return self._connection.call(wire.SEARCH_SESSIONS, request)

    def assign_session_project(self, session_id: str, project_id: str) -> types.Done:
        """Move a session, with its training runs, into a project."""
        request = types.SetProjectRequest(_id(project_id))
        self._connection.call(wire.SET_PROJECT, request, session_id=_id(session_id))
        return types.Done()

    def get_sampler(self, sampler_id: str) -> types.GetSamplerResponse:
        """The weights or base model of a sampler."""
        return self._connection.call(wire.GET_SAMPLER, sampler_id=_id(sampler_id))

    # The server.

    def get_server_capabilities(self) -> types.GetServerCapabilitiesResponse:
        """The base models that the server offers."""
        return self._connection.call(wire.CAPABILITIES)

    def whoami(self) -> types.KeyOwner:
        """The owner of the key, according to the server."""
        return self._connection.call(wire.WHOAMI)

    def get_telemetry(self) -> None:
        """None: requests without a session send no telemetry."""
        return None

    def health(self) -> types.HealthResponse:
        """The server's health."""
        return self._connection.call(wire.HEALTHZ)

    # The same for scripts that use asyncio.

    async def copy_weights_async(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> str:
        """`copy_weights`, in a coroutine; its value is the path."""
        copied = await awaits_value(self.copy_weights)(
            path,
            destination_project_id,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )
        return copied.result()

    assign_session_project_async = awaits_value(assign_session_project)
    delete_checkpoint_async = awaits_value(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = awaits_value(delete_checkpoint_from_tinker_path)
    get_checkpoint_archive_url_async = awaits_value(get_checkpoint_archive_url)
    get_checkpoint_archive_url_from_tinker_path_async = awaits_value(
        get_checkpoint_archive_url_from_tinker_path
    )
    get_external_weights_urls_async = awaits_value(get_external_weights_urls)
    get_sampler_async = awaits_value(get_sampler)
    get_session_async = awaits_value(get_session)
    get_training_run_async = awaits_value(get_training_run)
    get_training_run_by_tinker_path_async = awaits_value(get_training_run_by_tinker_path)
    list_checkpoints_async = awaits_value(list_checkpoints)
    list_sessions_async = awaits_value(list_sessions)
    list_training_runs_async = awaits_value(list_training_runs)
    list_user_checkpoints_async = awaits_value(list_user_checkpoints)
    publish_checkpoint_from_tinker_path_async = awaits_value(publish_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = awaits_value(set_checkpoint_ttl_from_tinker_path)
    unpublish_checkpoint_from_tinker_path_async = awaits_value(
        unpublish_checkpoint_from_tinker_path
    )

    def close(self) -> None:
        """Close the connection, if this client owns it. Safe to call twice."""
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

    def _on_path(
        self, endpoint: wire.Endpoint[Any], tinker_path: str, request: Any = None
    ) -> types.Done:
        parsed = _parsed(tinker_path)
        return self._on_checkpoint(endpoint, parsed.training_run_id, parsed.checkpoint_id, request)

    def _on_checkpoint(
        self,
        endpoint: wire.Endpoint[Any],
        training_run_id: str,
        checkpoint_id: str,
        request: Any = None,
    ) -> types.Done:
        self._connection.call(
            endpoint,
            request,
            run_id=_id(training_run_id),
            checkpoint_id=_checkpoint_id(checkpoint_id),
        )
        return types.Done()


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
    return {"limit": _at_least(1, "limit", limit), "offset": _at_least(0, "offset", offset)}


def _at_least(least: int, name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return value


def _run_samples(samples: Sequence[types.RunSample]) -> list[types.RunSample]:
    for number, sample in enumerate(samples):
        if not isinstance(sample, types.RunSample):
            raise TypeError(f"samples[{number}] must be a types.RunSample, got {sample!r}.")
    return list(samples)


def _point(number: int, point: object) -> dict[str, float]:
    if not isinstance(point, Mapping) or not point:
        raise TypeError(f"points[{number}] must be a dict of numbers by name, got {point!r}.")
    for name, value in point.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"points[{number}][{name!r}] must be a finite number, got {value!r}.")
    return dict(point)


def _scope(access_scope: str) -> str:
    if access_scope not in ("owned", "accessible"):
        raise ValueError(f'access_scope must be "owned" or "accessible", got {access_scope!r}.')
    return access_scope


def _id(value: object) -> str:
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value:
        raise ValueError(f"an id must be a non-empty str without a slash, got {value!r}.")
    return value


def _all_pages(fetch: Callable[[int], tuple[list[T], types.Cursor | None]]) -> Iterator[T]:
    """All items, page by page; ends at an empty page or at the server's total count.

    Also ends if a server without paging sends the same page again.
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
