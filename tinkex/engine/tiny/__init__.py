"""The built-in model "tiny": an untrained Llama of 4 layers, 128 wide, that needs no download.

Its tokens are bytes: token id = byte value, then a few special tokens. Its weights are random,
drawn from a fixed seed, scaled so that a LoRA adapter alone can learn on top of them. `python -m
tinkex.engine.tiny` writes the tokenizer's files into this directory, where the SDK finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

NAME = "tiny"

#: The tokenizer's id on the wire.
TOKENIZER_ID = "tinkex/tiny"

#: Where tokenizer.json and tokenizer_config.json are.
DIRECTORY = Path(__file__).parent

LAYERS, WIDTH, HEADS, MLP, VOCAB = 4, 128, 4, 384, 512

BEGIN, END, START_TURN, END_TURN, PAD = 256, 257, 258, 259, 260
SPECIAL_TOKENS = {
    "<|begin|>": BEGIN,
    "<|end|>": END,
    "<|turn|>": START_TURN,
    "<|end_turn|>": END_TURN,
    "<|pad|>": PAD,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end_turn|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

#: Hugging Face's config.json of this model.
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH // HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "bos_token_id": BEGIN,
    "eos_token_id": [END, END_TURN],
    "pad_token_id": PAD,
    "dtype": "float32",
}

_SEED = 20240229


def weights() -> dict[str, Tensor]:
    """The model's tensors by their Hugging Face names, float32, the same every time."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)

    tensors = {"model.embed_tokens.weight": torch.randn(VOCAB, WIDTH, generator=generator)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{name}.weight"] = matrix(WIDTH, WIDTH)
        tensors[f"{layer}.mlp.gate_proj.weight"] = matrix(MLP, WIDTH)
        tensors[f"{layer}.mlp.up_proj.weight"] = matrix(MLP, WIDTH)
        tensors[f"{layer}.mlp.down_proj.weight"] = matrix(WIDTH, MLP)
        tensors[f"{layer}.input_layernorm.weight"] = torch.ones(WIDTH)
        tensors[f"{layer}.post_attention_layernorm.weight"] = torch.ones(WIDTH)
    tensors["model.norm.weight"] = torch.ones(WIDTH)
    # Small, so that the untrained model's distribution is nearly uniform: a loss of ln 512 a token.
    tensors["lm_head.weight"] = matrix(VOCAB, WIDTH, gain=0.1)
    return tensors


def build_tokenizer() -> Tokenizer:
    """Bytes as tokens: id 0..255 is the byte, then the special tokens, then reserved ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = _letters()
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{i}|>" for i in range(PAD + 1, VOCAB)]
    names = [*SPECIAL_TOKENS, *reserved]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


def _letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain}
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return [table[byte] for byte in range(256)]


def tokenizer_files() -> dict[str, str]:
    """Text of each tokenizer file by name."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": build_tokenizer().to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def write_tokenizer(directory: Path) -> None:
    """Write the tokenizer's files into *directory*."""
    for name, text in tokenizer_files().items():
        (directory / name).write_text(text, encoding="utf-8")
