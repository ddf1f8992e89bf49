"""Objects stored on a server: training runs, checkpoints, sessions."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any, Literal

import attrs

from tinkex.types import display
from tinkex.types.ready import Ready

__all__ = [
    "Checkpoint",
    "CheckpointArchiveUrlResponse",
    "CheckpointType",
    "CheckpointsListResponse",
    "Cursor",
    "ExternalWeightsUrlsResponse",
    "GetSessionResponse",
    "ListSessionsResponse",
    "ParsedCheckpointTinkerPath",
    "ReportMetricsRequest",
    "RunMetricsResponse",
    "RunSample",
    "SessionSearchRequest",
    "SessionSearchResponse",
    "SessionSummary",
    "SetProjectRequest",
    "SetTtlRequest",
    "TrainingRun",
    "TrainingRunsResponse",
]

CheckpointType = Literal["training", "sampler", "external"]

_SEGMENTS: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@attrs.frozen
class ParsedCheckpointTinkerPath:
    """`tinker://<training run>/<weights | sampler_weights | external_weights>/<name>`, in parts.

    Some servers (SkyRL) omit the segment of sampler weights.

    Attributes:
        checkpoint_id: with its segment, as in listings: `weights/<name>`; only the name if the path
            has no segment.
    """

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @property
    def name(self) -> str:
        return self.checkpoint_id.split("/")[-1]

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Raises ValueError with the path and the expected form."""
        form = "tinker://<training run>/<weights or sampler_weights>/<name>"
        if not isinstance(tinker_path, str) or not tinker_path.startswith("tinker://"):
            raise ValueError(
                f"Checkpoint path must start with tinker://, got: {tinker_path!r} (as in {form})."
            )
        parts = tinker_path[len("tinker://") :].split("/")
        without_segment = len(parts) == 2 and parts[1] not in _SEGMENTS
        if len(parts) != 3 and not without_segment:
            raise ValueError(f"Invalid checkpoint path: {tinker_path!r} (expected {form}).")
        if not all(parts) or any(p in (".", "..") for p in parts):
            raise ValueError(f"Invalid checkpoint path: {tinker_path!r} (expected {form}).")
        if without_segment:
            return cls(tinker_path, parts[0], "sampler", parts[1])
        run_id, segment, name = parts
        if segment not in _SEGMENTS:
            raise ValueError(f"Invalid checkpoint type in path: {tinker_path!r} (expected {form}).")
        return cls(tinker_path, run_id, _SEGMENTS[segment], f"{segment}/{name}")


@attrs.frozen
class Cursor:
    offset: int = 0
    limit: int = 0
    total_count: int = 0


@attrs.frozen
class Checkpoint:
    """A stored checkpoint; times are ISO 8601 in UTC, sizes bytes."""

    checkpoint_id: str
    checkpoint_type: CheckpointType
    tinker_path: str
    time: str | None = None
    size_bytes: int | None = None
    public: bool = attrs.field(default=False, converter=bool)
    expires_at: str | None = None
    user_metadata: dict[str, Any] | None = None
    base_model: str | None = None

    @property
    def training_run_id(self) -> str:
        """The id of the training run that saved it."""
        return ParsedCheckpointTinkerPath.from_tinker_path(self.tinker_path).training_run_id

    def __repr__(self) -> str:
        return f"<Checkpoint {_words(*_checkpoint_row(self))}>"

    def _repr_html_(self) -> str:
        """Its fields as a table, for notebooks."""
        return display.html_fields("Checkpoint", attrs.asdict(self))


@attrs.frozen
class CheckpointsListResponse(Ready):
    """A page of checkpoints, newest first."""

    checkpoints: list[Checkpoint] = attrs.field(factory=list)
    cursor: Cursor | None = None

    def __repr__(self) -> str:
        title = display.count(len(self.checkpoints), "checkpoint")
        return f"<{display.lines(title, self.checkpoints, repr)}>"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        title = display.count(len(self.checkpoints), "checkpoint")
        header = ["path", "type", "size", "time", "expires"]
        return display.html_rows(title, header, map(_checkpoint_row, self.checkpoints))


@attrs.frozen
class TrainingRun(Ready):
    """A model that is or was trained; the time is ISO 8601 in UTC."""

    training_run_id: str
    base_model: str = ""
    model_owner: str = ""
    is_lora: bool = True
    last_request_time: str | None = None
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<TrainingRun {_words(*_run_row(self))}>"

    def _repr_html_(self) -> str:
        """Its fields as a table, for notebooks."""
        fields = {field.name: getattr(self, field.name) for field in attrs.fields(TrainingRun)}
        return display.html_fields("TrainingRun", fields)


@attrs.frozen
class RunSample:
    """A prompt, and the completion by a training run's model after a step."""

    step: int
    prompt: str
    text: str


@attrs.frozen
class RunMetricsResponse(Ready):
    """Metrics of a training run, in order of arrival.

    Attributes:
        points: numbers by name, including "step" and "time" (seconds since the epoch).
        next: pass it as *after* to get later points.
        samples: the newest samples reported by its client, oldest first.
    """

    points: list[dict[str, float]] = attrs.field(factory=list)
    next: int = 0
    samples: list[RunSample] = attrs.field(factory=list)


@attrs.frozen
class ReportMetricsRequest:
    """Metrics and samples of a training run, measured by its client."""

    points: list[dict[str, float]]
    samples: list[RunSample] = attrs.field(factory=list)


@attrs.frozen
class TrainingRunsResponse(Ready):
    """A page of training runs, newest first."""

    training_runs: list[TrainingRun] = attrs.field(factory=list)
    cursor: Cursor | None = None

    def __repr__(self) -> str:
        title = display.count(len(self.training_runs), "training run")
        return f"<{display.lines(title, self.training_runs, repr)}>"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        title = display.count(len(self.training_runs), "training run")
        header = ["id", "base model", "adapter", "last request", "last checkpoint"]
        return display.html_rows(title, header, map(_run_row, self.training_runs))


@attrs.frozen
class ListSessionsResponse(Ready):
    sessions: list[str] = attrs.field(factory=list)
    cursor: Cursor | None = None


@attrs.frozen
class GetSessionResponse(Ready):
    training_run_ids: list[str] = attrs.field(factory=list)
    sampler_ids: list[str] = attrs.field(factory=list)
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


@attrs.frozen
class SetTtlRequest:
    """ttl_seconds: from now; None is never."""

    ttl_seconds: int | None = attrs.field(default=None, metadata={"send_null": True})


@attrs.frozen
class SetProjectRequest:
    """project_id: the new project of the session."""

    project_id: str


@attrs.frozen
class SessionSearchRequest:
    """Filters for sessions; all given filters must match.

    Args:
        session_id: exact.
        project_ids: sessions of these projects; None is all.
        user_metadata: pairs that a session must have.
        display_name: a part of the name; case-insensitive.
        owner: whose sessions: {"type": "own"}, {"type": "accessible"}, or {"type": "user",
            "owner_urns": [...]}.
        statuses: any of these, as in {"type": "active"}; None is all.
        limit: sessions of a page.
        cursor: the `next_cursor` of the previous page.
    """

    session_id: str | None = None
    project_ids: list[str] | None = None
    user_metadata: dict[str, Any] = attrs.field(factory=dict)
    display_name: str | None = None
    owner: dict[str, Any] = attrs.field(factory=lambda: {"type": "own"})
    statuses: list[dict[str, Any]] | None = None
    limit: int = 50
    cursor: dict[str, Any] | None = None


@attrs.frozen
class SessionSummary:
    """A session in search results; the time is ISO 8601 in UTC, sizes are bytes."""

    session_id: str
    created_at: str | None = None
    owner: str = ""
    project_id: str = ""
    checkpoints_count: int = 0
    status: dict[str, Any] | None = None
    display_name: str | None = None
    user_metadata: dict[str, Any] | None = None
    checkpoint_storage_bytes: int | None = None


@attrs.frozen
class SessionSearchResponse(Ready):
    """A page of sessions, newest first; next_cursor is None on the last."""

    sessions: list[SessionSummary] = attrs.field(factory=list)
    next_cursor: dict[str, Any] | None = None


def _as_moment(value: datetime | str | None) -> datetime | None:
    """A time with a time zone, from an object or ISO 8601."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    if value is not None and value.tzinfo is None:
        value = value.replace(tzinfo=timezone.utc)
    return value


@attrs.frozen
class ExternalWeightsUrlsResponse(Ready):
    """URLs of the files of external weights, which need no key.

    Attributes:
        urls: the URL of each file, by its path in the checkpoint.
        expires: when the URLs expire.
    """

    urls: dict[str, str] = attrs.field(repr=lambda urls: repr(sorted(urls)))
    expires: datetime | None = attrs.field(default=None, converter=_as_moment)


@attrs.frozen
class CheckpointArchiveUrlResponse(Ready):
    url: str
    expires: str | None = None


def _checkpoint_row(checkpoint: Checkpoint) -> tuple[str | None, ...]:
    """Path, type, size, time, expiry."""
    size = checkpoint.size_bytes
    expires = checkpoint.expires_at
    return (
        checkpoint.tinker_path,
        checkpoint.checkpoint_type + (", public" if checkpoint.public else ""),
        None if size is None else f"{size / 1e6:,.1f} MB",
        checkpoint.time,
        f"expires {expires}" if expires else None,
    )


def _run_row(run: TrainingRun) -> tuple[str | None, ...]:
    """Id, base model, adapter, time of the last request, last checkpoint."""
    last = run.last_checkpoint or run.last_sampler_checkpoint
    return (
        run.training_run_id,
        run.base_model,
        (f"LoRA rank {run.lora_rank}" if run.lora_rank else "LoRA") if run.is_lora else None,
        run.last_request_time,
        last.tinker_path if last else None,
    )


def _words(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)
