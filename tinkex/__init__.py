"""Tinkex: fine-tune language models from plain, blocking Python.

A synchronous SDK for the Tinker training API, with its own training engine. Start with
`ServiceClient`. Nothing is defined here; each name is imported when it is first used, so that
`tinkex --help` loads neither numpy nor requests.

Includes the names of the official SDK (`tinker`): `import tinkex as tinker` runs its scripts.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tinkex._version import __version__

if TYPE_CHECKING:
    from tinkex import auth, errors, types
    from tinkex.config import Config, Patience, SamplingLimits
    from tinkex.errors import (
        APIConnectionError,
        APIError,
        APIResponseValidationError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        BillingError,
        ConflictError,
        InternalServerError,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
        RequestFailedError,
        TinkexError,
        UnprocessableEntityError,
    )
    from tinkex.errors import TinkexError as TinkerError
    from tinkex.futures import OperationFuture
    from tinkex.futures import OperationFuture as APIFuture
    from tinkex.recipes import preference, regularizers
    from tinkex.recipes.callbacks import Callback
    from tinkex.recipes.evaluation import evaluate
    from tinkex.recipes.finetune import finetune
    from tinkex.recipes.recovery import keep_alive, recover
    from tinkex.recipes.reinforce import distill, reinforce
    from tinkex.recipes.rewards import RewardError
    from tinkex.recipes.rollouts import Env, EnvStep
    from tinkex.recipes.run import Run, load_run
    from tinkex.rest import RestClient
    from tinkex.runtime.custom_loss import LossHandle
    from tinkex.runtime.retry import Retry
    from tinkex.sampling import SamplingClient
    from tinkex.service import ServiceClient
    from tinkex.text.renderer import Rendered, render, render_prompt, render_turns
    from tinkex.text.responses import parse_response
    from tinkex.training import ClientSpec, TrainingClient
    from tinkex.types import (
        AdamOptimizerConfig,
        AdamParams,
        Checkpoint,
        CheckpointType,
        Datum,
        DimuonOptimizerConfig,
        DimuonParams,
        EncodedTextChunk,
        ForwardBackwardOutput,
        LoraConfig,
        ModelID,
        ModelInput,
        ModelInputChunk,
        OptimParams,
        OptimStepRequest,
        OptimStepResponse,
        ParsedCheckpointTinkerPath,
        PromptProvenanceSpan,
        SampledProvenanceSpan,
        SampledSequence,
        SampleRequest,
        SampleResponse,
        SamplingParams,
        StopReason,
        TensorData,
        TensorDtype,
        TrainingRun,
    )

__all__ = [
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIResponseValidationError",
    "APIStatusError",
    "APITimeoutError",
    "AdamOptimizerConfig",
    "AdamParams",
    "AuthenticationError",
    "BadRequestError",
    "BillingError",
    "Callback",
    "Checkpoint",
    "CheckpointType",
    "ClientSpec",
    "Config",
    "ConflictError",
    "Datum",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "EncodedTextChunk",
    "Env",
    "EnvStep",
    "ForwardBackwardOutput",
    "InternalServerError",
    "LoraConfig",
    "LossHandle",
    "ModelID",
    "ModelInput",
    "ModelInputChunk",
    "NotFoundError",
    "OperationFuture",
    "OptimParams",
    "OptimStepRequest",
    "OptimStepResponse",
    "ParsedCheckpointTinkerPath",
    "Patience",
    "PermissionDeniedError",
    "PromptProvenanceSpan",
    "RateLimitError",
    "Rendered",
    "RequestFailedError",
    "RestClient",
    "Retry",
    "RewardError",
    "Run",
    "SampleRequest",
    "SampleResponse",
    "SampledProvenanceSpan",
    "SampledSequence",
    "SamplingClient",
    "SamplingLimits",
    "SamplingParams",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TensorDtype",
    "TinkerError",
    "TinkexError",
    "TrainingClient",
    "TrainingRun",
    "UnprocessableEntityError",
    "__version__",
    "auth",
    "distill",
    "errors",
    "evaluate",
    "finetune",
    "keep_alive",
    "load_run",
    "parse_response",
    "preference",
    "recover",
    "regularizers",
    "reinforce",
    "render",
    "render_prompt",
    "render_turns",
    "types",
]

#: The modules that define the names above, unless it is `types`.
_HOMES = {
    "Callback": "recipes.callbacks",
    "ClientSpec": "training",
    "Config": "config",
    "Env": "recipes.rollouts",
    "EnvStep": "recipes.rollouts",
    "LossHandle": "runtime.custom_loss",
    "OperationFuture": "futures",
    "Patience": "config",
    "Rendered": "text.renderer",
    "RestClient": "rest",
    "Retry": "runtime.retry",
    "RewardError": "recipes.rewards",
    "Run": "recipes.run",
    "SamplingClient": "sampling",
    "SamplingLimits": "config",
    "ServiceClient": "service",
    "TinkexError": "errors",
    "TrainingClient": "training",
    "distill": "recipes.reinforce",
    "evaluate": "recipes.evaluation",
    "finetune": "recipes.finetune",
    "keep_alive": "recipes.recovery",
    "load_run": "recipes.run",
    "parse_response": "text.responses",
    "reinforce": "recipes.reinforce",
    "recover": "recipes.recovery",
    "render": "text.renderer",
    "render_prompt": "text.renderer",
    "render_turns": "text.renderer",
}
#: Names of the official SDK that differ from ours.
_OTHER_NAMES = {"APIFuture": "OperationFuture", "TinkerError": "TinkexError"}
_MODULES = {
    "auth": "auth",
    "errors": "errors",
    "preference": "recipes.preference",
    "regularizers": "recipes.regularizers",
    "types": "types",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _found(_OTHER_NAMES.get(name, name))
    globals()[name] = value
    return value


def _found(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    home = _HOMES.get(name) or ("errors" if name.endswith("Error") else "types")
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
