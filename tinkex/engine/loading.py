"""Base models: make a `model.Base` of the built-in model, a Hugging Face directory or a hub id.

The only module that uses transformers. Errors name what was tried and what to do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor

from tinkex.engine import fetch, gguf, memory, model_files, tiny, weights
from tinkex.engine.model import Base, Linear, Norms, Part, Rope, Spec
from tinkex.text import gguf as gguf_file
from tinkex.text import hub, registry

ARCHITECTURES = registry.ARCHITECTURES

#: Kinds of position embedding whose angles do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

#: Files of a hub repository that are downloaded.
HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Decode = Callable[[Sequence[int]], str]

#: Receives the bytes of weights that were read so far, and those of all. May raise to end loading.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """A `Progress` that is not shown."""


@attrs.frozen(eq=False)
class Loaded:
    """A base model and its metadata.

    Attributes:
        name: `canonical`; tokenizer_id: "tinkex/tiny", a directory's absolute path, or a hub id.
        architecture: its class in transformers.
        load_decode: gives the tokenizer's decoder (ids -> text, special tokens as text).
    """

    name: str
    base: Base
    tokenizer_id: str
    architecture: str
    load_decode: Callable[[], Decode]


def canonical(base_model: str) -> str:
    """One name for one model: the absolute path of a directory or GGUF file, or the name as is."""
    path = Path(base_model).expanduser()
    is_here = base_model != tiny.NAME and (path.is_dir() or gguf_file.is_gguf(base_model))
    return str(path.resolve()) if is_here else base_model


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    on_progress: Progress = no_progress,
) -> Loaded:
    """Load *name*: "tiny", a known name, a local directory, a GGUF file or a hub id.

    Args:
        dtype: of the weights and of what is computed with them; None is `default_dtype`.
        on_progress: see `Progress`.

    Raises:
        ValueError: If there is no such model, it is not one of `ARCHITECTURES`, its files are
            damaged or incomplete, or it does not fit in memory.
    """
    dtype = dtype or default_dtype(device)
    if name == tiny.NAME:
        return _load_tiny(device, dtype)
    if gguf_file.is_gguf(name):
        return _load_gguf(name, device, dtype, on_progress)
    on_progress(0, 0)
    source = _check_source(str(fetch.ensure(name)) if name in registry.KNOWN else name)
    return _load_hf(name, source, device, dtype, on_progress)


def default_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU, bfloat16 on an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def device_of(name: str) -> torch.device:
    """The device that *name* stands for; "auto" is an accelerator if there is one.

    Raises:
        ValueError: If it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise ValueError(
            f"device {name!r} cannot be used here ({exc}). Choose auto, cpu, cuda or mps."
        ) from exc
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type that *name* stands for: "auto" (`default_dtype`), "float32" or "bfloat16".

    Raises:
        ValueError: If it is none of these.
    """
    if name == "auto":
        return default_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _load_tiny(device: torch.device, dtype: torch.dtype) -> Loaded:
    config = tiny.CONFIG
    spec = Spec(
        layers=tiny.LAYERS,
        width=tiny.WIDTH,
        heads=tiny.HEADS,
        kv_heads=tiny.HEADS,
        head_dim=config["head_dim"],
        mlp=tiny.MLP,
        vocab=tiny.VOCAB,
        context=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        eos_tokens=tuple(config["eos_token_id"]),
    )
    steps = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
    inv_freq = 1.0 / (config["rope_parameters"]["rope_theta"] ** (steps / spec.head_dim))
    tensors = {name: t.to(device, dtype) for name, t in tiny.weights().items()}
    base = assemble(spec, tensors, Rope(inv_freq.to(device)))
    architecture = config["architectures"][0]
    return Loaded(
        tiny.NAME, base, tiny.TOKENIZER_ID, architecture, lambda: _decoder(tiny.DIRECTORY)
    )


def _load_gguf(
    name: str, device: torch.device, dtype: torch.dtype, on_progress: Progress
) -> Loaded:
    path = Path(name).expanduser().resolve()
    file = gguf_file.read(path)
    content = gguf.config(file)
    model_files.check_sizes(name, content)
    parameters = sum(math.prod(info.shape) for info in file.tensors.values())
    _check_memory(name, parameters, device, dtype)
    tensors = gguf.Tensors(file, content, dtype, device, on_progress)
    rope = Rope(gguf.inverse_frequencies(file, content).to(device))
    base = assemble(_spec(SimpleNamespace(**content), None), tensors, rope)
    architecture = content["architectures"][0]
    return Loaded(name, base, str(path), architecture, lambda: _gguf_decoder(path))


def _gguf_decoder(path: Path) -> Decode:
    tokenizer = gguf_file.build_tokenizer(gguf_file.read(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def _check_source(name: str) -> str:
    """*name* as transformers takes it: an absolute directory that looks complete, or a hub id."""
    path = Path(name).expanduser()
    if not path.is_dir():
        if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise ValueError(
                f"base model {name!r}: there is no such directory. Give the directory of a "
                'Hugging Face model (config.json, *.safetensors, tokenizer), a hub id, or "tiny".'
            )
        return name
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    if not any(path.glob("*.safetensors")):
        unsafe = "; *.bin files are not read" if any(path.glob("*.bin")) else ""
        missing.append(f"weights (*.safetensors{unsafe})")
    if not any((path / file).is_file() for file in TOKENIZER_FILES):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise ValueError(
            f"base model directory {str(path)!r} lacks {' and '.join(missing)}; give a directory "
            "written by save_pretrained() of both model and tokenizer."
        )
    weights.check_no_pointers(path)
    return str(path.resolve())


def _load_hf(
    name: str, source: str, device: torch.device, dtype: torch.dtype, on_progress: Progress
) -> Loaded:
    directory = Path(source) if Path(source).is_dir() else _hub_directory(name)
    model_files.check_config_file(name, directory / "config.json")
    config, module = _describe_hf(name, source, directory)
    rotary = type(module.model.rotary_emb)(config=config)
    rope = Rope(rotary.inv_freq.to(device), float(rotary.attention_scaling))
    spec = _spec(config, module.generation_config)
    if 2 * len(rotary.inv_freq) != spec.head_dim:
        raise ValueError(
            f"base model {name!r} rotates {2 * len(rotary.inv_freq)} of the {spec.head_dim} "
            "numbers of a head by position; this server computes models that rotate all of them."
        )
    tensors = weights.Weights(name, directory, dtype, device, on_progress)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    head = ("lm_head.weight",) if config.tie_word_embeddings else ()
    tensors.check(name, expected, head)
    for key in head:
        tensors.pop(key, None)
    _check_memory(name, sum(p.numel() for p in module.parameters()), device, dtype)
    base = assemble(spec, tensors, rope)
    return Loaded(name, base, source, type(module).__name__, lambda: _decoder(directory))


def _describe_hf(name: str, source: str, directory: Path) -> tuple[Any, Any]:
    """The configuration of a model, and its module without memory for the weights."""
    import transformers  # imported here because it takes seconds, and "tiny" does not need it

    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except Exception as exc:  # whatever a damaged or hostile file makes transformers do
        raise _cannot_load(name, source, exc) from exc
    _check_config(name, config)
    try:
        with torch.device("meta"):
            module = transformers.AutoModelForCausalLM.from_config(config)
        if (directory / "generation_config.json").is_file():
            module.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    except Exception as exc:
        raise _cannot_load(name, source, exc) from exc
    return config, module


def _check_memory(name: str, parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    """Check that the weights fit in free memory. *parameters* counts tied weights once.

    Raises:
        ValueError: With the sizes, if they do not.
    """
    needed, free = parameters * dtype.itemsize, memory.available_memory(device)
    if needed <= free:
        return
    size, total = memory.gigabytes(needed), memory.total_memory(device)
    half = memory.gigabytes(parameters * 2)
    smaller = f"Use dtype bfloat16 ({half}), free" if dtype.itemsize > 2 else "Free"
    raise ValueError(
        f"base model {name!r} does not fit in memory: its {parameters / 1e6:,.0f} million "
        f"parameters need {size} in {str(dtype).removeprefix('torch.')}, but only "
        f"{memory.gigabytes(free)} of {memory.gigabytes(total)} are free. {smaller} memory, or "
        "choose a smaller model."
    )


def _hub_directory(name: str) -> Path:
    """The local copy of a hub repository; downloads what is missing."""
    import huggingface_hub

    try:
        if hub.is_cached(name, "config.json"):
            cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
            if weights.is_complete(cached):
                return cached
        hub.check_file(name, "config.json")
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as exc:  # no network, no such model, no access, not an id
        raise _cannot_load(name, name, exc) from exc


def _cannot_load(name: str, source: str, exc: Exception) -> ValueError:
    reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    if Path(source).is_dir():
        return ValueError(
            f"base model {name!r}: transformers cannot load the directory {source!r}: {reason}"
        )
    return ValueError(
        f"base model {name!r} is not a local directory, and downloading it from the Hugging Face "
        f"hub failed: {reason.rstrip('.')}. Without a network, download the model on another "
        'machine and give the path of its directory; the built-in model "tiny" needs no download.'
    )


def _check_config(name: str, config: Any) -> None:
    weights.check_not_quantized(name, getattr(config, "quantization_config", None))
    supported = f"this server computes models of the architectures {', '.join(ARCHITECTURES)}"
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"base model {name!r} has architecture {config.model_type!r}; {supported} "
            '(config.json, "model_type").'
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"base model {name!r} has the activation {config.hidden_act!r}; {supported}, "
            'all with "silu".'
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise ValueError(
            f"base model {name!r} has position embeddings of type {rope!r}; "
            f"{supported}, with {', '.join(ROPE_TYPES)}."
        )


def _spec(config: Any, generation_config: Any) -> Spec:
    eos = getattr(generation_config, "eos_token_id", None)
    if eos is None:
        eos = config.eos_token_id
    if eos is None:
        eos = ()
    head_dim = getattr(config, "head_dim", None)
    return Spec(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocab=config.vocab_size,
        context=_context(config),
        norm_eps=config.rms_norm_eps,
        eos_tokens=(eos,) if isinstance(eos, int) else tuple(eos),
    )


def _context(config: Any) -> int:
    """Longest text. Within a sliding window, attention is the same as without one."""
    context: int = config.max_position_embeddings
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.model_type == "mistral" or slides:
        context = min(context, getattr(config, "sliding_window", None) or context)
    return context


def assemble(spec: Spec, tensors: MutableMapping[str, Tensor], rope: Rope) -> Base:
    """Fuse tensors with Hugging Face's names into a `Base`; removes them from *tensors*.

    Args:
        tensors: may read each tensor only when it is taken, as `weights.Weights` does.
    """
    linears: dict[str, Linear] = {}
    norms = []
    embedding = tensors.pop("model.embed_tokens.weight")
    heads, kv_heads = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        sizes = (("q", heads), ("k", kv_heads), ("v", kv_heads))
        qkv = {f"{layer}.self_attn.{name}_proj": rows for name, rows in sizes}
        gate_up = {f"{layer}.mlp.{name}_proj": spec.mlp for name in ("gate", "up")}
        o, down = {f"{layer}.self_attn.o_proj": spec.width}, {f"{layer}.mlp.down_proj": spec.width}
        linears[f"{i}.qkv"] = _fuse(tensors, qkv, "attn", embedding)
        linears[f"{i}.o"] = _fuse(tensors, o, "attn", embedding)
        linears[f"{i}.gate_up"] = _fuse(tensors, gate_up, "mlp", embedding)
        linears[f"{i}.down"] = _fuse(tensors, down, "mlp", embedding)
        norms.append(
            Norms(
                tensors.pop(f"{layer}.input_layernorm.weight"),
                tensors.pop(f"{layer}.post_attention_layernorm.weight"),
                tensors.pop(f"{layer}.self_attn.q_norm.weight", None),
                tensors.pop(f"{layer}.self_attn.k_norm.weight", None),
            )
        )
    head = tensors.pop("lm_head.weight", embedding)  # tied where there is none
    linears["head"] = Linear(head, None, (Part("lm_head", 0, len(head)),), "unembed")
    final_norm = tensors.pop("model.norm.weight")
    return Base(spec, embedding, tuple(norms), final_norm, linears, rope)


def _fuse(
    tensors: MutableMapping[str, Tensor], rows: Mapping[str, int], group: str, embedding: Tensor
) -> Linear:
    """Stack the matrices of modules that read the same input.

    Each matrix is copied and dropped before the next one is taken, so that they are never all in
    memory beside the result.

    Args:
        rows: of each module's matrix, by its name.
        embedding: (V, width), of the type and on the device of the result.
    """
    starts = list(itertools.accumulate(rows.values(), initial=0))
    parts = tuple(Part(name, *bounds) for name, bounds in zip(rows, itertools.pairwise(starts)))
    if len(parts) == 1:
        weight = tensors.pop(f"{parts[0].name}.weight")
    else:
        weight = embedding.new_empty(starts[-1], embedding.shape[1])
        for part in parts:
            weight[part.start : part.stop] = tensors.pop(f"{part.name}.weight")
    biases = [tensors.pop(f"{part.name}.bias", None) for part in parts]
    if all(bias is None for bias in biases):
        return Linear(weight, None, parts, group)
    bias = embedding.new_zeros(starts[-1])
    for part, own in zip(parts, biases):
        if own is not None:
            bias[part.start : part.stop] = own
    return Linear(weight, bias, parts, group)


def _decoder(source: Path | str) -> Decode:
    """ids -> text, special tokens written out."""
    file = Path(source) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(file))
        return lambda ids: fast.decode(list(ids), skip_special_tokens=False)
    import transformers

    slow = transformers.AutoTokenizer.from_pretrained(source)
    return lambda ids: slow.decode(list(ids), skip_special_tokens=False)
