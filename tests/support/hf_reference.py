"""An independent reference: small Hugging Face models, and PEFT's LoRA on top of them.

Created with random weights, and compared with the results of `tinkex.engine`.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support import unknown_model
from tinkex import types
from tinkex.engine import finished_lora, lm_head, lora, tiny
from tinkex.engine.base_model import BaseModel
from tinkex.engine.engine import Engine

VOCAB = 300

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 260,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.5],
    "long_factor": [4.0, 8.0],
}
MIXED_LAYERS = ["sliding_attention", "full_attention"]

#: Configurations by name: every architecture, with its special features.
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama-tied-biased": lambda: transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama3-rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "yarn-rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=YARN_ROPE),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "mistral-sliding": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen2-sliding": lambda: transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "granite": lambda: transformers.GraniteConfig(
        **SIZES,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=1.7,
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "olmo3": lambda: transformers.Olmo3Config(
        **SIZES, sliding_window=8, layer_types=MIXED_LAYERS, rope_parameters=YARN_ROPE
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=8),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **SIZES,
        original_max_position_embeddings=128,
        rope_parameters={**LONG_ROPE, "partial_rotary_factor": 0.5},
    ),
    "glm": lambda: transformers.GlmConfig(**SIZES, head_dim=16),
    "glm4": lambda: transformers.Glm4Config(**SIZES, head_dim=16, attention_bias=True),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        layer_types=MIXED_LAYERS,
        query_pre_attn_scalar=5,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}


#: Gemma 3 as in llama.cpp, which has many settings in its code and not in GGUF files.
CONFIGS["gemma3-of-gguf"] = lambda: transformers.Gemma3TextConfig(
    **{**SIZES, "num_hidden_layers": 7},
    head_dim=16,
    sliding_window=8,
    query_pre_attn_scalar=16,
    rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
)

#: Sizes of models with experts, with "linear attention", and with other names for their sizes.
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LINEAR_ATTENTION = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_ENDS = {"bos_token_id": 256, "eos_token_id": 257}
_GPT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

#: Configurations that the generic path computes, by name.
GENERIC: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "gpt_oss": lambda: transformers.GptOssConfig(
        **{**SIZES, "head_dim": 16, "sliding_window": 8},
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=MIXED_LAYERS,
        rope_parameters=YARN_ROPE,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **_EXPERTS, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SIZES, **_EXPERTS, **_LINEAR_ATTENTION, shared_expert_intermediate_size=24
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SIZES, **_LINEAR_ATTENTION),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=256, **_ENDS
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **_GPT, **_ENDS, intermediate_size=48, max_position_embeddings=256
    ),
    "falcon": lambda: transformers.FalconConfig(**_GPT, **_ENDS),
    "falcon-alibi": lambda: transformers.FalconConfig(
        **_GPT, **_ENDS, alibi=True, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "cohere2": lambda: transformers.Cohere2Config(
        **SIZES, sliding_window=8, layer_types=MIXED_LAYERS
    ),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES, use_qkv_bias=True),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "nemotron": lambda: transformers.NemotronConfig(**SIZES, head_dim=16),
    "averaging": lambda: unknown_model.AveragingConfig(**_ENDS),
}


def config_of(kind: str) -> transformers.PretrainedConfig:
    return {**GENERIC, **CONFIGS}[kind]()


def make_base(directory: Path, kind: str = "llama") -> Path:
    """A model with random weights, norms and biases, saved in *directory*, with a tokenizer."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of(kind))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
        else:
            # Smaller in deeper models, in which rounding errors grow.
            parameter.data.normal_(0, 0.15 * min(1.0, (2 / model.config.num_hidden_layers) ** 0.5))
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory


def make_random_base(directory: Path, sizes: Mapping[str, Any]) -> Path:
    """A Llama of any size with small random weights, written without making transformers' model."""
    directory.mkdir()
    config = transformers.LlamaConfig(**sizes, bos_token_id=256, eos_token_id=257)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(t.shape)
        if "norm" in name
        else torch.empty(t.shape).normal_(0, 0.02, generator=generator)
        for name, t in shapes.items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tiny.write_tokenizer(directory)
    return directory


def load_base(directory: Path) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(directory)
    # Some versions of transformers choose torch's attention, and ignore the cap of the scores.
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager" if is_capped else None
    )
    return model.eval()


def make_adapter(base: Path, directory: Path, *, rank: int = 8, **config: Any) -> Path:
    """A PEFT adapter with random A and B (so that A has a gradient too)."""
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": 32,
        "target_modules": targets(types.LoraConfig(train_unembed=True)),
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    with _peft_warnings_ignored():
        import peft  # takes seconds to import, and few tests need it

        module = load_base(base)
        settings |= _with_experts(module, settings["target_modules"])
        model = peft.get_peft_model(module, peft.LoraConfig(**{**settings, **config}))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.05)
        model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def _with_experts(module: Any, target_modules: Sequence[str]) -> dict[str, list[str]]:
    """Settings for a model with stacked experts, whose dense layers PEFT cannot name otherwise."""
    within = {re.sub(r"^.*?\.\d+\.", "", n): p for n, p in module.named_parameters() if ".0." in n}
    within |= {re.sub(r"^.*?\.\d+\.", "", n): p for n, p in module.named_parameters() if ".1." in n}
    experts = [name for name, p in within.items() if p.dim() == 3 and ".experts." in name]
    if not experts:
        return {}
    dense = ("gate_proj", "up_proj", "down_proj")
    experts += [name for name in within if name.endswith(tuple(f".{end}.weight" for end in dense))]
    return {
        "target_modules": [name for name in target_modules if name not in dense],
        "target_parameters": experts,
    }


#: Linear layers of the models in `GENERIC`, as their authors have named them.
_OTHER_ATTENTION = [
    "c_attn", "c_proj", "query_key_value", "dense", "in_proj_qkvz", "in_proj_ba", "in_proj_qkv",
    "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa",
    "kv_b_proj", "mixer.into", "mixer.out",
]  # fmt: skip
_OTHER_MLP = ["c_fc", "c_proj", "dense_h_to_4h", "dense_4h_to_h", "wide", "narrow"]


def targets(config: types.LoraConfig) -> list[str]:
    """Names of the modules that a configuration trains."""
    names: list[str] = []
    if config.train_attn:
        names += ["q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", *_OTHER_ATTENTION]
    if config.train_mlp:
        names += ["gate_proj", "up_proj", "gate_up_proj", "down_proj", *_OTHER_MLP]
    return [*names, "lm_head", "to_words"] if config.train_unembed else names


def load_adapter(base: Path, directory: Path) -> Any:
    """PEFT's model of an adapter directory, its LoRA matrices trainable."""
    with _peft_warnings_ignored():
        import peft

        model = peft.PeftModel.from_pretrained(load_base(base), directory, is_trainable=True)
    return model.eval()


@contextlib.contextmanager
def _peft_warnings_ignored() -> Iterator[None]:
    """PEFT reads deprecated names of transformers, and warns of LoRA on tied heads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bare(base: BaseModel) -> finished_lora.MixedLinears:
    """The matrices of a base model without an adapter."""
    return finished_lora.MixedLinears(
        base.linears, finished_lora.Stack([None]), np.zeros(1, np.int64)
    )


def logits(base: BaseModel, hidden: Tensor) -> Tensor:
    """Our logits (N, V) of hidden states (N, d)."""
    return lm_head.head_logits(bare(base), hidden, base.logit_cap)


def logprobs(model: Any, tokens: Sequence[int], targets: np.ndarray) -> Tensor:
    """The direct computation: all logits, log_softmax, gather. targets (N,) or (N, K)."""
    logits = model(input_ids=torch.tensor(np.asarray(tokens)[None], dtype=torch.long)).logits[0]
    wanted = torch.from_numpy(np.asarray(targets, np.int64)).reshape(len(logits), -1)
    found = logits.log_softmax(-1).gather(1, wanted)
    return found.reshape(np.asarray(targets).shape)


def peft_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by name, with the names of `gradients`."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            module, letter = name.removeprefix("base_model.model.").split(".lora_")
            found[f"{module}.lora_{letter[0]}"] = parameter.grad.detach().clone()
    return found


def gradients(engine: Engine, model_id: str, directory: Path) -> dict[str, Tensor]:
    """The engine's accumulated gradients by name, read from a snapshot in *directory*."""
    directory.mkdir()
    engine.snapshot(model_id, directory)
    flat = load_file(directory / "live.safetensors")["gradient"]
    model = engine._models[model_id]
    return lora.Layout(model.loaded.base.linears, model.layout.shape).tensors(flat)


def drive(pass_: Generator[None, None, Any]) -> Any:
    """Run a forward_backward to its end; return its result."""
    while True:
        try:
            next(pass_)
        except StopIteration as stop:
            return stop.value


def sample_all(engine: Engine) -> dict[Any, Any]:
    """Step until all samples are done; results by ticket."""
    results: dict[Any, Any] = {}
    while engine.has_samples:
        results.update(engine.sample_step())
    return results


def ask(engine, *requests):
    """Submit all (sampler, request) pairs at once; return the responses in order."""
    for i, (sampler, one) in enumerate(requests):
        engine.submit_sample(i, sampler, one)
    results = sample_all(engine)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return [results[i] for i in range(len(requests))]


def datum(tokens: Sequence[int], **inputs: Any) -> types.Datum:
    """tokens[:-1] to read, tokens[1:] to predict."""
    given = {"target_tokens": np.asarray(tokens)[1:], **inputs}
    return types.Datum(types.ModelInput.from_ints(np.asarray(tokens)[:-1]), given)
