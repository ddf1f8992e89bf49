"""Base models by name: directories under a name, variants of a model, and their order."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import requests
from safetensors.torch import save_file

import tinkex
from tests.server.conftest import Served
from tests.support import hf_reference
from tinkex import errors, types
from tinkex.engine import tiny
from tinkex.server import app, base_models

NAME = "acme/small-1"
DATUM = types.Datum(types.ModelInput.from_ints([5, 6, 7]), {"target_tokens": [6, 7, 8]})


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model as its users have it: in a folder."""
    out = tmp_path_factory.mktemp("model")
    tiny.write_tokenizer(out)
    save_file(tiny.weights(), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(tiny.CONFIG))
    return out


@pytest.fixture(scope="module")
def served(tmp_path_factory, directory):
    names, directories = base_models.parse([f"{NAME}={directory}"])
    running = Served(
        tmp_path_factory.mktemp("home"),
        make_engine=lambda: app.make_engine("float32", directories),
        base_models=names,
    )
    yield running
    running.close()


@pytest.fixture
def service(served):
    with tinkex.ServiceClient(served.server.url, "tml-any") as made:
        yield made


def test_a_directory_is_known_by_its_name_wherever_a_client_can_see_it(
    service, served, directory, tmp_path
):
    """Base model, tokenizer, and what the adapter says that it belongs to."""
    training = service.create_lora_training_client(NAME, rank=2)
    training.forward_backward([DATUM], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=0.1)).result()
    path = training.save_state("a").result().path
    rest = service.create_rest_client()
    adapter = rest.download_checkpoint(path, tmp_path / "adapter")
    info = training.get_info()
    config = json.loads((adapter / "adapter_config.json").read_text())

    assert (NAME, NAME) == (info.base_model, info.model_data.tokenizer_id)
    assert NAME == config["base_model_name_or_path"]
    assert NAME == rest.get_weights_info_by_tinker_path(path).base_model
    assert NAME == rest.list_training_runs().training_runs[0].base_model
    files = [file for file in adapter.rglob("*") if file.is_file()]
    assert not [file for file in files if str(directory).encode() in file.read_bytes()]
    restored = service.create_training_client_from_state(path, NAME)
    expected = training.forward([DATUM], "cross_entropy").result().loss
    assert expected == restored.forward([DATUM], "cross_entropy").result().loss


def test_the_path_of_a_named_directory_is_the_same_model(service, served, directory):
    """It is loaded once."""
    service.create_sampling_client(base_model=str(directory)).sample([5], max_tokens=1).result()

    assert [NAME] == [name for name in served.server.scheduler._engine._bases if name != tiny.NAME]


def test_the_server_s_own_endpoints_find_the_tokenizer_in_the_directory(served):
    """The name means nothing to the hub."""
    body = {"model": NAME, "prompt": "a", "max_tokens": 1}
    answer = requests.post(f"{served.server.url}/v1/completions", json=body, timeout=60)

    assert 200 == answer.status_code, answer.text


def test_models_are_listed_in_the_order_of_the_options_with_tiny_last(serve, tmp_path):
    served = serve(base_models=["org/b", "org/a"])
    without = serve(home=tmp_path / "other", base_models=["org/a"], with_tiny=False)

    assert ["org/b", "org/a", "tiny"] == _listed(served)
    assert ["org/a"] == _listed(without)


def test_a_server_without_tiny_refuses_it_in_a_sentence(serve):
    served = serve(base_models=["org/a"], with_tiny=False)
    with (
        tinkex.ServiceClient(served.server.url, "tml-any") as service,
        pytest.raises(errors.BadRequestError, match=r"without the built-in model 'tiny'.*org/a"),
    ):
        service.create_lora_training_client("tiny")


def test_a_variant_with_a_context_is_the_model_itself(serve):
    served = serve()
    with tinkex.ServiceClient(served.server.url, "tml-any") as service:
        training = service.create_lora_training_client("tiny:peft:64")
        assert "tiny" == training.get_info().base_model
        sampler = service.create_sampling_client(base_model="tiny:peft:64")
        assert (
            "tiny"
            == sampler._session.call(
                tinkex.wire.GET_SAMPLER, sampler_id=sampler.sampling_session_id
            ).base_model
        )
        with pytest.raises(errors.BadRequestError, match=r"context of .* tokens, not 999999999"):
            service.create_lora_training_client("tiny:peft:999999999")


def _listed(served):
    with tinkex.RestClient(served.server.url, "tml-any") as rest:
        return rest.get_server_capabilities().model_names


@pytest.mark.parametrize(
    "options, match",
    [
        (["a/b={}", "a/b={}"], "'a/b' twice"),
        (["a/b", "a/b={}"], "'a/b' twice"),
        (["a/b={}", "a/b"], "'a/b' twice"),
        (["a/b=/no/such/folder"], "neither a directory nor a GGUF"),
        (["a/b/c={}"], "must be like org/model"),
        (["={}"], "must be like org/model"),
        (["tiny={}"], "'tiny' is the name of a known model"),
        (["smollm2={}"], "'smollm2' is the name of a known model"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused_before_the_server_starts(options, match, directory):
    with pytest.raises(ValueError, match=match):
        base_models.parse([option.format(directory) for option in options])


def test_names_and_directories_may_be_given_without_a_mapping(directory, tmp_path):
    odd = tmp_path / "a=b"
    odd.mkdir()
    names, directories = base_models.parse(["tiny", str(directory), str(odd), f"x/y={directory}"])

    assert ["tiny", str(directory), str(odd), "x/y"] == names
    assert {"x/y": str(directory)} == directories


def test_the_command_says_what_is_wrong_with_its_option(tmp_path):
    command = [sys.executable, "-m", "tinkex", "serve", "--home", str(tmp_path)]
    done = subprocess.run(
        [*command, "--base-model", "a/b=/no/folder"], capture_output=True, text=True, timeout=120
    )

    assert 1 == done.returncode
    assert "tinkex serve: --base-model a/b=/no/folder: '/no/folder' is neither" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "given, expected",
    [
        ("Qwen/Qwen3-8B:peft:32768", ("Qwen/Qwen3-8B", 32768)),
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", None)),
        ("a:peft:x", ("a:peft:x", None)),
        (":peft:1", (":peft:1", None)),
    ],
)
def test_a_variant_is_a_name_with_peft_and_a_context(given, expected):
    assert expected == base_models.split_variant(given)


def test_a_tied_head_is_adapted_if_the_client_asks_for_it(serve, tmp_path):
    """The official SDK does, by default; ours leaves it to the server."""
    base = str(hf_reference.make_base(tmp_path / "tied", "qwen3"))
    served = serve(make_engine=lambda: app.make_engine("float32", {}), base_models=[base])
    with tinkex.ServiceClient(served.server.url, "tml-any") as service:
        rest = service.create_rest_client()
        for asked, expected in ((True, True), (None, False)):
            training = service.create_lora_training_client(base, 2, train_unembed=asked)
            path = training.save_state("a").result().path

            assert expected is training.get_info().train_unembed
            assert expected is rest.get_weights_info_by_tinker_path(path).train_unembed
