"""The endpoint table of the API: paths, methods, request and response types.

The client sends to these paths and tinkex's server serves them. Neither imports the other: they
share only this table and the types.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import attrs

from tinkex import types

T = TypeVar("T")

PREFIX = "/api/v1/"

#: Largest responses in bytes: the default, of a list, and of a result (four times the largest
#: request, because JSON needs many characters for a number).
SMALL_ANSWER, LIST_ANSWER, RESULT_ANSWER = 1 << 20, 1 << 24, 1 << 28


@attrs.frozen
class Endpoint(Generic[T]):
    """An endpoint that returns its result at once.

    Attributes:
        method, path: of the HTTP request; the path follows `PREFIX` and may contain {parameters}.
        result: the type of the response; `Nothing` if it does not matter.
        request: the type of the request; None if there is no body.
        tag: the value of "type" in the request's JSON, if the protocol has one.
        most_bytes: largest accepted response.
    """

    method: str
    path: str
    result: type[T]
    request: type[Any] | None = None
    tag: str | None = None
    most_bytes: int = attrs.field(default=SMALL_ANSWER, kw_only=True)


@attrs.frozen
class Operation(Endpoint[T]):
    """An endpoint for long work: it returns a promise, and the client polls for the result.

    Attributes:
        name: of the operation in the protocol, such as in the X-Tinker-Request-Type header.
    """

    name: str = attrs.field(kw_only=True)
    most_bytes: int = attrs.field(default=RESULT_ANSWER, kw_only=True)


class Nothing:
    """The result type of an endpoint whose response does not matter."""


CLIENT_CONFIG = Endpoint("POST", "client/config", types.ClientConfig, types.ClientConfigRequest)
AUTH_TOKEN = Endpoint("POST", "auth/token", types.AuthTokenResponse)
HEALTHZ = Endpoint("GET", "healthz", types.HealthResponse)
CAPABILITIES = Endpoint("GET", "get_server_capabilities", types.GetServerCapabilitiesResponse)
CREATE_SESSION = Endpoint(
    "POST",
    "create_session",
    types.CreateSessionResponse,
    types.CreateSessionRequest,
    "create_session",
)
SESSION_HEARTBEAT = Endpoint(
    "POST", "session_heartbeat", Nothing, types.SessionHeartbeatRequest, "session_heartbeat"
)
FINISH_SESSION = Endpoint(
    "POST", "sessions/{session_id}/finish", Nothing, types.FinishSessionRequest
)
TELEMETRY = Endpoint("POST", "telemetry", Nothing)

GET_INFO = Endpoint("POST", "get_info", types.GetInfoResponse, types.GetInfoRequest, "get_info")
WEIGHTS_INFO = Endpoint("POST", "weights_info", types.WeightsInfoResponse, types.WeightsInfoRequest)
RUN_METRICS = Endpoint(
    "GET", "runs/{run_id}/metrics", types.RunMetricsResponse, most_bytes=LIST_ANSWER
)
REPORT_METRICS = Endpoint("POST", "runs/{run_id}/metrics", Nothing, types.ReportMetricsRequest)
CREATE_SAMPLING_SESSION = Endpoint(
    "POST",
    "create_sampling_session",
    types.CreateSamplingSessionResponse,
    types.CreateSamplingSessionRequest,
    "create_sampling_session",
)
JOIN_SAMPLING_SESSION = Endpoint(
    "POST",
    "join_sampling_session",
    types.JoinSamplingSessionResponse,
    types.JoinSamplingSessionRequest,
    "join_sampling_session",
)
GET_SAMPLER = Endpoint("GET", "samplers/{sampler_id}", types.GetSamplerResponse)
STREAM_SAMPLE = Endpoint("POST", "stream_sample", Nothing, types.SampleRequest, "sample")

RETRIEVE_FUTURE = Endpoint(
    "POST",
    "retrieve_future",
    Nothing,
    types.RetrieveFutureRequest,
    most_bytes=RESULT_ANSWER,
)
RETRIEVE_FUTURES = Endpoint(
    "POST",
    "retrieve_futures",
    types.RetrieveFuturesResponse,
    types.RetrieveFuturesRequest,
    most_bytes=LIST_ANSWER,
)
CANCEL_FUTURE = Endpoint("POST", "cancel_future", Nothing, types.CancelFutureRequest)

CREATE_MODEL = Operation(
    "POST",
    "create_model",
    types.CreateModelResponse,
    types.CreateModelRequest,
    "create_model",
    name="CreateModel",
)
UNLOAD_MODEL = Operation(
    "POST",
    "unload_model",
    types.UnloadModelResponse,
    types.UnloadModelRequest,
    "unload_model",
    name="UnloadModel",
)
#: In protobuf, both use the endpoint forward_backward, with forward_only in the request.
FORWARD = Operation(
    "POST", "forward", types.ForwardBackwardOutput, types.ForwardBackwardRequest, name="Forward"
)
FORWARD_BACKWARD = Operation(
    "POST",
    "forward_backward",
    types.ForwardBackwardOutput,
    types.ForwardBackwardRequest,
    name="ForwardBackward",
)
OPTIM_STEP = Operation(
    "POST",
    "optim_step",
    types.OptimStepResponse,
    types.OptimStepRequest,
    "optim_step",
    name="OptimStep",
)
SAVE_WEIGHTS = Operation(
    "POST",
    "save_weights",
    types.SaveWeightsResponse,
    types.SaveWeightsRequest,
    "save_weights",
    name="SaveWeights",
)
SAVE_WEIGHTS_FOR_SAMPLER = Operation(
    "POST",
    "save_weights_for_sampler",
    types.SaveWeightsForSamplerResponse,
    types.SaveWeightsForSamplerRequest,
    "save_weights_for_sampler",
    name="SaveWeightsForSampler",
)
SAVE_WEIGHTS_EXTERNAL = Operation(
    "POST",
    "save_weights_external",
    types.SaveWeightsExternalResponse,
    types.SaveWeightsExternalRequest,
    "save_weights_external",
    name="SaveWeightsExternal",
)
LOAD_WEIGHTS = Operation(
    "POST",
    "load_weights",
    types.LoadWeightsResponse,
    types.LoadWeightsRequest,
    "load_weights",
    name="LoadWeights",
)
SAMPLE = Operation(
    "POST", "asample", types.SampleResponse, types.SampleRequest, "sample", name="Sample"
)

LIST_TRAINING_RUNS = Endpoint(
    "GET", "training_runs", types.TrainingRunsResponse, most_bytes=LIST_ANSWER
)
GET_TRAINING_RUN = Endpoint("GET", "training_runs/{run_id}", types.TrainingRun)
LIST_CHECKPOINTS = Endpoint(
    "GET",
    "training_runs/{run_id}/checkpoints",
    types.CheckpointsListResponse,
    most_bytes=LIST_ANSWER,
)
LIST_USER_CHECKPOINTS = Endpoint(
    "GET", "checkpoints", types.CheckpointsListResponse, most_bytes=LIST_ANSWER
)
_CHECKPOINT = "training_runs/{run_id}/checkpoints/{checkpoint_id}"  # the id contains a slash
DELETE_CHECKPOINT = Endpoint("DELETE", _CHECKPOINT, Nothing)
PUBLISH_CHECKPOINT = Endpoint("POST", f"{_CHECKPOINT}/publish", Nothing)
UNPUBLISH_CHECKPOINT = Endpoint("DELETE", f"{_CHECKPOINT}/publish", Nothing)
SET_CHECKPOINT_TTL = Endpoint("PUT", f"{_CHECKPOINT}/ttl", Nothing, types.SetTtlRequest)
CHECKPOINT_ARCHIVE = Endpoint("GET", f"{_CHECKPOINT}/archive", types.CheckpointArchiveUrlResponse)
#: The key that may read the weights, for requests that copy them; load_weights has it in the body.
WEIGHTS_ACCESS_TOKEN = "X-Tinker-Weights-Access-Token"
COPY_WEIGHTS = Endpoint("POST", "copy_weights", types.CopyWeightsResponse, types.CopyWeightsRequest)
EXTERNAL_WEIGHTS_URLS = Endpoint(
    "GET", f"{_CHECKPOINT}/external_weights_urls", types.ExternalWeightsUrlsResponse
)
SET_PROJECT = Endpoint("PUT", "sessions/{session_id}/project", Nothing, types.SetProjectRequest)
SEARCH_SESSIONS = Endpoint(
    "POST",
    "sessions/search",
    types.SessionSearchResponse,
    types.SessionSearchRequest,
    most_bytes=LIST_ANSWER,
)
WHOAMI = Endpoint("GET", "auth/apikey/me", types.KeyOwner)
LIST_SESSIONS = Endpoint("GET", "sessions", types.ListSessionsResponse, most_bytes=LIST_ANSWER)
GET_SESSION = Endpoint(
    "GET", "sessions/{session_id}", types.GetSessionResponse, most_bytes=LIST_ANSWER
)

#: Every operation by the name it has on the wire.
OPERATIONS: dict[str, Operation[Any]] = {
    value.name: value for value in list(globals().values()) if isinstance(value, Operation)
}
