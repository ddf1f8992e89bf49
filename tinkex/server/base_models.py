"""Names of base models: what `--base-model` maps to directories, and variants of a model.

Qwen/Qwen3-8B                a model by its name
Qwen/Qwen3-8B:peft:32768     the same with a context of 32,768 tokens (official notation)
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tinkex.engine import tiny
from tinkex.text import gguf, registry

_VARIANT = re.compile(r"(.+):peft:([0-9]{1,9})\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?\Z")


def parse(options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names in *options* (MODEL or NAME=DIRECTORY), and the directory of each mapped name.

    Raises:
        ValueError: If a name is given twice or not valid, or its directory does not exist.
    """
    names: list[str] = []
    directories: dict[str, str] = {}
    for option in options:
        name, separator, directory = option.partition("=")
        is_mapped = bool(separator) and not os.path.exists(option)
        name = name if is_mapped else option
        if name in directories or (is_mapped and name in names):
            raise ValueError(
                f"--base-model gives the name {name!r} twice; give each model its own name."
            )
        if is_mapped:
            directories[name] = _checked(name, directory)
        names.append(name)
    return names, directories


def _checked(name: str, directory: str) -> str:
    if not _NAME.match(name):
        raise ValueError(
            f"--base-model {name!r}={directory!r}: the name must be like org/model: letters, "
            "digits, '.', '_' and '-', with at most one slash."
        )
    if name == tiny.NAME or name in registry.KNOWN:
        raise ValueError(f"--base-model: {name!r} is the name of a known model; choose another.")
    path = Path(directory).expanduser()
    if not path.is_dir() and not gguf.is_gguf(directory):
        raise ValueError(
            f"--base-model {name}={directory}: {directory!r} is neither a directory nor a GGUF "
            "file; give the folder with config.json and the weights."
        )
    return str(path.resolve())


def split_variant(base_model: str) -> tuple[str, int | None]:
    """The name of the model itself, and the variant's context, or None."""
    match = _VARIANT.match(base_model)
    return (match.group(1), int(match.group(2))) if match else (base_model, None)
