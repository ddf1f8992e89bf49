"""What is stored on a server: training runs, checkpoints, sessions."""

from __future__ import annotations

from typing import Any, Literal

import attrs

CheckpointType = Literal["training", "sampler", "external"]

_SEGMENTS: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}


@attrs.frozen
class ParsedCheckpointTinkerPath:
    """`tinker://<training run>/<weights | sampler_weights | external_weights>/<name>`, in parts.

    Some servers (SkyRL) leave the segment of sampler weights out.

    Attributes:
        checkpoint_id: with its segment, as listings have it: `weights/<name>`; or the name alone,
            where the path has no segment.
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
        """Raises ValueError naming the path and the form it should have."""
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

    @property
    def training_run_id(self) -> str:
        return ParsedCheckpointTinkerPath.from_tinker_path(self.tinker_path).training_run_id


@attrs.frozen
class CheckpointsListResponse:
    checkpoints: list[Checkpoint] = attrs.field(factory=list)
    cursor: Cursor | None = None


@attrs.frozen
class TrainingRun:
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


@attrs.frozen
class TrainingRunsResponse:
    training_runs: list[TrainingRun] = attrs.field(factory=list)
    cursor: Cursor | None = None


@attrs.frozen
class ListSessionsResponse:
    sessions: list[str] = attrs.field(factory=list)
    cursor: Cursor | None = None


@attrs.frozen
class GetSessionResponse:
    training_run_ids: list[str] = attrs.field(factory=list)
    sampler_ids: list[str] = attrs.field(factory=list)
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


@attrs.frozen
class SetTtlRequest:
    """ttl_seconds: from now; None is never."""

    ttl_seconds: int | None = attrs.field(default=None, metadata={"send_null": True})


@attrs.frozen
class CheckpointArchiveUrlResponse:
    url: str
    expires: str | None = None
