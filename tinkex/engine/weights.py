"""Weights of a Hugging Face directory: find the files, check them, and read tensor by tensor.

A tensor is read from disk, in blocks, when it is accessed, straight into its final type and device.
So loading needs little more memory than the weights themselves. Errors name the file and the fix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinkex.engine import model_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

#: Bytes of a tensor that are read at a time.
BLOCK = 4 * 2**20

#: Types of stored weights, by safetensors' names.
FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}

#: The first bytes of a git-lfs pointer file.
_POINTER = b"version https://git-lfs"

#: Buffers in old checkpoints that are now computed from the configuration.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

#: Suffixes of tensor names that only quantized checkpoints have.
_QUANTIZED_SUFFIXES = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_packed", ".absmax",
    ".SCB", ".quant_map",
)  # fmt: skip

#: Most names that an error lists.
_MOST_LISTED = 5


def check_no_pointers(directory: Path) -> None:
    """Check that git-lfs has fetched the files of a model.

    Raises:
        ValueError: With the name of a file that is still a pointer.
    """
    for pattern in ("*.safetensors", "*.json", "*.model"):
        for path in filter(Path.is_file, sorted(directory.glob(pattern))):
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise ValueError(
                        f"{str(path)!r} is a git-lfs pointer and not the file itself; run "
                        f"`git lfs pull` in {str(directory)!r}."
                    )


def check_not_quantized(name: str, quantization: Any) -> None:
    """Check config.json's "quantization_config" (None where there is none).

    Raises:
        ValueError: If the weights are quantized, naming the method.
    """
    if quantization is not None:
        if not isinstance(quantization, Mapping):
            quantization = quantization.to_dict()
        raise _quantized(name, str(quantization.get("quant_method", "an unknown method")))


def _quantized(name: str, method: str) -> ValueError:
    return ValueError(
        f"base model {name!r} is quantized ({method}); this server computes with weights in "
        "float32, float16 or bfloat16. Use the original model that it was quantized from, or save "
        "an unquantized copy with transformers: model.dequantize().save_pretrained(...)."
    )


@attrs.frozen
class _Place:
    """A tensor's place on disk: file, offset of its first byte, type and shape."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(MutableMapping[str, Tensor]):
    """The tensors of a model directory by name; each access reads from disk.

    Args:
        name: of the base model, for messages.
        directory: holds one or several *.safetensors files.
        dtype, device: of the tensors that are returned.

    Raises:
        ValueError: If a file is missing, truncated or no safetensors file, or if the weights are
            quantized.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._on_progress, self._done = on_progress, 0
        self._dtype = dtype
        self._device = device
        self._places: dict[str, _Place] = {}
        # One buffer for all accesses: a new one each time would fragment the heap.
        self._buffer = torch.empty(BLOCK, dtype=torch.uint8)
        for path in _weight_files(directory):
            self._add_file(name, path)
        self._total = sum(place.size for place in self._places.values())

    def _add_file(self, name: str, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                model_files.check_header(path, size)
                with safe_open(path, "pt"):  # checks the header, and that the file is whole
                    pass
                header = json.loads(file.read(size))
        except (OSError, ValueError, SafetensorError) as exc:
            raise ValueError(
                f"{str(path)!r} cannot be read ({exc}); it is truncated or not a safetensors file. "
                f"It has {path.stat().st_size} bytes; compare with the original and download it "
                "again."
            ) from exc
        header.pop("__metadata__", None)
        for key, entry in header.items():
            if key.endswith(_QUANTIZED_SUFFIXES) or entry["dtype"] not in FLOATS:
                raise _quantized(name, f"{path.name} holds {key!r} of type {entry['dtype']}")
            # A file of the decoder without a head omits the prefix of names.
            full = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
            offset = 8 + size + entry["data_offsets"][0]
            self._places[full] = _Place(path, offset, tuple(entry["shape"]), FLOATS[entry["dtype"]])

    def check(
        self, name: str, expected: Mapping[str, tuple[int, ...]], ignored: Collection[str] = ()
    ) -> None:
        """Check that the files hold exactly the tensors of the model.

        Args:
            expected: shapes by name.
            ignored: optional tensors, such as the head of a model with tied embeddings.

        Raises:
            ValueError: Naming what is missing, unexpected, or has a wrong shape.
        """
        for key in [key for key in self._places if key.endswith(_IGNORED_SUFFIXES)]:
            del self[key]
        missing = [key for key in expected if key not in self._places and key not in ignored]
        unexpected = [key for key in self._places if key not in expected and key not in ignored]
        wrong = [
            f"{key} {list(self._places[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in self._places and self._places[key].shape != tuple(shape)
        ]
        problems = [
            f"{label} {_listed(keys)}"
            for label, keys in (("lacks", missing), ("has unexpected", unexpected), ("has", wrong))
            if keys
        ]
        if problems:
            raise ValueError(
                f"base model {name!r} does not have the tensors that its config.json describes: it "
                f"{'; it '.join(problems)}. Give a directory written by save_pretrained() of the "
                "whole model (an adapter has to be merged first)."
            )

    def __getitem__(self, key: str) -> Tensor:
        place = self._places[key]
        out = torch.empty(place.shape, dtype=self._dtype, device=self._device)
        flat = out.view(-1)
        block = self._buffer.view(place.dtype)
        buffer = memoryview(self._buffer.numpy())
        with place.path.open("rb") as file:
            file.seek(place.offset)
            for start in range(0, len(flat), len(block)):
                count = min(len(block), len(flat) - start)
                wanted = count * place.dtype.itemsize
                if file.readinto(buffer[:wanted]) != wanted:
                    raise ValueError(f"{str(place.path)!r} became shorter while it was read.")
                flat[start : start + count].copy_(block[:count])
                self._done += wanted
                self._on_progress(self._done, self._total)
        return out

    def __setitem__(self, key: str, value: Tensor) -> None:
        raise TypeError("weights on disk are read only.")

    def __delitem__(self, key: str) -> None:
        del self._places[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:_MOST_LISTED])
    more = len(keys) - _MOST_LISTED
    return f"{shown} and {more} more" if more > 0 else shown


def is_complete(directory: Path) -> bool:
    """True if all files that hold weights exist; does not check their content."""
    try:
        return bool(_weight_files(directory))
    except ValueError:
        return False


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, as transformers chooses them."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(model_files.read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as exc:
            raise ValueError(f"{str(index)!r} cannot be read ({exc}); download it again.") from exc
        model_files.check_names(index, names)
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise ValueError(
                f"base model directory {str(directory)!r} lacks {_listed(missing)}, which {INDEX} "
                "lists; download the missing files."
            )
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    return sorted(path for path in directory.glob("*.safetensors") if path.is_file())
