"""Adapters and training states as files: PEFT's format for the adapter, our own beside it.

A saved directory holds
    adapter_model.safetensors, adapter_config.json   the adapter, as PEFT writes and reads it
    checkpoint.json                                  base model, rank, reach, format version
    optimizer.safetensors                            moments and step count, if asked for
and a snapshot holds checkpoint.json and live.safetensors: everything that is in memory, exactly.
Every file is synced to disk. Does not know about engines or the layout of the home directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinkex.engine import tiny, weights
from tinkex.engine.families import FAMILIES
from tinkex.engine.generic import merging
from tinkex.engine.linears import Linear
from tinkex.engine.lora import ALPHA, GROUPS, Layout, Shape

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CHECKPOINT = "checkpoint.json"
OPTIMIZER = "optimizer.safetensors"
LIVE = "live.safetensors"
LIVE_TENSORS = ("weights", "gradient", "m", "v", "steps")

FORMAT_VERSION = 1

_PREFIX = "base_model.model."
#: Suffixes of the copies of frozen base weights that PEFT saves with an adapter of the head or the
#: embedding. Ours are read from the base model.
_BASE_COPIES = (".base_layer.weight", ".base_layer.bias", "embed_tokens.weight")

_PEFT_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight\Z")

#: Settings of a PEFT adapter that we do not implement, and the values at which they have no effect.
_PLAIN_PEFT: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
}


@attrs.frozen
class Info:
    """Metadata of a checkpoint: the content of checkpoint.json."""

    base_model: str
    shape: Shape


def write_adapter(directory: Path, info: Info, layout: Layout, flat: Tensor) -> None:
    """The adapter in PEFT's format, and checkpoint.json, into an existing *directory*."""
    named = {}
    for name, tensor in layout.tensors(flat).items():
        module, letter = name.rsplit(".lora_", 1)
        named[f"{_PREFIX}{module}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    _write(directory / ADAPTER, named)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base_model,
        "r": info.shape.rank,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        **_targets(layout),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    _write_json(directory / ADAPTER_CONFIG, config)
    _write_info(directory, info)


def _targets(layout: Layout) -> dict[str, list[str]]:
    """The adapted modules in PEFT's settings: suffixes of names, or full names where a suffix also
    matches a module that is not adapted.

    In models with stacked experts, PEFT takes the suffixes gate_proj, up_proj and down_proj for
    experts. The dense layers of such a model are therefore listed as parameters, too.
    """
    experts = _stacked(layout)
    parameters = [
        f"{_within_layer(part.name)}.weight"
        for linear in layout.linears.values()
        for part in linear.parts
        if experts and linear.group == "mlp" and not linear.parameter
    ]
    modules = [
        part.name
        for linear in layout.linears.values()
        for part in linear.parts
        if not linear.parameter and not (experts and linear.group == "mlp")
    ]
    ends = dict.fromkeys(name.rsplit(".", 1)[-1] for name in modules)
    others = {name.rsplit(".", 1)[-1] for name in layout.left_out}
    found = {"target_modules": modules if others & ends.keys() else list(ends)}
    if experts:
        found["target_parameters"] = list(dict.fromkeys([*experts, *parameters]))
    return found


def _stacked(layout: Layout) -> list[str]:
    """Names, within their layer, of the parameters that hold experts."""
    names = [linear.parameter for linear in layout.linears.values() if linear.parameter]
    return list(dict.fromkeys(map(_within_layer, names)))


def _within_layer(name: str) -> str:
    """A name without everything before the number of its layer."""
    return re.sub(r".*?\.\d+\.", "", name, count=1)


def write_optimizer(directory: Path, m: Tensor, v: Tensor, steps: int) -> None:
    """Moments (size,) and step count, into an existing *directory*."""
    tensors = {"m": m.cpu(), "v": v.cpu(), "steps": torch.tensor(steps)}
    _write(directory / OPTIMIZER, tensors)


def read_optimizer(directory: Path) -> tuple[Tensor, Tensor, int]:
    """Moments and step count.

    Raises:
        ValueError: If the checkpoint holds none.
    """
    if not (directory / OPTIMIZER).is_file():
        raise ValueError(
            f"the checkpoint {str(directory)!r} holds no optimizer state (it was saved for "
            "sampling); load it without the optimizer."
        )
    tensors = _read(directory / OPTIMIZER, "m", "v", "steps")
    return tensors["m"], tensors["v"], int(tensors["steps"])


def write_live(directory: Path, info: Info, tensors: Mapping[str, Tensor]) -> None:
    """Everything in memory, into an existing *directory*."""
    _write(directory / LIVE, {name: t.detach().cpu() for name, t in tensors.items()})
    _write_info(directory, info)


def read_live(directory: Path) -> tuple[Info, dict[str, Tensor]]:
    """What `write_live` wrote. ValueError if it is not there or not whole."""
    return _read_info(directory), _read(directory / LIVE, *LIVE_TENSORS)


def _write_info(directory: Path, info: Info) -> None:
    content = {
        "format": FORMAT_VERSION,
        "base_model": info.base_model,
        "alpha": ALPHA,
        **attrs.asdict(info.shape),
    }
    _write_json(directory / CHECKPOINT, content)


def check_base(info: Info, base_model: str, directory: Path) -> None:
    """Check that a checkpoint is of a base model. PEFT's adapters may name it in any way.

    Raises:
        ValueError: If it is of another one.
    """
    ours = (directory / CHECKPOINT).is_file()
    if ours and info.base_model != base_model:
        raise ValueError(
            f"the checkpoint {str(directory)!r} is of the base model {info.base_model!r}, not of "
            f"{base_model!r}."
        )


def read_info(directory: Path, linears: Mapping[str, Linear]) -> Info:
    """Base model and shape of the adapter in *directory*: ours, or PEFT's (shape from its modules).

    Args:
        linears: the matrices of the base model that the adapter will be used with.

    Raises:
        ValueError: If there is no adapter, or it is not plain LoRA.
    """
    if (directory / CHECKPOINT).is_file():
        return _read_info(directory)
    config = _peft_config(directory)
    names = _names(directory)
    reach = {
        linear.group
        for linear in linears.values()
        if any(part.name in names for part in linear.parts)
    }
    shape = Shape(config["r"], *(group in reach for group in GROUPS))
    return Info(str(config.get("base_model_name_or_path") or ""), shape)


def _read_info(directory: Path) -> Info:
    content = _read_json(directory / CHECKPOINT)
    if content.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"the checkpoint {str(directory)!r} has format {content.get('format')!r}; this version "
            f"of tinkex reads format {FORMAT_VERSION}."
        )
    try:
        shape = Shape(**{name: content[name] for name in attrs.fields_dict(Shape)})
        return Info(content["base_model"], shape)
    except KeyError as exc:
        raise ValueError(f"{str(directory / CHECKPOINT)!r} lacks {exc}; it is incomplete.") from exc


def read_adapter(directory: Path, layout: Layout, flat: Tensor) -> None:
    """Read an adapter (ours or PEFT's) into *flat*; modules missing from it keep their values.

    B is scaled to compensate for an alpha other than ours.

    Raises:
        ValueError: If it does not fit the layout, or is not plain LoRA.
    """
    config = _peft_config(directory)
    if config["r"] != layout.shape.rank:
        raise ValueError(
            f"the adapter {str(directory)!r} has rank {config['r']}, the model "
            f"{layout.shape.rank}; create the model with rank {config['r']}."
        )
    theirs = tuple(config.get("target_parameters") or ())
    if theirs and not all(name.endswith(theirs) for name in _stacked(layout)):
        raise ValueError(
            f"the adapter {str(directory)!r} has target_parameters = {list(theirs)}, where the "
            f"model has {_stacked(layout)}. PEFT names the matrices of one by how many others "
            "there are; adapt all of them."
        )
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    factor = config.get("lora_alpha", config["r"]) / root / layout.shape.scale
    targets = layout.tensors(flat)
    for name, tensor in _read_lora(directory).items():
        module, letter = _module(name, directory)
        target = targets.get(f"{module}.lora_{letter}")
        if target is None or target.shape != tensor.shape:
            there = "nothing" if target is None else f"shape {list(target.shape)}"
            raise ValueError(
                f"the adapter {str(directory)!r} has {name!r} with shape {list(tensor.shape)}, "
                f"where the model has {there}; it belongs to another base model, or the model "
                "has to be created with different train_attn, train_mlp, train_unembed."
            )
        target.copy_(tensor if letter == "A" or factor == 1 else tensor * factor)


def _module(name: str, directory: Path) -> tuple[str, str]:
    match = _PEFT_NAME.match(name)
    if match is None:
        raise ValueError(
            f"the adapter {str(directory)!r} holds {name!r}, which is not a LoRA matrix of a "
            "linear layer; only plain LoRA can be read."
        )
    return match[1], match[2]


def _read_lora(directory: Path) -> dict[str, Tensor]:
    """The tensors of an adapter without PEFT's copies of base weights."""
    tensors = _read(directory / ADAPTER)
    return {name: t for name, t in tensors.items() if not name.endswith(_BASE_COPIES)}


def _names(directory: Path) -> set[str]:
    """Full names of the modules that an adapter changes."""
    return {_module(name, directory)[0] for name in _read_lora(directory)}


def _peft_config(directory: Path) -> dict[str, Any]:
    missing = [file for file in (ADAPTER_CONFIG, ADAPTER) if not (directory / file).is_file()]
    if missing:
        raise ValueError(
            f"{str(directory)!r} is not an adapter directory: it lacks {' and '.join(missing)}."
        )
    config = _read_json(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int):
        raise ValueError(
            f"the adapter {str(directory)!r} is of type {config.get('peft_type')!r}; only LORA "
            "can be read."
        )
    for key, plain in _PLAIN_PEFT.items():
        if key in config and config[key] not in plain:
            raise ValueError(
                f"the adapter {str(directory)!r} has {key} = {config[key]!r}; only plain LoRA "
                f"can be read, with {key} = {plain[0]!r}."
            )
    return config


def _read(path: Path, *needed: str) -> dict[str, Tensor]:
    """The tensors of a file by name. ValueError if it cannot be read, or lacks a *needed* one."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as exc:
        raise ValueError(f"{str(path)!r} cannot be read as safetensors: {exc}") from exc
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"{str(path)!r} lacks {', '.join(missing)}; it is incomplete.")
    return tensors


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ValueError(f"{str(path)!r} cannot be read: {exc}") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} does not hold a JSON object.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Make a written file survive a crash of the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def merge_adapter(base_model: str, adapter: Path, out: Path) -> None:
    """Merge an adapter into its base model, and write the result as a Hugging Face directory.

    Args:
        base_model: "tiny" or a model directory (config.json, *.safetensors, tokenizer).
        adapter: an adapter directory, ours or PEFT's.
        out: the directory to write; must be missing or empty.

    Raises:
        ValueError: If one of the two cannot be read, they do not fit, or *out* is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is not an empty directory; give another.")
    changes = _Changes(adapter)
    out.mkdir(parents=True, exist_ok=True)
    if base_model == tiny.NAME:
        config = dict(tiny.CONFIG)
        shards: dict[str, Callable[[], dict[str, Tensor]]] = {"model.safetensors": tiny.weights}
        tiny.write_tokenizer(out)
    else:
        source = Path(base_model).expanduser()
        config = _read_json(source / "config.json")
        if config.get("model_type") not in FAMILIES:
            _copy_small_files(source, out)
            (out / weights.INDEX).unlink(missing_ok=True)
            merging.merge(source, changes.tensors, changes.scale, out)
            return
        files = sorted(source.glob("*.safetensors"))
        if not files:
            raise ValueError(f"base model directory {base_model!r} holds no *.safetensors weights.")
        shards = {file.name: _Reader(file) for file in files}
        _copy_small_files(source, out)
    _write_merged(config, shards, changes, out)


@attrs.frozen
class _Reader:
    """Reads one file of weights when called."""

    path: Path

    def __call__(self) -> dict[str, Tensor]:
        return _read(self.path)


class _Changes:
    """What an adapter adds to each weight matrix, by the matrix's name.

    Attributes:
        tensors: the matrices A and B by name of the module and letter.
        scale: factor on B A.
        left: names of weights not changed yet.
    """

    def __init__(self, directory: Path) -> None:
        config = _peft_config(directory)
        root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        self.scale = config.get("lora_alpha", config["r"]) / root
        self.tensors = {
            _module(name, directory): tensor for name, tensor in _read_lora(directory).items()
        }
        self.left = {f"{module}.weight" for module, _ in self.tensors}

    def applied(self, name: str, weight: Tensor) -> Tensor:
        """*weight* with its change, computed in float32."""
        module = name.removesuffix(".weight")
        if (module, "A") not in self.tensors:
            return weight
        self.left.discard(name)
        a, b = self.tensors[module, "A"].float(), self.tensors[module, "B"].float()
        if weight.shape != (len(b), a.shape[1]):
            raise ValueError(
                f"the adapter changes {name!r} by shape {[len(b), a.shape[1]]}, but the base "
                f"model's has {list(weight.shape)}; it belongs to another base model."
            )
        return torch.addmm(weight.float(), b, a, alpha=self.scale).to(weight.dtype)


def _write_merged(
    config: dict[str, Any],
    shards: Mapping[str, Callable[[], dict[str, Tensor]]],
    changes: _Changes,
    out: Path,
) -> None:
    """Merge shard by shard, so that only one is in memory at a time."""
    untie = "lm_head.weight" in changes.left and config.get("tie_word_embeddings", False)
    head_file = ""
    for file, read in shards.items():
        tensors = read()
        if untie and "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
            # The head changes and the embedding does not: they are no longer tied.
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            head_file = file
        merged = {name: changes.applied(name, t).contiguous() for name, t in tensors.items()}
        _write(out / file, merged)
    if changes.left:
        raise ValueError(
            f"the adapter changes {sorted(changes.left)[0]!r}, which the base model does not have; "
            "it belongs to another base model."
        )
    if untie:
        config["tie_word_embeddings"] = False
        _index_head(out, head_file)
    _write_json(out / "config.json", config)


def _index_head(out: Path, file: str) -> None:
    """Add the untied head to the index of a model of several files."""
    path = out / "model.safetensors.index.json"
    if path.is_file() and file:
        index = _read_json(path)
        index["weight_map"]["lm_head.weight"] = file
        _write_json(path, index)


def _copy_small_files(source: Path, out: Path) -> None:
    """Tokenizer, generation settings, index: everything that is neither weights nor config."""
    for file in sorted(source.iterdir()):
        if file.suffix in {".json", ".txt", ".model", ".jinja"} and file.name != "config.json":
            shutil.copyfile(file, out / file.name)
