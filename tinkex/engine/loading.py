"""Base models: make a `BaseModel` of the built-in model, a Hugging Face directory or a hub id.

Errors name what was tried and what to do.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import torch

from tinkex.engine import fetch, gguf, memory, model_files, tiny, weights
from tinkex.engine.base_model import BaseModel
from tinkex.engine.configuration import Unsupported
from tinkex.engine.families import FAMILIES, build
from tinkex.engine.fast_plan import FastPlan, of_plain_llama
from tinkex.engine.generic import loading as generic
from tinkex.engine.linears import Linear
from tinkex.engine.model import Rope
from tinkex.engine.weight_store import IN_MEMORY, WeightStore, free_disk
from tinkex.text import gguf as gguf_file
from tinkex.text import hub, registry

logger = logging.getLogger("tinkex.engine")

#: The device of tensors with shapes but no data.
_META = torch.device("meta")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

#: Files of a hub repository that are downloaded.
HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: bfloat16, except matrices, which `int8.quantized` rounds after loading.
INT8 = "int8"

Decode = Callable[[Sequence[int]], str]

#: Receives the bytes of weights read so far, and the total. May raise to stop loading.
Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """A `Progress` that does nothing."""


@attrs.frozen(eq=False)
class Loaded:
    """A base model and its metadata.

    Attributes:
        name: `canonical`; tokenizer_id: "tinkex/tiny", a directory's absolute path, or a hub id.
        architecture: its class in transformers.
        load_decode: gives the tokenizer's decoder (ids -> text, special tokens as text).
    """

    name: str
    base: BaseModel
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
    folder: Path | None = None,
) -> Loaded:
    """Load *name*: "tiny", a known name, a local directory, a GGUF file or a hub id.

    Args:
        dtype: of weights and activations; None is `default_dtype`.
        on_progress: see `Progress`.
        folder: where weights that do not fit in memory may stay on disk; None refuses them.

    Raises:
        ValueError: If there is no such model, it is not a causal language model, its files are
            damaged or incomplete, or it does not fit in memory.
    """
    dtype = dtype or default_dtype(device)
    if name == tiny.NAME:
        return _load_tiny(device, dtype)
    if gguf_file.is_gguf(name):
        return _load_gguf(name, device, dtype, on_progress, folder)
    on_progress(0, 0)
    source = _check_source(str(fetch.ensure(name)) if name in registry.KNOWN else name)
    return _load_hf(name, source, device, dtype, on_progress, folder)


@attrs.frozen(eq=False)
class Outline:
    """What is known of a base model before its weights are read.

    Attributes:
        architecture: its class in transformers.
        path: "fast" or "generic".
        parameters: how many; tied ones count once.
        linears: its matrices, which may be on the meta device.
        activations: floats that all layers save per token for the backward pass; None on the
            generic path, where they are measured.
    """

    architecture: str
    path: str
    parameters: int
    linears: Mapping[str, Linear]
    has_tied_head: bool
    activations: int | None = None


def outline(name: str) -> Outline:
    """What is known of a model that `load` would load. Reads no weights, and downloads nothing.

    Raises:
        ValueError: As `load`, or if the model is not on this machine.
    """
    if name == tiny.NAME:
        loaded = _load_tiny(_META, torch.float32)
        parameters = sum(tensor.numel() for tensor in tiny.weights().values())
        return _fast_outline(loaded.architecture, loaded.base, parameters)
    if gguf_file.is_gguf(name):
        loaded = _load_gguf(name, _META, torch.float32, no_progress, None)
        shapes = (info.shape for info in gguf_file.read(Path(loaded.name)).tensors.values())
        return _fast_outline(loaded.architecture, loaded.base, sum(map(math.prod, shapes)))
    source, directory = _on_this_machine(name)
    plan, config = _plan(name, source, directory, _META)
    if plan is None:
        with _errors_naming(name, source):
            found = generic.describe(config)
        return Outline(
            found.kind.__name__, "generic", found.parameters, found.linears, found.has_tied_head
        )
    tensors = {key: torch.empty(shape, device=_META) for key, shape in plan.shapes.items()}
    if plan.has_tied_head:
        tensors.pop("lm_head.weight", None)
    base = build.assemble(plan.family, plan.spec, tensors, plan.ropes)
    return _fast_outline(plan.architecture, base, plan.parameters)


def _fast_outline(architecture: str, base: BaseModel, parameters: int) -> Outline:
    kept = base.activation_bytes // base.dtype.itemsize
    return Outline(architecture, "fast", parameters, base.linears, base.has_tied_head, kept)


def _on_this_machine(name: str) -> tuple[str, Path]:
    """The model that a name stands for, and the directory of its files.

    Raises:
        ValueError: If they would have to be downloaded; the message has the command.
    """
    found = registry.find(name) if name in registry.KNOWN else None
    source = name if name in registry.KNOWN and found is None else _check_source(str(found or name))
    if Path(source).is_dir():
        return source, Path(source)
    if name in registry.KNOWN or not hub.is_cached(name, "config.json"):
        raise ValueError(f"{name!r} is not on this machine; fetch it: tinkex model pull {name}")
    import huggingface_hub

    return source, Path(huggingface_hub.snapshot_download(name, local_files_only=True))


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
    """The type that *name* stands for: "auto" (`default_dtype`), "float32" or "bfloat16"; "int8"
    gives the type of activations, bfloat16.

    Raises:
        ValueError: If it is none of these, or the device cannot multiply with it.
    """
    if name == "auto":
        return default_dtype(device)
    if name == INT8:
        if device.type != "cpu":
            raise ValueError(f"dtype {name!r} is for a CPU; on {device} choose auto or bfloat16.")
        return torch.bfloat16
    if name not in DTYPES:
        raise ValueError(
            f"dtype {name!r} is not supported; choose auto, {', '.join(DTYPES)} or {INT8}."
        )
    return DTYPES[name]


def _load_tiny(device: torch.device, dtype: torch.dtype) -> Loaded:
    config, family = tiny.CONFIG, FAMILIES[tiny.CONFIG["model_type"]]
    spec = build.spec_of(family, SimpleNamespace(**config))
    steps = torch.arange(0, spec.head_dim, 2, dtype=torch.float32)
    inv_freq = 1.0 / (config["rope_parameters"]["rope_theta"] ** (steps / spec.head_dim))
    tensors = {name: t.to(device, dtype) for name, t in tiny.weights().items()}
    ropes = (Rope(inv_freq.to(device)),) * spec.layers
    base = build.assemble(family, spec, tensors, ropes)
    architecture = config["architectures"][0]
    return Loaded(
        tiny.NAME, base, tiny.TOKENIZER_ID, architecture, lambda: _decoder(tiny.DIRECTORY)
    )


def _load_gguf(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Progress,
    folder: Path | None,
) -> Loaded:
    path = Path(name).expanduser().resolve()
    file = gguf_file.read(path)
    content = gguf.config(file)
    model_files.check_sizes(name, content)
    parameters = sum(math.prod(info.shape) for info in file.tensors.values())
    store = _store(name, parameters, device, dtype, folder)
    tensors = gguf.Tensors(file, content, dtype, device, on_progress)
    family = FAMILIES[content["model_type"]]
    settings = SimpleNamespace(**content)
    spec = build.spec_of(family, settings)
    frequencies = gguf.inverse_frequencies(file, content)
    by_kind = {kind: Rope(values.to(device)) for kind, values in frequencies.items()}
    ropes = tuple(by_kind[kind or ""] for kind in family.ropes(settings))
    base = build.assemble(family, spec, tensors, ropes, store)
    architecture = content["architectures"][0]
    return Loaded(name, base, str(path), architecture, lambda: _gguf_decoder(path))


def _gguf_decoder(path: Path) -> Decode:
    tokenizer = gguf_file.build_tokenizer(gguf_file.read(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def _check_source(name: str) -> str:
    """*name* for transformers: the absolute path of a complete directory, or a hub id."""
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
    name: str,
    source: str,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Progress,
    folder: Path | None,
) -> Loaded:
    directory = Path(source) if Path(source).is_dir() else _hub_directory(name)
    plan, config = _plan(name, source, directory, device)
    if plan is not None:
        return _load_fast(name, source, directory, plan, device, dtype, on_progress, folder)
    return _load_generic(name, source, directory, config, device, dtype, on_progress)


def _plan(
    name: str, source: str, directory: Path, device: torch.device
) -> tuple[FastPlan | None, Any]:
    """The fast path's plan of a model, or the model's configuration for the generic path."""
    model_files.check_config_file(name, directory / "config.json")
    plan = of_plain_llama(directory, device)
    if plan is not None:
        return plan, None
    config = _read_config(name, source, directory)
    return _fast_plan(name, source, config, directory, device), config


def _read_config(name: str, source: str, directory: Path) -> Any:
    """The configuration of a model, read by transformers."""
    import transformers  # imported here because it takes seconds, and few models need it

    content = model_files.read_json(directory / "config.json")
    if "auto_map" in content and content.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"base model {name!r} is computed by its own code (auto_map in config.json), which "
            "this server does not run. Use a model that transformers computes itself."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except Exception as exc:  # a damaged or hostile file can raise anything
        raise _cannot_load(name, source, exc) from exc
    weights.check_not_quantized(name, getattr(config, "quantization_config", None))
    return config


def _fast_plan(
    name: str, source: str, config: Any, directory: Path, device: torch.device
) -> FastPlan | None:
    """The fast path's plan of a model; None if it does not support the model."""
    import transformers

    family = FAMILIES.get(config.model_type)
    if family is None:
        return None
    try:
        build.check_config(family, config)
        with _errors_naming(name, source):
            with torch.device("meta"):
                module = transformers.AutoModelForCausalLM.from_config(config)
            if (directory / "generation_config.json").is_file():
                module.generation_config = transformers.GenerationConfig.from_pretrained(directory)
            rotary = type(module.model.rotary_emb)(config=config)
        spec = build.spec_of(family, config, module.generation_config)
        ropes = build.ropes_of(family, config, rotary, device)
    except Unsupported as exc:  # the generic path may support it, or gives the reason
        logger.info("The fast path does not compute %s: %s", directory, exc)
        return None
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    parameters = sum(parameter.numel() for parameter in module.parameters())
    tied = config.tie_word_embeddings
    return FastPlan(family, type(module).__name__, spec, ropes, shapes, tied, parameters)


def _load_fast(
    name: str,
    source: str,
    directory: Path,
    plan: FastPlan,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Progress,
    folder: Path | None,
) -> Loaded:
    tensors = weights.Weights(name, directory, dtype, device, on_progress)
    head = ("lm_head.weight",) if plan.has_tied_head else ()
    tensors.check(name, plan.shapes, head)
    for key in head:
        tensors.pop(key, None)
    store = _store(name, plan.parameters, device, dtype, folder)
    base = build.assemble(plan.family, plan.spec, tensors, plan.ropes, store)
    return Loaded(name, base, source, plan.architecture, lambda: _decoder(directory))


def _load_generic(
    name: str,
    source: str,
    directory: Path,
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Progress,
) -> Loaded:
    with _errors_naming(name, source):
        found = generic.describe(config)
    # Only checks the size: transformers loads into memory.
    _store(name, found.parameters, device, dtype, None)
    size = found.parameters * dtype.itemsize
    on_progress(0, size)
    with _errors_naming(name, source):
        base = generic.load(config, directory, device, dtype)
    on_progress(size, size)
    return Loaded(name, base, source, found.kind.__name__, lambda: _decoder(directory))


@contextlib.contextmanager
def _errors_naming(name: str, source: str) -> Iterator[None]:
    """Add the model's name to whatever transformers raises for unusual or damaged files."""
    try:
        yield
    except Unsupported as exc:
        raise ValueError(f"base model {name!r} {exc}.") from exc
    except Exception as exc:
        raise _cannot_load(name, source, exc) from exc


def _store(
    name: str, parameters: int, device: torch.device, dtype: torch.dtype, folder: Path | None
) -> WeightStore:
    """Where the weights are kept: in memory if they fit, else in *folder* if there is one.

    Args:
        parameters: counts tied weights once.

    Raises:
        ValueError: With the sizes, if they fit in neither.
    """
    needed, free = parameters * dtype.itemsize, memory.available_memory(device)
    if needed <= free or device == _META:
        return IN_MEMORY
    size, total = memory.gigabytes(needed), memory.total_memory(device)
    too_large = (
        f"base model {name!r} does not fit in memory: its {parameters / 1e6:,.0f} million "
        f"parameters need {size} in {str(dtype).removeprefix('torch.')}, but only "
        f"{memory.gigabytes(free)} of {memory.gigabytes(total)} are free."
    )
    if folder is not None and device.type == "cpu":
        on_disk = free_disk(folder)
        if needed > on_disk:
            raise ValueError(
                f"{too_large} Nor does it fit on the disk of {str(folder)!r}, which has "
                f"{memory.gigabytes(on_disk)} free. Free some, or choose a smaller model."
            )
        logger.warning("%s Its weights stay on disk, in %s: slow.", too_large, folder)
        return WeightStore(folder)
    half = memory.gigabytes(parameters * 2)
    smaller = f"Use dtype bfloat16 ({half}), free" if dtype.itemsize > 2 else "Free"
    slow = " `tinkex serve --weights-on-disk` computes it slowly." if device.type == "cpu" else ""
    raise ValueError(f"{too_large} {smaller} memory, or choose a smaller model.{slow}")


def _hub_directory(name: str) -> Path:
    """The local copy of a hub repository; downloads missing files."""
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
