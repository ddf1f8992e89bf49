"""Base models: from the built-in one, a Hugging Face directory or a hub id to a `model.Base`.

The only place that touches transformers. Errors say what was tried and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor

from tinkex.engine import fetch, gguf, registry, tiny
from tinkex.engine.model import Base, Linear, Norms, Part, Rope, Spec
from tinkex.text import gguf as gguf_file

ARCHITECTURES = registry.ARCHITECTURES

#: Kinds of position embedding whose angles do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

#: How long the hub may take to say whether it has a model, in seconds.
HUB_TIMEOUT = 10

Decode = Callable[[Sequence[int]], str]


@attrs.frozen(eq=False)
class Loaded:
    """A base model and its metadata.

    Attributes:
        tokenizer_id: "tinkex/tiny", a directory's absolute path, or a hub id.
        architecture: its class in transformers.
        load_decode: gives the tokenizer's decoder (ids -> text, special tokens as text).
    """

    base: Base
    tokenizer_id: str
    architecture: str
    load_decode: Callable[[], Decode]


def load(name: str, device: torch.device) -> Loaded:
    """Load *name*: "tiny", a known name, a local directory, a GGUF file or a hub id.

    Raises:
        ValueError: If there is no such model, or it is not one of `ARCHITECTURES`.
    """
    if name == tiny.NAME:
        return _load_tiny(device)
    if gguf_file.is_gguf(name):
        return _load_gguf(name, device)
    source = _check_source(str(fetch.ensure(name)) if name in registry.KNOWN else name)
    return _load_hf(name, source, device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU, bfloat16 on an accelerator."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _load_tiny(device: torch.device) -> Loaded:
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
    dtype = compute_dtype(device)
    tensors = {name: t.to(device, dtype) for name, t in tiny.weights().items()}
    base = assemble(spec, tensors, Rope(inv_freq.to(device)))
    return Loaded(
        base, tiny.TOKENIZER_ID, config["architectures"][0], lambda: _decoder(tiny.DIRECTORY)
    )


def _load_gguf(name: str, device: torch.device) -> Loaded:
    path = Path(name).expanduser().resolve()
    file = gguf_file.read(path)
    content = gguf.config(file)
    tensors = gguf.Tensors(file, content, compute_dtype(device), device)
    rope = Rope(gguf.inverse_frequencies(file, content).to(device))
    base = assemble(_spec(SimpleNamespace(**content), None), tensors, rope)
    return Loaded(base, str(path), content["architectures"][0], lambda: _gguf_decoder(path))


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
    return str(path.resolve())


def _load_hf(name: str, source: str, device: torch.device) -> Loaded:
    import transformers  # here: it takes seconds, and "tiny" does without

    if not Path(source).is_dir():
        _check_hub(name)
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as exc:
        raise _cannot_load(name, source, exc) from exc
    _check_config(name, config)
    try:
        module = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=compute_dtype(device), use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as exc:
        raise _cannot_load(name, source, exc) from exc
    rotary = module.model.rotary_emb
    rope = Rope(rotary.inv_freq.to(device), float(rotary.attention_scaling))
    spec = _spec(config, module.generation_config)
    if 2 * len(rotary.inv_freq) != spec.head_dim:
        raise ValueError(
            f"base model {name!r} turns {2 * len(rotary.inv_freq)} of the {spec.head_dim} numbers "
            "of a head by position; this server computes models that turn all of them."
        )
    state = module.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    tensors = {key: tensor.detach().to(device) for key, tensor in state.items()}
    architecture = type(module).__name__
    del module, state  # so that fusing frees each tensor as it goes
    base = assemble(spec, tensors, rope)
    return Loaded(base, source, architecture, lambda: _decoder(source))


def _check_hub(name: str) -> None:
    """
    That a hub id is downloaded already, or can be.

    Asked once; transformers asks for half a minute before it says that there is no network.
    """
    import huggingface_hub

    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return
        address = huggingface_hub.hf_hub_url(name, "config.json")
        huggingface_hub.get_hf_file_metadata(address, timeout=HUB_TIMEOUT)
    except Exception as exc:  # no network, no such model, no access, not an id
        raise _cannot_load(name, name, exc) from exc


def _cannot_load(name: str, source: str, exc: Exception) -> ValueError:
    reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
    if Path(source).is_dir():
        return ValueError(
            f"base model {name!r}: transformers cannot load the directory {source!r}: {reason}"
        )
    return ValueError(
        f"base model {name!r} is not a directory here, and loading it from the Hugging Face hub "
        f"through transformers failed: {reason.rstrip('.')}. Without a network, download the model "
        'elsewhere and give the path of its directory; the built-in model "tiny" needs no download.'
    )


def _check_config(name: str, config: Any) -> None:
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
    """Longest text: within a sliding window, where there is one, attention is plain attention."""
    context: int = config.max_position_embeddings
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if config.model_type == "mistral" or slides:
        context = min(context, getattr(config, "sliding_window", None) or context)
    return context


def assemble(spec: Spec, tensors: MutableMapping[str, Tensor], rope: Rope) -> Base:
    """Fuse tensors with Hugging Face's names into a `Base`; takes them out of *tensors*."""
    linears: dict[str, Linear] = {}
    norms = []
    for i in range(spec.layers):
        layer = f"model.layers.{i}"
        attention = [f"{layer}.self_attn.{n}_proj" for n in ("q", "k", "v")]
        linears[f"{i}.qkv"] = _fuse(tensors, attention, "attn")
        linears[f"{i}.o"] = _fuse(tensors, [f"{layer}.self_attn.o_proj"], "attn")
        gate_up = [f"{layer}.mlp.{n}_proj" for n in ("gate", "up")]
        linears[f"{i}.gate_up"] = _fuse(tensors, gate_up, "mlp")
        linears[f"{i}.down"] = _fuse(tensors, [f"{layer}.mlp.down_proj"], "mlp")
        norms.append(
            Norms(
                tensors.pop(f"{layer}.input_layernorm.weight"),
                tensors.pop(f"{layer}.post_attention_layernorm.weight"),
                tensors.pop(f"{layer}.self_attn.q_norm.weight", None),
                tensors.pop(f"{layer}.self_attn.k_norm.weight", None),
            )
        )
    embedding = tensors.pop("model.embed_tokens.weight")
    head = tensors.pop("lm_head.weight", embedding)  # tied where there is none of its own
    linears["head"] = Linear(head, None, (Part("lm_head", 0, len(head)),), "unembed")
    final_norm = tensors.pop("model.norm.weight")
    return Base(spec, embedding, tuple(norms), final_norm, linears, rope)


def _fuse(tensors: MutableMapping[str, Tensor], names: Sequence[str], group: str) -> Linear:
    """Stack the matrices of modules that read the same input."""
    weights = [tensors.pop(f"{name}.weight") for name in names]
    biases = _biases(tensors, names, weights)
    parts, start = [], 0
    for name, weight in zip(names, weights):
        parts.append(Part(name, start, start + len(weight)))
        start += len(weight)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return Linear(weight, torch.cat(biases) if biases else None, tuple(parts), group)


def _biases(
    tensors: MutableMapping[str, Tensor], names: Sequence[str], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Bias of each module, zeros where only others have one; nothing if none has."""
    found = [tensors.pop(f"{name}.bias", None) for name in names]
    if all(bias is None for bias in found):
        return []
    return [w.new_zeros(len(w)) if bias is None else bias for bias, w in zip(found, weights)]


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
