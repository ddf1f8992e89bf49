"""Configurations as the hub has them: with the names of the transformers that they were written by.

Position embeddings, windows and layers without RoPE were described in other words before version 5.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tests.support.frozen_linears import FrozenLinears
from tinkex.engine import loading
from tinkex.engine.attention import Packing
from tinkex.engine.model import Training

#: Names that are written today, and not in any of these files.
NEW_NAMES = ("rope_parameters", "layer_types", "no_rope_layers", "dtype")

#: By the row of `hf.CONFIGS` that has the same sizes: what its config.json has in their place.
PUBLISHED = {
    "llama3-rope": {
        "rope_scaling": {k: v for k, v in hf.LLAMA3_ROPE.items() if k != "rope_theta"},
    },
    "yarn-rope": {
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen2-sliding": {"rope_theta": 1e6},
    "smollm3": {"rope_theta": 5e6, "no_rope_layer_interval": 2},
    "granite": {"rope_scaling": None},
    "olmo2": {"rope_theta": 5e5, "rope_scaling": None},
    "olmo3": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "attention_factor": 1.2,
        },
    },
    "phi3": {"rope_scaling": None},
    "phi3-longrope": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.5],
            "long_factor": [4.0, 8.0],
        },
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.5,
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    },
    "glm4": {"partial_rotary_factor": 0.5},
    "gemma": {"hidden_act": "gelu", "hidden_activation": None},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 2,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PUBLISHED)
def test_an_older_configuration_is_computed_as_transformers_computes_it(kind, tmp_path):
    directory = hf.make_base(tmp_path / "base", kind)
    path = directory / "config.json"
    written = {k: v for k, v in json.loads(path.read_text()).items() if k not in NEW_NAMES}
    old = {"rope_theta": 1e4, "torch_dtype": "float32", **PUBLISHED[kind]}
    path.write_text(json.dumps({**written, **old}))
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, hf.VOCAB, 100))
    expected = hf.load_base(directory)(input_ids=tokens[None]).logits[0]

    base = loading.load(str(directory), torch.device("cpu")).base
    training = Training(base, FrozenLinears(base), Packing([100], base.device))

    actual = hf.logits(base, training.forward(tokens, save=False))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
