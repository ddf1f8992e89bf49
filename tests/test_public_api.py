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
    "ClientSpec",
    "Config",
    "OperationFuture",
    "Patience",
    "Rendered",
    "RestClient",
    "Retry",
    "Run",
    "SamplingClient",
    "SamplingLimits",
    "ServiceClient",
    "TinkexError",
    "TrainingClient",
    "__version__",
    "errors",
    "load_run",
    "parse_response",
    "render",
    "render_prompt",
    "render_turns",
    "types",
]

#: The functions of the SDK, by class. One that goes away breaks somebody's script.
METHODS = {
    "ServiceClient": """close create_lora_training_client create_lora_training_client_async
        create_rest_client create_sampling_client create_sampling_client_async
        create_training_client_from_state create_training_client_from_state_async
        create_training_client_from_state_with_optimizer
        create_training_client_from_state_with_optimizer_async get_server_capabilities
        get_telemetry health""",
    "TrainingClient": """close create create_sampling_client create_sampling_client_async decode
        encode forward forward_backward forward_backward_custom get_info get_telemetry
        get_tokenizer load_state load_state_with_optimizer on_queue_state_change optim_step
        save_state save_weights_and_get_sampling_client
        save_weights_and_get_sampling_client_sync save_weights_for_sampler spec start
        unload_model""",
    "SamplingClient": """close compute_logprobs create decode encode get_base_model get_tokenizer
        on_queue_state_change sample sample_many sample_stream""",
    "RestClient": """close delete_checkpoint delete_checkpoint_from_tinker_path
        download_checkpoint export_checkpoint get_checkpoint_archive_url get_sampler
        get_server_capabilities
        get_session get_training_run get_training_run_by_tinker_path
        get_weights_info_by_tinker_path health iter_sessions iter_training_runs
        iter_user_checkpoints list_checkpoints list_sessions list_training_runs
        list_user_checkpoints publish_checkpoint_from_tinker_path
        set_checkpoint_ttl_from_tinker_path unpublish_checkpoint_from_tinker_path""",
}


def test_these_are_the_public_names():
    """A name that goes away breaks somebody's script; one that comes is for ever."""
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
