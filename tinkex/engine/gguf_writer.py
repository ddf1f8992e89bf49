"""A Hugging Face model directory as a GGUF file, with tokenizer and chat template.

Matrices are stored as F16, Q8_0 or F32, everything else as F32, by the `gguf` package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tinkex.engine import gguf as reading
from tinkex.text.gguf import pattern_of

TYPES = ("F16", "Q8_0", "F32")

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

#: llama.cpp's file type number, by the type of most matrices.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}


def write(directory: Path, path: Path, kind: str = "F16") -> None:
    """
    Write the model in *directory* to the GGUF file *path*.

    Args:
        directory: config.json, *.safetensors, tokenizer.json, as save_pretrained() writes them.
        kind: one of `TYPES`, for matrices.

    Raises:
        ValueError: If the architecture or the tokenizer cannot be written, or *kind* is unknown.
    """
    import gguf

    if kind not in TYPES:
        raise ValueError(f"GGUF type {kind!r} cannot be written; choose {', '.join(TYPES)}.")
    content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    by_type = {ours: theirs for theirs, (ours, _) in reading.ARCHITECTURES.items()}
    by_type["mistral"] = "llama"
    model_type = by_type.get(content["model_type"])
    if model_type is None:
        raise ValueError(
            f"architecture {content['model_type']!r} cannot be written as GGUF; supported are "
            f"{', '.join(by_type)}."
        )
    writer = gguf.GGUFWriter(path, model_type)
    writer.add_name(directory.name)
    _add_sizes(writer, content)
    _add_tokenizer(writer, directory, content)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    files = sorted(directory.glob("*.safetensors"))
    stored = {name: file for file in files for name in _names(file)}
    if content.get("tie_word_embeddings"):
        stored.pop("lm_head.weight", None)
    for name, file in stored.items():
        with safe_open(file, "np" if _numpy_reads(file, name) else "pt") as opened:
            tensor = opened.get_tensor(name)
        values = tensor if isinstance(tensor, np.ndarray) else tensor.float().numpy()
        _add_tensor(writer, name, values.astype(np.float32), content, model_type, kind)
    _add_rope_factors(writer, content)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


def _numpy_reads(file: Path, name: str) -> bool:
    """numpy has no bfloat16."""
    with safe_open(file, "pt") as opened:
        kind: str = opened.get_slice(name).get_dtype()
    return kind in ("F32", "F16")


def _add_sizes(writer: Any, content: dict[str, Any]) -> None:
    import gguf

    heads = content["num_attention_heads"]
    head_dim = content.get("head_dim") or content["hidden_size"] // heads
    writer.add_block_count(content["num_hidden_layers"])
    writer.add_context_length(content["max_position_embeddings"])
    writer.add_embedding_length(content["hidden_size"])
    writer.add_feed_forward_length(content["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(content.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(content["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(content["vocab_size"])
    rope = _rope(content)
    if content["model_type"] == "gemma3_text":
        rope = _add_gemma3(writer, content, rope, head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind not in ("default", "llama3"):
        raise ValueError(f"position embeddings of type {kind!r} cannot be written as GGUF.")


def _add_gemma3(
    writer: Any, content: dict[str, Any], rope: dict[str, Any], head_dim: int
) -> dict[str, Any]:
    """Write the settings that only Gemma 3 has; return the RoPE settings of its global layers.

    Raises:
        ValueError: If a setting differs from what llama.cpp has in its code.
    """
    layers, heads = content["num_hidden_layers"], content["num_attention_heads"]
    largest = content["hidden_size"] // heads
    ours = {
        "query_pre_attn_scalar": largest if layers == reading.GEMMA3_LARGEST else head_dim,
        "layer_types": reading.gemma3_layers(layers),
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": None,
    }
    for name, expected in ours.items():
        if content.get(name) != expected:
            raise ValueError(
                f"{name} = {content.get(name)!r} of Gemma 3 cannot be written as GGUF; "
                f"llama.cpp computes with {expected!r}. Export as a Hugging Face directory."
            )
    local = rope["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise ValueError("scaled positions of layers with a window cannot be written as GGUF.")
    writer.add_sliding_window(content["sliding_window"])
    if float(local["rope_theta"]) != reading.GEMMA3_LOCAL_BASE:
        writer.add_float32("gemma3.rope.freq_base_swa", float(local["rope_theta"]))
    full: dict[str, Any] = rope["full_attention"]
    return full


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, from new configurations and old ones."""
    old = {"rope_theta": content.get("rope_theta", 10000.0), **(content.get("rope_scaling") or {})}
    return content.get("rope_parameters") or old


def _add_rope_factors(writer: Any, content: dict[str, Any]) -> None:
    """Llama 3's factors on the rotary frequencies: low ones are divided by *factor*."""
    rope = _rope(content)
    if rope.get("rope_type") != "llama3":
        return
    heads = content["num_attention_heads"]
    head_dim = content.get("head_dim") or content["hidden_size"] // heads
    steps = np.arange(0, head_dim, 2, dtype=np.float32)
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (steps / head_dim)
    old = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / wavelengths - low) / (high - low), 0, 1)
    factors = 1 / ((1 - smooth) / rope["factor"] + smooth)
    writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))


def _add_tensor(
    writer: Any,
    name: str,
    values: np.ndarray,
    content: dict[str, Any],
    model_type: str,
    kind: str,
) -> None:
    import gguf

    theirs = reading.gguf_name(name, model_type)
    if "norm" in theirs:
        values = values + np.float32(reading.NORM_OFFSETS.get(model_type, 0.0))
    heads = content["num_attention_heads"]
    if model_type == "llama" and ".attn_q." in theirs:
        values = reading.permute(values, heads)
    elif model_type == "llama" and ".attn_k." in theirs:
        values = reading.permute(values, content.get("num_key_value_heads") or heads)
    if values.ndim == 1 or kind == "F32":
        writer.add_tensor(theirs, values)
    elif kind == "Q8_0" and values.shape[-1] % 32 == 0:
        number = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(theirs, gguf.quantize(values, number), raw_dtype=number)
    else:  # a row that is not a multiple of a block stays F16
        writer.add_tensor(theirs, values.astype(np.float16))


def _add_tokenizer(writer: Any, directory: Path, content: dict[str, Any]) -> None:
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{str(directory)!r} has no tokenizer.json; a GGUF file needs it.")
    described = json.loads(file.read_text(encoding="utf-8"))
    tokenizer, model = Tokenizer.from_file(str(file)), described["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of type {model['type']!r} cannot be written as GGUF.")
    added = {entry["id"]: entry for entry in described.get("added_tokens", [])}
    by_number = {number: text for text, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(content["vocab_size"]):
        entry = added.get(number)
        tokens.append(by_number.get(number, f"[PAD{number}]"))
        if number not in by_number:
            kinds.append(_UNUSED)
        elif entry is not None:
            kinds.append(_CONTROL if entry["special"] else _USER_DEFINED)
        elif model.get("byte_fallback") and _is_byte(tokens[-1]):
            kinds.append(_BYTE)
        else:
            kinds.append(_UNKNOWN if tokens[-1] == model.get("unk_token") else _NORMAL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        ranks = {merge.replace(" ", ""): -i for i, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([float(ranks.get(token, -len(merges))) for token in tokens])
        prepends = "Prepend" in json.dumps([described["normalizer"], described["pre_tokenizer"]])
        writer.add_add_space_prefix(prepends)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pattern_of(tokenizer))
        # A tokenizer may have more tokens than the model.
        there = set(tokens)
        merges = [merge for merge in merges if merge.replace(" ", "") in there]
        if merges:
            writer.add_token_merges(merges)
    _add_special(writer, directory, tokenizer, content)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _add_special(writer: Any, directory: Path, tokenizer: Any, content: dict[str, Any]) -> None:
    settings: dict[str, Any] = {}
    if (directory / "tokenizer_config.json").is_file():
        text = (directory / "tokenizer_config.json").read_text(encoding="utf-8")
        settings = json.loads(text)
    eos = content.get("eos_token_id")
    stops = eos if isinstance(eos, list) else [eos]
    numbers = {name: content.get(f"{name}_token_id") for name in ("bos", "unk", "pad")}
    numbers["eos"] = stops[0]
    for name in numbers:
        value = settings.get(f"{name}_token")
        special = value["content"] if isinstance(value, dict) else value
        if special and tokenizer.token_to_id(special) is not None:
            numbers[name] = tokenizer.token_to_id(special)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if numbers[name] is not None:
            add(numbers[name])
    others = [stop for stop in stops if stop is not None and stop != numbers["eos"]]
    if others:
        writer.add_eot_token_id(others[0])
    begins = tokenizer.encode("a").ids[:1] == [numbers["bos"]]
    writer.add_add_bos_token(begins)
    template = directory / "chat_template.jinja"
    written = template.read_text(encoding="utf-8") if template.is_file() else None
    written = written or settings.get("chat_template")
    if isinstance(written, str):
        writer.add_chat_template(written)
