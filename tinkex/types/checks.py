"""Validators shared by the types: each error names the field, the value and the fix."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import numpy as np

__all__ = [
    "as_params",
    "check_metadata",
    "check_name",
    "check_recipients",
    "check_ttl",
]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")

#: The longest name of a checkpoint.
MAX_NAME_LENGTH = 200

Validator = Callable[[Any, Any, Any], None]

P = TypeVar("P")


def is_number(value: object) -> bool:
    """A finite real number that is not a bool."""
    numeric = isinstance(value, (int, float, np.integer, np.floating))
    return numeric and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def number(text: str, ok: Callable[[float], bool]) -> Validator:
    """A validator for finite numbers; *text* completes "must be ..."."""

    def check(instance: object, attribute: Any, value: Any) -> None:
        if not is_number(value):
            raise TypeError(f"{attribute.name} must be {text}, got {value!r}.")
        if not ok(value):
            raise ValueError(f"{attribute.name} must be {text}, got {value!r}.")

    return check


def integer(text: str, ok: Callable[[int], bool], *, optional: bool = False) -> Validator:
    """A validator for integers (and None if *optional*); *text* completes "must be ..."."""

    def check(instance: object, attribute: Any, value: Any) -> None:
        if optional and value is None:
            return
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{attribute.name} must be {text}, got {value!r}.")
        if not ok(int(value)):
            raise ValueError(f"{attribute.name} must be {text}, got {value!r}.")

    return check


def boolean(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{attribute.name} must be True or False, got {value!r}.")


def boolean_or_none(instance: object, attribute: Any, value: Any) -> None:
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{attribute.name} must be True, False or None, got {value!r}.")


def text(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{attribute.name} must be a str, got {value!r}.")
    if not value:
        raise ValueError(f"{attribute.name} must not be empty.")


def optional_text(instance: object, attribute: Any, value: Any) -> None:
    if value is not None:
        text(instance, attribute, value)


def dict_or_empty(value: dict[str, Any] | None) -> dict[str, Any]:
    return {} if value is None else dict(value)


def bool_or_false(value: Any) -> Any:
    return False if value is None else value


def as_params(cls: type[P], value: object, name: str, **fields: Any) -> P:
    """Parameters of a call as a *cls*.

    Args:
        cls: an attrs class, such as SamplingParams.
        value: a *cls*, a dict of its fields, or None (its defaults).
        name: of the argument, for error messages.
        fields: single fields that replace those of *value*; None is "not given".

    Raises:
        TypeError: If *value* is something else, or a dict has a key that is not a field.
        ValueError, TypeError: If a field's value is invalid.
    """
    fields = {key: given for key, given in fields.items() if given is not None}
    if isinstance(value, cls):
        return attrs.evolve(value, **fields) if fields else value  # type: ignore[misc]
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be types.{cls.__name__}(...) or a dict of its fields, got "
            f"{type(value).__name__}."
        )
    known = [field.name for field in attrs.fields(cls)]  # type: ignore[arg-type]
    for key in value or ():
        if key not in known:
            raise TypeError(
                f"{name} has no field {key!r}; {cls.__name__} takes {', '.join(known)}."
            )
    return cls(**{**(value or {}), **fields})


def check_name(name: object) -> str:
    """Check the name of a checkpoint: a name, not a path.

    Raises:
        TypeError, ValueError: If it is invalid, with the allowed characters.
    """
    if not isinstance(name, str):
        raise TypeError(f"a checkpoint name must be a str, got {name!r}.")
    if len(name) > MAX_NAME_LENGTH or not _NAME.match(name):
        raise ValueError(
            f"checkpoint name {name[:80]!r} is not usable: give 1 to {MAX_NAME_LENGTH} letters, "
            "digits, '.', '_' or '-', beginning with a letter, a digit or '_'; a name, not a path."
        )
    return name


def check_metadata(user_metadata: object) -> dict[str, Any] | None:
    """Check the user's metadata of a session, a model or a checkpoint: a dict of JSON values.

    Raises:
        TypeError, ValueError: If it is not.
    """
    if user_metadata is None:
        return None
    if not isinstance(user_metadata, dict) or not all(isinstance(k, str) for k in user_metadata):
        raise TypeError(f"user_metadata must be a dict with str keys, got {user_metadata!r}.")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(user_metadata, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(
            f"user_metadata cannot be sent as JSON ({exc}); keep to text, finite numbers, "
            "booleans, lists and dicts."
        ) from exc
    return copy


#: Most public keys for encryption.
MAX_RECIPIENTS = 10


def check_recipients(recipients: object) -> list[str] | None:
    """Check public keys of age (https://age-encryption.org) for encryption; None is no encryption.

    Raises:
        TypeError, ValueError: If one of them is not a public key, or there are too many.
    """
    if recipients is None:
        return None
    if isinstance(recipients, str) or not isinstance(recipients, Sequence):
        raise TypeError(f"age_encryption_recipients must be a list of str, got {recipients!r}.")
    if not 1 <= len(recipients) <= MAX_RECIPIENTS:
        raise ValueError(
            f"age_encryption_recipients must hold 1 to {MAX_RECIPIENTS} keys, got "
            f"{len(recipients)}."
        )
    for key in recipients:
        if not isinstance(key, str) or not key.startswith(("age1", "ssh-")):
            raise ValueError(
                f"age_encryption_recipients holds {key!r}, which is not a public key: one begins "
                "with 'age1', 'ssh-ed25519' or 'ssh-rsa'."
            )
    return list(recipients)


def check_ttl(ttl_seconds: object) -> int | None:
    """Seconds until a checkpoint expires; None is never.

    Raises:
        TypeError, ValueError: If it is not a positive whole number.
    """
    if ttl_seconds is None:
        return None
    if not isinstance(ttl_seconds, (int, np.integer)) or isinstance(ttl_seconds, bool):
        raise TypeError(f"ttl_seconds must be a positive integer or None, got {ttl_seconds!r}.")
    if not 0 < ttl_seconds <= 10 * 366 * 86400:
        raise ValueError(
            f"ttl_seconds must be a positive integer of at most ten years, got {ttl_seconds!r}; "
            "None keeps it forever."
        )
    return int(ttl_seconds)
