"""Sessions, promises and the features of a server."""

from __future__ import annotations

from typing import Any

import attrs

from tinkex.types import checks
from tinkex.types.ready import Ready

__all__ = [
    "AuthTokenRequest",
    "AuthTokenResponse",
    "CancelFutureRequest",
    "ClientConfig",
    "ClientConfigRequest",
    "Completion",
    "CreateSessionRequest",
    "CreateSessionResponse",
    "FinishSessionRequest",
    "GetServerCapabilitiesResponse",
    "HealthResponse",
    "KeyOwner",
    "Promise",
    "RetrieveFutureRequest",
    "RetrieveFuturesRequest",
    "RetrieveFuturesResponse",
    "SessionHeartbeatRequest",
    "SupportedModel",
]


@attrs.frozen
class ClientConfigRequest:
    sdk_version: str


@attrs.frozen
class ClientConfig:
    """Features and limits of a server, from `client/config`; defaults are the protocol's."""

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    sample_dispatch_bytes_semaphore_size: int = 10 * 1024 * 1024
    inflight_response_bytes_semaphore_size: int = 50 * 1024 * 1024
    proto_compress_fwdbwd: bool = False
    fwdbwd_max_chunk_len: int = 1024
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    sample_max_concurrent_requests: int = 2000
    sample_use_retrieve_futures: bool = False
    sample_join_sampling_session: bool = False
    #: True if forward_backward requests may be protobuf; None if the server does not send it.
    proto_write_fwdbwd: bool | None = None


@attrs.frozen
class CreateSessionRequest:
    tags: list[str] = attrs.field(factory=list)
    user_metadata: dict[str, Any] = attrs.field(factory=dict, converter=checks.dict_or_empty)
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


@attrs.frozen
class CreateSessionResponse:
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


@attrs.frozen
class SessionHeartbeatRequest:
    session_id: str


@attrs.frozen
class FinishSessionRequest:
    """reason: {"type": "success" | "errored" | "interrupted"}."""

    reason: dict[str, Any] = attrs.field(factory=lambda: {"type": "success"})
    detail: str | None = attrs.field(default=None, metadata={"send_null": True})


@attrs.frozen
class AuthTokenRequest:
    """Empty: the credential is sent in the X-API-Key header."""


@attrs.frozen
class AuthTokenResponse:
    jwt: str = attrs.field(repr=False)


@attrs.frozen
class KeyOwner(Ready):
    """The owner of a key.

    Attributes:
        user_details: {"email": ...}.
        org_details: {"name": ...}.
    """

    user_details: dict[str, Any] = attrs.field(factory=dict)
    org_details: dict[str, Any] = attrs.field(factory=dict)

    @property
    def email(self) -> str | None:
        """The user's e-mail address; the user's name on servers with named users."""
        return self.user_details.get("email")

    @property
    def organization(self) -> str | None:
        return self.org_details.get("name")


@attrs.frozen
class HealthResponse:
    status: str = "ok"


@attrs.frozen
class SupportedModel:
    model_name: str | None = None
    max_context_length: int | None = None
    trainable: bool = True
    sampleable: bool = True


@attrs.frozen
class GetServerCapabilitiesResponse(Ready):
    supported_models: list[SupportedModel] = attrs.field(factory=list)

    @property
    def model_names(self) -> list[str]:
        return [m.model_name for m in self.supported_models if m.model_name]


@attrs.frozen
class Promise:
    """The server's acknowledgement of an accepted operation."""

    request_id: str
    model_id: str | None = None
    sample_sequence_ids: list[str] | None = None


@attrs.frozen
class RetrieveFutureRequest:
    request_id: str
    allow_metadata_only: bool = False


@attrs.frozen
class CancelFutureRequest:
    request_id: str


@attrs.frozen
class RetrieveFuturesRequest:
    """One long poll for all of a sampling session's results.

    Attributes:
        target: {"type": "sampling_session", "sampling_session_id", "cloned_sampler_id"}.
        prev_cursor: the cursor of the previous response.
        timeout: seconds to wait; 0 does not wait, None lets the server choose.
        retrieved_request_ids: results that the client has received, which the server may drop.
    """

    target: dict[str, Any]
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = attrs.field(factory=list)


@attrs.frozen
class Completion:
    """state: "finished" or "failed"."""

    state: str
    request_id: str
    response_payload_uncompressed_size: int | None = None


@attrs.frozen
class RetrieveFuturesResponse:
    completions: list[Completion] = attrs.field(factory=list)
    cursor: int = 0
