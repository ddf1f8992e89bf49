"""What a model would need, against what it has once it is loaded; nothing is loaded for it."""

from __future__ import annotations

import json

import attrs
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex.engine import gguf_writer, loading, lora, memory, requirements


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def model(request, tmp_path_factory):
    """Of the fast path, of the fast path with a tied head, and of the generic path."""
    directory = tmp_path_factory.mktemp(request.param)
    return hf.make_base(directory, request.param)


def test_the_numbers_are_those_of_the_loaded_model(model):
    told = requirements.of(str(model))
    loaded = loading.load(str(model), torch.device("cpu"))
    layout = lora.Layout(
        loaded.base.linears, lora.Shape(32, train_unembed=not loaded.base.has_tied_head)
    )
    parameters = hf.load_base(model).num_parameters()

    assert parameters == told.parameters
    assert 4 * parameters == told.weights
    assert 16 * layout.size == told.adapter
    assert loaded.architecture == told.architecture


def test_bfloat16_halves_the_weights(model):
    whole, half = requirements.of(str(model)), requirements.of(str(model), dtype_name="bfloat16")

    assert whole.weights == 2 * half.weights
    assert whole.adapter == half.adapter


def test_a_gguf_file_needs_what_its_model_needs(tmp_path):
    base = hf.make_base(tmp_path / "base", "llama")
    path = tmp_path / "model.gguf"
    gguf_writer.write(base, path, "F16")
    of_file, of_directory = requirements.of(str(path)), requirements.of(str(base))

    assert attrs.evolve(of_directory, name=str(path), free=0) == attrs.evolve(of_file, free=0)


def test_what_does_not_fit_comes_with_advice():
    told = attrs.evolve(requirements.of("tiny"), free=1000)

    assert told.needed > told.free
    assert "use --dtype bfloat16" in told.advice
    assert "1 million parameters" in str(told)


def test_nothing_is_downloaded():
    with pytest.raises(ValueError, match="tinkex model pull org/absent"):
        requirements.of("org/absent")


def test_the_device_is_described():
    device = requirements.device("cpu", "bfloat16")

    assert ("cpu", "bfloat16") == (device.name, device.dtype)
    assert device.total == memory.total_memory(torch.device("cpu"))


def test_advice_for_the_smallest_type_names_a_smaller_model():
    """bfloat16 is not advised to who has it."""
    assert (
        "Free memory, choose a smaller model." == requirements.of("tiny", "cpu", "bfloat16").advice
    )


@pytest.mark.parametrize("name", [None, "tiny"])
def test_the_program_prints_one_object(name, capsys):
    """`tinkex doctor` reads it."""
    assert 0 == requirements.main("cpu", "float32", name)

    answer = json.loads(capsys.readouterr().out)
    assert {"text", "advice", "details"} == set(answer)
    assert "float32" in answer["text"]
    assert "" == answer["advice"]


def test_the_program_says_in_one_line_why_it_cannot_answer(capsys):
    assert 1 == requirements.main("cpu", "auto", "org/absent")

    said = capsys.readouterr()
    assert "" == said.out
    assert 1 == said.err.count("\n")
    assert "is not on this machine" in said.err
