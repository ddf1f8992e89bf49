"""What is wrong with something that came: the error, and the way to its place.

Shared by the readers of both dialects; knows neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np

from tinkex.types import TensorData

T = TypeVar("T")

#: Most cells of a tensor's dense form; a few bytes of a sparse one could stand for terabytes.
MAX_DENSE_CELLS = 2**28
#: numpy has room for 64; losses take one or two.
MAX_DIMENSIONS = 8


class DecodeError(ValueError):
    """What came cannot be read: one sentence with the place, the value and what is wanted."""


class Wrong(Exception):
    """A value that cannot be read, below the top; `place` grows on the way up to the whole path."""

    def __init__(self, sentence: str, place: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.place = place

    def inside(self, place: str) -> None:
        """Note that the value was found at *place* of something larger."""
        self.place = place + ("." if self.place[:1] not in ("", "[") else "") + self.place

    def about(self, what: str) -> DecodeError:
        """The error for the one who asked to have a *what* read."""
        return DecodeError(f"{what}{'.' if self.place else ''}{self.place} {self.sentence}")


def short(value: object) -> str:
    """*value* for an error message, of at most 60 characters."""
    if isinstance(value, (dict, list)) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(value: object, wanted: str) -> NoReturn:
    raise Wrong(f"is {short(value)}, but must be {wanted}.")


def make(cls: Callable[..., T], values: dict[str, Any]) -> T:
    """An object of *cls*, whose own checks may still refuse the values."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as exc:
        raise Wrong(f"is not usable: {exc}") from exc


def make_tensor(
    data: np.ndarray,
    shape: Sequence[int] | None = None,
    sparse_crow_indices: np.ndarray | None = None,
    sparse_col_indices: np.ndarray | None = None,
) -> TensorData:
    """A tensor of parts that came from afar, of a size within reason."""
    if shape is not None and len(shape) > MAX_DIMENSIONS:
        raise Wrong(f"has {len(shape)} dimensions, but at most {MAX_DIMENSIONS} are possible.")
    if shape is not None and math.prod(shape) > MAX_DENSE_CELLS:
        raise Wrong(f"has shape {short(list(shape))}, more than {MAX_DENSE_CELLS} numbers.")
    values = {
        "data": data,
        "shape": shape,
        "sparse_crow_indices": sparse_crow_indices,
        "sparse_col_indices": sparse_col_indices,
    }
    tensor: TensorData = make(TensorData, values)
    return tensor
