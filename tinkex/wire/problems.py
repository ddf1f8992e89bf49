"""Decoding errors: the value, the reason, and the path to its place.

Shared by the readers of both dialects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from tinkex.types import TensorData

T = TypeVar("T")

#: Most cells of a tensor in dense form: a few bytes of a sparse one could expand to terabytes.
MAX_DENSE_CELLS = 2**28
#: numpy supports 64; losses take one or two.
MAX_DIMENSIONS = 8


class DecodeError(ValueError):
    """Received data cannot be read: one sentence with the place, the value and what is expected."""


class Wrong(Exception):
    """A nested value that cannot be read; callers prepend to `place` until it is the whole path."""

    def __init__(self, sentence: str, place: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.place = place

    def inside(self, place: str) -> None:
        """Prepend *place*, the position in the enclosing value."""
        self.place = place + ("." if self.place[:1] not in ("", "[") else "") + self.place

    def about(self, what: str) -> DecodeError:
        """The error for the caller, who is reading a *what*."""
        return DecodeError(f"{what}{'.' if self.place else ''}{self.place} {self.sentence}")


def short(value: object) -> str:
    """*value* for an error message, of at most 60 characters."""
    if isinstance(value, (dict, list)) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(value: object, wanted: str) -> NoReturn:
    """Raise Wrong: *value* is not *wanted*."""
    raise Wrong(f"is {short(value)}, but must be {wanted}.")


def make(cls: Callable[..., T], values: dict[str, Any]) -> T:
    """An object of *cls*; raises Wrong if its own checks refuse the values."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as exc:
        raise Wrong(f"is invalid: {exc}") from exc


def make_tensor(
    data: np.ndarray,
    shape: Sequence[int] | None = None,
    sparse_crow_indices: np.ndarray | None = None,
    sparse_col_indices: np.ndarray | None = None,
) -> TensorData:
    """A tensor from received parts; raises Wrong if they are inconsistent or too large."""
    if shape is not None and len(shape) > MAX_DIMENSIONS:
        raise Wrong(f"has {len(shape)} dimensions, but at most {MAX_DIMENSIONS} are supported.")
    if shape is not None and math.prod(shape) > MAX_DENSE_CELLS:
        raise Wrong(
            f"has shape {short(list(shape))}, which is more than {MAX_DENSE_CELLS} numbers."
        )
    values = {
        "data": data,
        "shape": shape,
        "sparse_crow_indices": sparse_crow_indices,
        "sparse_col_indices": sparse_col_indices,
    }
    tensor: TensorData = make(TensorData, values)
    return tensor
