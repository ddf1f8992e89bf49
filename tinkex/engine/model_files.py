"""Checks the sizes that the files of a model declare, before memory or time is spent on them.

Model files are not trusted: a configuration may declare any number of layers, an index may point
outside the directory, and a header may declare more bytes than any disk holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Largest JSON file that is read: the index of the largest open model has 9 MB.
MOST_JSON = 32 * 2**20
#: Largest header of a safetensors file; the format allows 100 MB.
MOST_HEADER = 16 * 2**20
#: The largest value of each size in a configuration, well above those of any known model.
MOST = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**30,
}


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If it is larger than `MOST_JSON`, or no JSON; OSError: if it cannot be read.
    """
    size = path.stat().st_size
    if size > MOST_JSON:
        raise ValueError(f"{path.name} has {size:,} bytes; at most {MOST_JSON:,} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as exc:
        raise ValueError(f"{path.name} is nested too deeply") from exc


def check_config_file(name: str, path: Path) -> None:
    """Check the sizes in a config.json before transformers reads it.

    Raises:
        ValueError: Naming the file or the field.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as exc:
        raise ValueError(f"base model {name!r}: {str(path)!r} cannot be read ({exc}).") from exc
    if not isinstance(content, Mapping):
        raise ValueError(f"base model {name!r}: {str(path)!r} holds no JSON object.")
    check_sizes(name, content)


def check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Check that each size in a configuration is plausible.

    Raises:
        ValueError: Naming the field, its value and the bound.
    """
    for field, most in MOST.items():
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(
                f"base model {name!r} has {field} = {str(value)[:40]} in its configuration; it "
                f"must be an integer from 1 to {most}. Is the file damaged, or not that of a model?"
            )


def check_header(path: Path, size: int) -> None:
    """Check the length that a safetensors file gives for its header.

    Raises:
        ValueError: If it is beyond the end of the file, or larger than any known model needs.
    """
    if size > min(MOST_HEADER, path.stat().st_size - 8):
        raise ValueError(f"its header claims {size:,} bytes")


def check_names(index: Path, names: Iterable[object]) -> None:
    """Check that an index names files beside it.

    Raises:
        ValueError: With a name that leads elsewhere.
    """
    for name in names:
        if not isinstance(name, str) or name == ".." or Path(name).name != name or "\0" in name:
            raise ValueError(
                f"{str(index)!r} lists the file {str(name)[:200]!r}, which is not in the same "
                "directory; only files beside the index are read."
            )
