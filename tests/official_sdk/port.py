"""What of the official SDK's surface `import tinkex as tinker` has: names, parameters, defaults.

Whatever differs has its reason here; test_port.py fails where one has none.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import attrs

import tinkex
from tests.official_sdk import page
from tinkex import types

SNAPSHOT = Path(__file__).with_name("surface.json")

_ADMIN = "billing and audit logs are the official service's; use its console"
_FUTURE = "the client itself is returned, and has the methods of a finished future"
_TRANSPORT = "tinkex uses requests, not httpx; times are in `Patience`"
_TRACED = "losses are computed by the client"
_FORM = "part of a request or of telemetry, which scripts do not make"

#: Names that tinkex does not have, and why.
ABSENT = {
    "AdminClient": _ADMIN,
    "BackcompatSamplingClientFuture": _FUTURE,
    "BackcompatTrainingClientFuture": _FUTURE,
    "DmelChunk": "audio is not supported",
    "ExperimentalWarning": "nothing warns with it",
    "PerDatumLossFn": "a function (logprobs, *loss inputs); no name for its type",
    "RequestOptions": _TRANSPORT,
    "Timeout": _TRANSPORT,
    "RestClient.export_session_trace": "traces of sessions are the official service's",
    "RestClient.export_session_trace_async": "traces of sessions are the official service's",
    "RestClient.get_audit_log": _ADMIN,
    "RestClient.get_audit_log_async": _ADMIN,
    "RestClient.get_billing_usage": _ADMIN,
    "RestClient.get_billing_usage_async": _ADMIN,
    "RestClient.get_current_checkpoint_storage_usage": _ADMIN,
    "RestClient.get_current_checkpoint_storage_usage_async": _ADMIN,
}

_HEAD = "None, not true: the server decides, since PEFT merges adapters of tied heads wrongly"

#: Parameters that are missing or differ, and why.
DIFFERENT = {
    "ServiceClient.create_lora_training_client(train_unembed)": _HEAD,
    "ServiceClient.create_lora_training_client_async(train_unembed)": _HEAD,
    "ServiceClient.__init__(kwargs)": "an argument that is not known is a TypeError",
    "TrainingClient.__init__": "made by ServiceClient",
    "SamplingClient.__init__": "made by ServiceClient",
    "SamplingClient.create": "use ServiceClient.create_sampling_client",
    "APIFuture.__init__": "made by the clients",
}

#: Types of the official `tinker.types` that tinkex has under the same name, or does not need.
_ABSENT_TYPES = {
    _ADMIN: """AuditLogEntry AuditLogResponse BillingEventInfo BillingUsageEvent
        BillingUsageResponse BillingUsageSession CheckpointBillingEvent
        CurrentCheckpointStorageUsageItem CurrentCheckpointStorageUsageResponse
        GetBillingUsageRequest GetCurrentCheckpointStorageUsageRequest SamplingPrefillBillingEvent
        SamplingSampleBillingEvent StorageBillingEvent TrainingBillingEvent""",
    "a dict with the same fields": """AccessibleSearchOwner ActiveSessionStatusQuery
        CancelledSessionStatusQuery ClientFinishedSessionStatusQuery ClientSessionFinishErrored
        ClientSessionFinishInterrupted ClientSessionFinishReason ClientSessionFinishReasonType
        ClientSessionFinishSuccess ClientSessionFinished FailedSessionStatusQuery OwnSearchOwner
        SearchOwner SessionActive SessionCancelled SessionFailed SessionFailedReason
        SessionFailedRequestReason SessionFailedSamplingSessionReason
        SessionFailedTrainingRunReason SessionSearchCursor SessionStatus SessionStatusQuery
        UserSearchOwner""",
    _FORM: """ClientConfigResponse ClientDynamicConfigResponse EventType ForwardBackwardInput
        ForwardRequest FutureCompletion FutureFailed FutureFinished FutureRetrieveRequest
        FutureRetrieveResponse FuturesRetrieveRequest FuturesRetrieveResponse
        RequestErrorCategory RequestFailedResponse RequestID SamplingSessionFuturesTarget
        SaveWeightsExternalResponseInternal SaveWeightsForSamplerResponseInternal
        SessionEndEvent SessionHeartbeatResponse SessionStartEvent Severity TelemetryBatch
        TelemetryEvent TelemetryResponse TelemetrySendRequest UnhandledExceptionEvent
        UntypedAPIFuture""",
    _TRACED: """CreateCustomLossRequest CreateCustomLossResponse CustomLossGraph CustomLossInput
        CustomLossInputRank CustomLossNode""",
    "audio is not supported": "DmelChunk",
    "use RestClient.whoami, which returns a types.KeyOwner": "WhoamiResponse",
}
ABSENT_TYPES = {name: why for why, names in _ABSENT_TYPES.items() for name in names.split()}

#: Fields of types that have others here, because the clients alone make them.
OTHER_FIELDS = {
    "ForwardBackwardRequest": ["forward_backward_input"],
    "OptimStepRequest": ["optim_params"],
}


@attrs.frozen
class Row:
    """One entry of the surface. state: "same", "different" or "absent"; *why* explains the others,
    and is "" where there is no reason yet."""

    name: str
    state: str
    why: str = ""


def snapshot() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SNAPSHOT.read_text())
    return found


def rows(surface: dict[str, Any]) -> list[Row]:
    """Every name, method and type of *surface*, compared with tinkex."""
    found = []
    for name in surface["names"]:
        there = hasattr(tinkex, name)
        found.append(Row(name, "same") if there else Row(name, "absent", ABSENT.get(name, "")))
    for name, methods in surface["classes"].items():
        cls = getattr(tinkex, name)
        for method, parameters in methods.items():
            found.append(_method(f"{name}.{method}", cls, method, parameters))
    for name in surface["types"]:
        there = hasattr(types, name)
        why = ABSENT_TYPES.get(name, "")
        found.append(Row(f"types.{name}", "same" if there else "absent", "" if there else why))
    return found


def _method(name: str, cls: type, method: str, theirs: list[list[Any]] | None) -> Row:
    function = getattr(cls, method, None)
    if function is None:
        return Row(name, "absent", ABSENT.get(name, ""))
    ours = inspect.signature(function).parameters
    reasons = [DIFFERENT.get(name)] if name in DIFFERENT else []
    if theirs is None or reasons:
        return Row(name, "different", str(reasons[0])) if reasons else Row(name, "same")
    wrong = []
    places = [p.name for p in ours.values() if p.name not in ("self", "cls")]
    takes_positional = any(p.kind is p.VAR_POSITIONAL for p in ours.values())
    for place, (parameter, kind, default) in enumerate(theirs):
        why = _parameter(ours, places, takes_positional, place, parameter, kind, default)
        if why:
            wrong.append(DIFFERENT.get(f"{name}({parameter})") or f"?{why}")
    known = [why for why in wrong if not why.startswith("?")]
    if wrong:
        return Row(name, "different", "; ".join(known) if len(known) == len(wrong) else "")
    return Row(name, "same")


def _parameter(
    ours: Any,
    places: list[str],
    takes_positional: bool,
    place: int,
    name: str,
    kind: str,
    default: str | None,
) -> str:
    """What is wrong with a parameter, or ""."""
    mine = ours.get(name)
    if kind.startswith("VAR_"):
        return "" if any(p.kind.name == kind for p in ours.values()) else f"no {name}"
    if mine is None:
        return f"no {name}"
    positional = kind == "POSITIONAL_OR_KEYWORD"
    if positional and not takes_positional and places[place] != name:
        return f"{name} is in another place"
    if default is not None and mine.default is mine.empty:
        return f"{name} has no default"
    if default is not None and repr(mine.default) != default:
        return f"{name} is {mine.default!r} by default, not {default}"
    return ""


HEAD = """
## Scripts for the official SDK on tinkex

`import tinkex as tinker` runs scripts that were written for tinker {version}: {same} of {all}
names, methods and types are here with the same parameters and defaults. What a `create_*`
method or a lookup returns can be used at once, and also has `result()`, `result_async()` and
`await`. Every `..._async` method works with asyncio. The rest, and why:

"""


def section(surface: dict[str, Any]) -> str:
    """The part of docs/compatibility.md about scripts."""
    compared = rows(surface)
    same = sum(row.state == "same" for row in compared)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in compared:
        if row.state != "same":
            reasons.setdefault((row.state, row.why), []).append(f"`{row.name}`")
    table = [[", ".join(names), state, why] for (state, why), names in reasons.items()]
    head = HEAD.format(version=surface["version"], same=same, all=len(compared))
    return head + page.table(["Name", "Here", "Why"], table)


def keep(printed: str) -> None:
    """Keep what surface.py printed as the surface to compare with."""
    SNAPSHOT.write_text(printed)


if __name__ == "__main__":
    page.write("port", section(snapshot()))
