"""Plain Llamas read without transformers: as transformers reads them, or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers

from tests.support import hf_reference as hf
from tinkex.engine import fast_plan
from tinkex.engine.families import FAMILIES, build

CPU = torch.device("cpu")

PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    "eos_token_id": 2,
}
OLD_ROPE = {"rope_parameters": ..., "rope_theta": 500000.0, "rope_scaling": None}


def _write(directory, changes, generation=None):
    """config.json with *changes*, of which ... stands for no such field."""
    content = {key: value for key, value in {**PLAIN, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    "changes, generation",
    [
        ({}, None),
        ({"num_key_value_heads": 2, "head_dim": 16}, None),
        ({"num_key_value_heads": None, "head_dim": None}, {"eos_token_id": [5, 7]}),
        ({"tie_word_embeddings": True, "eos_token_id": [2, 3]}, {"max_length": 9}),
        (OLD_ROPE, {"eos_token_id": 9}),
        ({"eos_token_id": None, "bos_token_id": 1, "torch_dtype": "bfloat16"}, None),
    ],
    ids=str,
)
def test_a_plain_llama_is_read_as_transformers_reads_it(changes, generation, tmp_path):
    directory = _write(tmp_path, changes, generation)

    plan = fast_plan.of_plain_llama(directory, CPU)

    config = transformers.AutoConfig.from_pretrained(directory)
    module = transformers.AutoModelForCausalLM.from_config(config)
    ends = module.generation_config
    if generation is not None:
        ends = transformers.GenerationConfig.from_pretrained(directory)
    assert plan is not None
    assert build.spec_of(FAMILIES["llama"], config, ends) == plan.spec
    assert type(module).__name__ == plan.architecture
    assert {k: tuple(t.shape) for k, t in module.state_dict().items()} == plan.shapes
    assert sum(parameter.numel() for parameter in module.parameters()) == plan.parameters
    assert config.tie_word_embeddings == plan.has_tied_head
    rotary = type(module.model.rotary_emb)(config=config)
    positions = torch.arange(64)
    for ours, theirs in zip(
        plan.ropes, build.ropes_of(FAMILIES["llama"], config, rotary, CPU), strict=True
    ):
        for one, other in zip(ours.at(positions, 64), theirs.at(positions, 64), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"auto_map": {"AutoConfig": "x.Y"}},
        {"sliding_window": 4},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
        {"rope_parameters": ...},
        {**OLD_ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5.0},
        {"hidden_size": 33},
        {"hidden_size": True},
        {"head_dim": 7},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": "3"},
        {"vocab_size": ...},
        {"rms_norm_eps": "small"},
        {"eos_token_id": ...},
        {"eos_token_id": "</s>"},
        {"tie_word_embeddings": 1},
    ],
    ids=str,
)
def test_anything_else_is_for_transformers(changes, tmp_path):
    """To be computed, or refused with the reason."""
    assert fast_plan.of_plain_llama(_write(tmp_path, changes), CPU) is None


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "x"}'])
def test_a_damaged_generation_config_is_for_transformers(text, tmp_path):
    _write(tmp_path, {})
    (tmp_path / "generation_config.json").write_text(text)

    assert fast_plan.of_plain_llama(tmp_path, CPU) is None


def test_loading_a_plain_llama_does_not_import_transformers(tmp_path):
    """Its import takes seconds, which the first token would wait for."""
    base = hf.make_base(tmp_path / "base")
    code = (
        "import sys; from tinkex.engine.engine import Engine; "
        "Engine(device='cpu').load_base(sys.argv[1]); "
        "sys.exit('transformers was imported' if 'transformers' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
