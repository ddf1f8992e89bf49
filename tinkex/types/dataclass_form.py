"""Lets the functions of the standard module `dataclasses` accept attrs objects.

In the official SDK, training data and samples are dataclasses, and scripts call
`dataclasses.replace(datum, ...)`. Fields have the names of the constructor's arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import attrs

C = TypeVar("C", bound=type)


def like_a_dataclass(cls: C) -> C:
    """Decorate an attrs class so that `dataclasses.replace`, `fields` and others accept it."""
    names = [str(field.alias) for field in attrs.fields(cls) if field.init]
    form: Any = dataclasses.make_dataclass(cls.__name__, [(name, Any) for name in names])
    for attribute in ("__dataclass_fields__", "__dataclass_params__"):
        setattr(cls, attribute, getattr(form, attribute))
    return cls
