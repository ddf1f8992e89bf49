"""What `import tinkex` promises: these names, and nothing heavy."""

from __future__ import annotations

import importlib.resources
import inspect
import json
import subprocess
import sys

import pytest

import tinkex

NAMES = [
    "Callback",
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
    "Checkpoint",
    "CheckpointType",
    "ClientSpec",
    "Config",
    "ConflictError",
    "Datum",
    "Env",
    "EnvStep",
    "DimuonOptimizerConfig",
    "DimuonParams",
    "EncodedTextChunk",
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
    "errors",
    "finetune",
    "keep_alive",
    "load_run",
    "parse_response",
    "distill",
    "evaluate",
    "preference",
    "regularizers",
    "reinforce",
    "recover",
    "render",
    "render_prompt",
    "render_turns",
    "types",
]

#: The functions of the SDK, by class. Removing one breaks users' scripts.
METHODS = {
    "ServiceClient": """
        close copy_weights create_custom_loss
        create_lora_training_client create_lora_training_client_async
        create_rest_client create_sampling_client create_sampling_client_async
        create_training_client_from_state create_training_client_from_state_async
        create_training_client_from_state_with_optimizer
        create_training_client_from_state_with_optimizer_async get_console_url
        get_server_capabilities get_server_capabilities_async get_telemetry health result
        result_async""",
    "TrainingClient": """
        close create create_sampling_client create_sampling_client_async decode encode forward
        forward_async forward_backward forward_backward_async forward_backward_custom
        forward_backward_custom_async get_console_url get_info get_info_async get_telemetry
        get_tokenizer load_state load_state_async load_state_with_optimizer
        load_state_with_optimizer_async on_queue_state_change optim_step optim_step_async result
        result_async save_state save_state_async save_weights_and_get_sampling_client
        save_weights_and_get_sampling_client_async save_weights_and_get_sampling_client_sync
        save_weights_external save_weights_external_async save_weights_for_sampler
        save_weights_for_sampler_async spec start unload_model""",
    "SamplingClient": """
        close compute_logprobs compute_logprobs_async create decode encode from_sampler_handle
        get_base_model get_base_model_async get_sampler_handle get_telemetry get_tokenizer
        on_queue_state_change result result_async sample sample_async sample_many sample_stream""",
    "RestClient": """
        assign_session_project assign_session_project_async close copy_weights
        copy_weights_async delete_checkpoint delete_checkpoint_async
        delete_checkpoint_from_tinker_path delete_checkpoint_from_tinker_path_async
        download_checkpoint export_checkpoint get_checkpoint_archive_url
        get_checkpoint_archive_url_async get_checkpoint_archive_url_from_tinker_path
        get_checkpoint_archive_url_from_tinker_path_async get_external_weights_urls
        get_external_weights_urls_async get_sampler get_sampler_async get_server_capabilities
        get_run_metrics get_session get_session_async get_telemetry get_training_run
        get_training_run_async
        get_training_run_by_tinker_path get_training_run_by_tinker_path_async
        get_weights_info_by_tinker_path health iter_sessions iter_training_runs
        iter_user_checkpoints list_checkpoints list_checkpoints_async list_sessions
        list_sessions_async list_training_runs list_training_runs_async list_user_checkpoints
        list_user_checkpoints_async publish_checkpoint_from_tinker_path
        publish_checkpoint_from_tinker_path_async report_run_metrics result result_async
        search_sessions
        set_checkpoint_ttl_from_tinker_path set_checkpoint_ttl_from_tinker_path_async
        unpublish_checkpoint_from_tinker_path unpublish_checkpoint_from_tinker_path_async whoami""",
}


def test_these_are_the_public_names():
    """Removing a name breaks users' scripts; a new name must be kept for ever."""
    assert sorted(NAMES) == sorted(tinkex.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_when_it_is_used(name):
    """They are imported lazily, so that each must be tried."""
    assert getattr(tinkex, name) is not None
    assert name in dir(tinkex)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'tinkex' has no attribute 'Servce'"):
        _ = tinkex.Servce


@pytest.mark.parametrize("name, methods", METHODS.items(), ids=METHODS)
def test_these_are_the_methods_of_the_clients(name, methods):
    cls = getattr(tinkex, name)
    public = [n for n, f in inspect.getmembers(cls, callable) if not n.startswith("_")]

    assert sorted(methods.split()) == sorted(public)


@pytest.mark.parametrize("name", METHODS)
def test_a_public_method_says_what_it_does_and_takes(name):
    for method, function in inspect.getmembers(getattr(tinkex, name), inspect.isroutine):
        if not method.startswith("_"):
            assert function.__doc__, f"{name}.{method} has no docstring"
            annotations = inspect.signature(function).parameters.values()
            untyped = [p.name for p in annotations if p.annotation is p.empty]
            assert [] == [p for p in untyped if p not in ("self", "cls")]


def test_every_client_is_a_context_manager():
    """Whoever starts threads or holds connections can be closed by leaving a block."""
    for name in METHODS:
        assert hasattr(getattr(tinkex, name), "__exit__")


IMPORTED = """
import json, sys
import tinkex
for name in tinkex.__all__:
    getattr(tinkex, name)
heavy = ["torch", "transformers", "google.protobuf", "cattrs", "asyncio", "tokenizers", "uvicorn",
         "starlette", "huggingface_hub", "autograd", "tqdm"]
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_importing_tinkex_pulls_in_nothing_heavy():
    """torch alone takes seconds and hundreds of megabytes, and most programs need none of these."""
    out = subprocess.check_output([sys.executable, "-W", "error", "-c", IMPORTED], text=True)

    assert [] == json.loads(out)


def test_importing_tinkex_starts_no_thread_and_says_nothing():
    code = "import threading, tinkex.service; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ("1\n", "") == (done.stdout, done.stderr)


def test_the_package_is_typed():
    """A py.typed file, or type checkers ignore every annotation."""
    assert importlib.resources.files("tinkex").joinpath("py.typed").is_file()


def test_the_field_s_names_are_those_of_the_official_sdk():
    """A script written for it should need no new words."""
    for name in ("Datum", "ModelInput", "AdamParams", "SamplingParams", "TensorData", "LoraConfig"):
        assert hasattr(tinkex.types, name)
