"""GGUF files as base models: metadata to a configuration, quantized blocks to tensors.

Tensors are dequantized by the `gguf` package, in blocks of rows, when they are accessed, so that
loading needs little more memory than the weights. `write_directory` saves a file as a Hugging Face
directory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinkex.text.gguf import Gguf, TensorInfo, build_tokenizer, read, settings

#: transformers' name of each architecture that can be read, by GGUF's (Mistral's files say llama).
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}

#: Supported element types, by their number in ggml: name, elements and bytes of a block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}

#: By architecture, what GGUF files add to the norm weights of Hugging Face directories.
NORM_OFFSETS = {"gemma3": 1.0}

#: Elements that are dequantized at a time.
BLOCK = 4 * 2**20

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: Tensors that have other names, or exist only, in files of Gemma 3.
_INSIDE_GEMMA3 = {
    **_INSIDE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

#: One in this many layers of Gemma 3 has no window, unless the file gives another period.
GEMMA3_PERIOD = 6
#: RoPE base of Gemma 3's layers with a window.
GEMMA3_LOCAL_BASE = 10000.0
#: Layers of Gemma 3 27B, which scales attention by width / heads instead of the head size.
GEMMA3_LARGEST = 62

#: An operating system error within an error message of safetensors.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

#: Factors on the rotary frequencies (Llama 3's), which are not weights of the model.
_ROPE_FACTORS = "rope_freqs.weight"


def _inside(architecture: str) -> dict[str, str]:
    return _INSIDE_GEMMA3 if architecture == "gemma3" else _INSIDE


def hf_name(name: str, architecture: str) -> str | None:
    """Hugging Face's name of a tensor, or None if there is none."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    parts, inside = name.split("."), _inside(architecture)
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in inside:
        return f"model.layers.{parts[1]}.{inside[parts[2]]}.{parts[3]}"
    return None


def gguf_name(name: str, architecture: str) -> str:
    """GGUF's name of a tensor, from Hugging Face's. KeyError if there is none."""
    for theirs, ours in _OUTSIDE.items():
        if name == ours:
            return theirs
    _, _, number, module, kind = (
        name.replace("self_attn.", "self_attn-").replace("mlp.", "mlp-").split(".")
    )
    short = {ours.replace(".", "-"): theirs for theirs, ours in _inside(architecture).items()}
    return f"blk.{number}.{short[module]}.{kind}"


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from Hugging Face's order to that of llama files: (i, i + D / 2) adjacent."""
    shape = rows.shape
    halves = rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `permute`."""
    shape = rows.shape
    pairs = rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(shape)


def config(file: Gguf) -> dict[str, Any]:
    """
    The model's configuration, as config.json of Hugging Face has it.

    Raises:
        GgufError: If the architecture is not supported, or something is missing.
    """
    name = file.architecture
    if name not in ARCHITECTURES:
        raise file.error(
            f"it has architecture {name!r}; this server computes GGUF files of "
            f"{', '.join(ARCHITECTURES)} (Mistral's files say llama)."
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise file.error("it is a mixture of experts, which this server does not compute.")
    get = _Getter(file)
    width, heads = get("embedding_length"), get("attention.head_count")
    kv_heads = get("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise file.error("its layers have different numbers of heads; this is not supported.")
    head_dim = get("attention.key_length", width // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise file.error("only a part of each head is rotated by position; this is not supported.")
    model_type, architecture = ARCHITECTURES[name]
    eos = [file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    stops = list(dict.fromkeys(number for number in eos if number is not None))
    content: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": _shape(file, "token_embd.weight")[0],
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file, get),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if model_type == "llama":
        content["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        content["mlp_bias"] = False
    if name == "gemma3":
        content |= _gemma3_settings(content, get)
    return content


def _gemma3_settings(content: dict[str, Any], get: _Getter) -> dict[str, Any]:
    """Settings that llama.cpp has in its code, and that the file lacks."""
    layers, width, heads = (
        content[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    period = int(get("attention.sliding_window_pattern", GEMMA3_PERIOD))
    local = float(get("rope.freq_base_swa", GEMMA3_LOCAL_BASE))
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            width // heads if layers == GEMMA3_LARGEST else content["head_dim"]
        ),
        "sliding_window": get("attention.sliding_window"),
        "layer_types": gemma3_layers(layers, period),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": get("final_logit_softcapping", 0.0) or None,
        "rope_parameters": {
            "full_attention": content["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def gemma3_layers(layers: int, period: int = GEMMA3_PERIOD) -> list[str]:
    """The kind of attention of each layer: every *period*-th layer has no window."""
    return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]


class _Getter:
    """Metadata of the file's architecture."""

    def __init__(self, file: Gguf) -> None:
        self._file = file

    def __call__(self, key: str, default: Any = None) -> Any:
        full = f"{self._file.architecture}.{key}"
        value = self._file.metadata.get(full, default)
        if value is None:
            raise self._file.error(f"its metadata has no {full!r}; convert the model again.")
        return value


def _shape(file: Gguf, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise file.error(f"it has no tensor {name!r}; it is truncated or holds no language model.")
    return file.tensors[name].shape


def _rope_parameters(file: Gguf, get: _Getter) -> dict[str, Any]:
    theta = float(get("rope.freq_base", 10000.0))
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        factor = float(get("rope.scaling.factor"))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise file.error(
        f"it scales positions as {kind!r}; supported in GGUF files are 'none' and 'linear'. Use "
        "the model's Hugging Face directory instead."
    )


def inverse_frequencies(file: Gguf, content: dict[str, Any]) -> dict[str, Tensor]:
    """(D / 2,) float32 angles per position for `model.Rope`, by kind: see `Family.ropes`."""
    parameters = content["rope_parameters"]
    kinds = {"": parameters} if "rope_type" in parameters else parameters
    return {kind: _frequencies(file, content, rope) for kind, rope in kinds.items()}


def _frequencies(file: Gguf, content: dict[str, Any], rope: dict[str, Any]) -> Tensor:
    steps = torch.arange(0, content["head_dim"], 2, dtype=torch.float32)
    frequencies = 1.0 / (rope["rope_theta"] ** (steps / content["head_dim"]))
    frequencies /= rope.get("factor", 1.0)
    if _ROPE_FACTORS in file.tensors:
        frequencies /= torch.from_numpy(read_rows(file, file.tensors[_ROPE_FACTORS], 0, None))
    return frequencies


class Tensors(MutableMapping[str, Tensor]):
    """The tensors of a file by Hugging Face's names; each is dequantized when it is accessed.

    Raises:
        GgufError: If a tensor is of a type that cannot be read, beyond the end of the file, or
            one that the architecture does not have; or one is missing.
    """

    def __init__(
        self,
        file: Gguf,
        content: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._file, self._dtype, self._device = file, dtype, device
        self._on_progress, self._done = on_progress, 0
        self._norm_offset = NORM_OFFSETS.get(file.architecture, 0.0)
        self._heads = {}
        if content["model_type"] == "llama":
            self._heads["attn_q"] = content["num_attention_heads"]
            self._heads["attn_k"] = content["num_key_value_heads"]
        size = file.path.stat().st_size
        self._infos: dict[str, TensorInfo] = {}
        for info in file.tensors.values():
            _check_tensor(file, info, size)
            name = hf_name(info.name, file.architecture)
            if name is not None:
                self._infos[name] = info
            elif info.name != _ROPE_FACTORS:
                raise file.error(f"it has the tensor {info.name!r}, which is not supported.")
        for i in range(content["num_hidden_layers"]):
            for theirs in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"):
                _shape(file, f"blk.{i}.{theirs}.weight")
            more = ("post_attention_norm", "post_ffw_norm") if self._norm_offset else ()
            for theirs in ("attn_norm", "ffn_norm", "ffn_down", *more):
                _shape(file, f"blk.{i}.{theirs}.weight")
        _shape(file, "output_norm.weight")
        self._total = sum(map(_stored_bytes, self._infos.values()))

    def __getitem__(self, key: str) -> Tensor:
        info = self._infos[key]
        self._on_progress(self._done, self._total)
        heads = self._heads.get(info.name.split(".")[-2])
        out = torch.empty(info.shape, dtype=self._dtype, device=self._device)
        if out.is_meta:
            return out
        # The rows of a head are reordered together; they are few, so all rows are read at once.
        per_row = int(np.prod(info.shape[1:])) if len(info.shape) > 1 else 1
        step = info.shape[0] if heads else max(1, BLOCK // per_row)
        if len(info.shape) == 1:
            step = info.shape[0]
        for start in range(0, info.shape[0], step):
            rows = read_rows(self._file, info, start, start + step)
            if heads:
                rows = unpermute(rows, heads)
            if self._norm_offset and "norm" in info.name:
                rows -= self._norm_offset
            out[start : start + step].copy_(torch.from_numpy(rows))
        self._done += _stored_bytes(info)
        return out

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise TypeError("weights on disk are read only.")

    def __delitem__(self, key: str) -> None:
        del self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)


def _check_tensor(file: Gguf, info: TensorInfo, size: int) -> None:
    if info.kind not in TYPES:
        import gguf

        try:
            name = gguf.GGMLQuantizationType(info.kind).name
        except ValueError:
            name = f"number {info.kind}"
        known = ", ".join(name for name, _, _ in TYPES.values())
        raise file.error(
            f"the tensor {info.name!r} is quantized as {name}; supported are {known}. Quantize the "
            "model again with one of these."
        )
    end = info.offset + _stored_bytes(info)
    if end > size:
        raise file.error(
            f"it is truncated: {info.name!r} ends at byte {end:,}, but the file has {size:,} "
            "bytes; download it again."
        )


def _bytes(info: TensorInfo, elements: int) -> int:
    _, per_block, block_bytes = TYPES[info.kind]
    return elements // per_block * block_bytes


def _stored_bytes(info: TensorInfo) -> int:
    return _bytes(info, math.prod(info.shape))


def read_rows(file: Gguf, info: TensorInfo, start: int, stop: int | None) -> np.ndarray:
    """Rows start..stop as float32; a vector counts its elements as rows."""
    import gguf

    stop = info.shape[0] if stop is None else min(stop, info.shape[0])
    rest = info.shape[1:]
    per_row = _bytes(info, int(np.prod(rest)) if rest else 1)
    with file.path.open("rb") as opened:
        opened.seek(info.offset + start * per_row)
        raw = np.frombuffer(opened.read((stop - start) * per_row), np.uint8)
    if len(raw) != (stop - start) * per_row:
        raise file.error(f"it is truncated within {info.name!r}; download it again.")
    name = TYPES[info.kind][0]
    if name == "F32":
        values = raw.view(np.float32)
    elif name == "F16":
        values = raw.view(np.float16).astype(np.float32)
    else:
        blocks = raw.reshape(stop - start, per_row) if rest else raw
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType(info.kind))
    return np.array(values.reshape(stop - start, *rest), np.float32)


def write_tokenizer(file: Gguf, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into an existing *directory*."""
    build_tokenizer(file).save(str(directory / "tokenizer.json"))
    text = json.dumps(settings(file), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def write_directory(path: Path, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """
    Save the file at *path* as a Hugging Face model into an existing, empty *directory*.

    Raises:
        GgufError: If it cannot be read, or its rotary frequencies cannot be written in config.json.
        OSError: If it cannot be stored.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = read(path)
    content = config(file)
    if _ROPE_FACTORS in file.tensors:
        raise file.error(
            f"its rotary frequencies have separate factors ({_ROPE_FACTORS!r}), which "
            "config.json cannot describe; use the model's Hugging Face directory instead."
        )
    content["dtype"] = str(dtype).removeprefix("torch.")
    tensors = Tensors(file, content, dtype, torch.device("cpu"))
    write_tokenizer(file, directory)
    text = json.dumps(content, indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
    try:
        save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as exc:
        number = _OS_ERROR.search(str(exc))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from exc
