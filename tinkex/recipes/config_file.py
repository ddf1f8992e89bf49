"""Configuration files of a run: JSON, TOML or YAML in, YAML out.

Files are written with one `key: value` a line, each value as JSON. This is valid YAML, and is read
here without PyYAML. Other YAML needs PyYAML (the extra `yaml`). Does not know what settings mean.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import date as Date
from pathlib import Path
from typing import Any

from tinkex import errors

#: A key and a value on one line, without YAML's other forms.
_LINE = re.compile(r"^([A-Za-z_][\w-]*):(?:[ \t]+(.*))?$")
#: An unquoted value that is the same text in YAML.
_PLAIN = re.compile(r"^[\w./~+-][\w ./~+:,=()-]*$")
#: A number that YAML 1.1, and so PyYAML, reads as text: it requires a dot before the exponent.
_EXPONENT = re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$")


def read(path: Path) -> dict[str, Any]:
    """
    The keys and values of a configuration file; dashes in keys become underscores.

    Raises:
        ValueError: If the file cannot be parsed.
        MissingExtraError: If it is YAML that needs PyYAML, which is not installed.
        OSError: If it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        value = _toml(path, text)
    elif text.lstrip().startswith("{"):
        value = _json(path, text)
    else:
        value = _lines(text)
        if value is None:
            value = _yaml(path, text)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold keys and values, got a {type(value).__name__}.")
    return {str(key).replace("-", "_"): item for key, item in value.items()}


def text(values: Mapping[str, Any]) -> str:
    """*values* as YAML, one line each; those that are None are omitted."""
    return "".join(
        f"{key}: {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None
    )


def check_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ValueError, with the closest known key, if *given* has an unknown one."""
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise ValueError(f"{where}: there is no setting {key}; {hint}")


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as exc:
        raise ValueError(f"{path} is not JSON: {exc}") from exc


def _toml(path: Path, text: str) -> Any:
    try:
        import tomllib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as exc:  # Python 3.10
        raise ValueError(f"{path}: TOML needs Python 3.11; write YAML or JSON.") from exc
    try:
        return _without_dates(tomllib.loads(text))
    except tomllib.TOMLDecodeError as exc:
        raise ValueError(f"{path} is not TOML: {exc}") from exc


def _lines(text: str) -> dict[str, Any] | None:
    """The values of a file of `key: value` lines, or None if it has other lines."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None or match[1] in found:
            return None
        try:
            found[match[1]] = _value(match[2] or "null")
        except ValueError:
            return None
    return found


def _value(text: str) -> Any:
    """A value in JSON, or plain text without quotes. ValueError if it needs YAML."""
    try:
        return json.loads(text)
    except ValueError:
        plain = text.partition(" #")[0].strip()
        if plain != text.strip():
            return _value(plain)
        if _PLAIN.match(plain) is None or ": " in plain:
            raise
        return plain


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as exc:
        raise errors.MissingExtraError(
            f"{path} is YAML with more than `key: value` lines; reading it needs PyYAML, which is "
            "not installed: pip install 'tinkex[yaml]'."
        ) from exc
    try:
        return _without_dates(yaml.safe_load(text))
    except yaml.YAMLError as exc:
        raise ValueError(f"{path} is not YAML: {exc}") from exc


def _without_dates(value: Any) -> Any:
    """Dates as text, and text like 1e-4 as a number."""
    if isinstance(value, dict):
        return {key: _without_dates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_dates(item) for item in value]
    if isinstance(value, str) and _EXPONENT.match(value):
        return float(value)
    return value.isoformat() if isinstance(value, Date) else value
