"""Tensors of loss inputs and outputs, and the accepted array types.

Arrays are numpy up to the wire; lists and torch tensors are accepted wherever arrays are, without
importing torch. Does not know which inputs a loss takes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

__all__ = [
    "TensorData",
    "TensorDtype",
]

DType = Literal["int64", "float32"]
TensorDtype = DType
ArrayLike = Any  # list, tuple, numpy array, torch tensor, TensorData


def to_array(value: ArrayLike) -> np.ndarray:
    """*value* (list, array or torch tensor) as a numpy array, if possible without a copy."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):  # a torch tensor; torch itself is not imported for it
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        array: np.ndarray = value.numpy()
        return array
    try:
        return np.asarray(value)
    except ValueError as exc:
        raise ValueError(f"cannot make one array of {short(value)}: {exc}") from exc


def own(made: np.ndarray, array: np.ndarray, value: ArrayLike) -> np.ndarray:
    """*made* (from *array*, from *value*); a copy if the caller could still change the memory."""
    lent = isinstance(value, np.ndarray) or hasattr(value, "detach")
    if lent and array.flags.writeable and np.may_share_memory(made, array):
        made = made.copy()
    return made


def short(value: object) -> str:
    """The repr of *value* for a message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """True if type, shape and values are equal; NaN equals NaN."""
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _cast(array: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """*array* as int64 or float32, by *dtype* or else by its own kind."""
    kind = array.dtype.kind
    if array.size == 0 and kind == "f" and dtype == "int64":  # np.asarray([]) is float64
        return array.astype(np.int64)
    if kind not in "iuf":
        raise TypeError(
            f"{name} must hold int or float numbers, got {array.dtype} ({short(array)}); "
            "convert it to int64 or float32 first."
        )
    if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
        raise ValueError(f"{name} holds {int(array.max())}, which does not fit into int64.")
    if dtype is None:
        dtype = "float32" if kind == "f" else "int64"
    if dtype not in ("int64", "float32"):
        raise ValueError(f'{name}: dtype must be "int64" or "float32", got {dtype!r}.')
    if dtype == "int64" and kind == "f":
        raise TypeError(f"{name} must hold whole numbers, got {array.dtype}.")
    with np.errstate(over="ignore"):  # too large values become infinite, which is checked later
        return np.ascontiguousarray(array, dtype=dtype)


def _as_shape(shape: Sequence[int], name: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(side) for side in shape)
    except TypeError as exc:
        raise TypeError(f"{name}: shape must be a list of whole numbers, got {shape!r}.") from exc


class TensorData:
    """A tensor on the wire: float32 or int64, dense or (two-dimensional) sparse in CSR form.

    Args:
        data: the values; for a dense tensor in C order, or already in shape. An array that the
            caller could still change is copied.
        dtype: "int64" or "float32"; None derives it from the values.
        shape: of the (dense) tensor; None is the shape of *data*.
        sparse_crow_indices, sparse_col_indices: CSR indices; *data* then holds only the stored
            values, and *shape* is required.

    Attributes:
        values: the stored values, a one-dimensional array. `data` returns them as a list.

    Raises:
        TypeError, ValueError: If values, dtype, shape and indices are inconsistent.
    """

    __slots__ = ("shape", "sparse_col_indices", "sparse_crow_indices", "values")

    def __init__(
        self,
        data: ArrayLike,
        dtype: str | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: ArrayLike | None = None,
        sparse_col_indices: ArrayLike | None = None,
        *,
        name: str = "tensor",
    ) -> None:
        lent = to_array(data)
        array = own(_cast(lent, dtype, name), lent, data)
        self.values: np.ndarray = array.reshape(-1)
        self.shape: tuple[int, ...] = array.shape if shape is None else _as_shape(shape, name)
        self.sparse_crow_indices: np.ndarray | None = None
        self.sparse_col_indices: np.ndarray | None = None
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            self._set_sparse(sparse_crow_indices, sparse_col_indices, shape, name)
        elif min(self.shape, default=0) < 0 or math.prod(self.shape) != self.values.size:
            raise ValueError(
                f"{name}: {self.values.size} values do not fill shape {list(self.shape)}."
            )

    def _set_sparse(
        self, crow: ArrayLike, col: ArrayLike, shape: Sequence[int] | None, name: str
    ) -> None:
        if crow is None or col is None or shape is None or len(shape) != 2 or min(shape) < 0:
            raise ValueError(
                f"{name}: a sparse tensor needs sparse_crow_indices, sparse_col_indices and a "
                "two-dimensional shape."
            )
        crow = _cast(to_array(crow), "int64", f"{name}.sparse_crow_indices")
        col = _cast(to_array(col), "int64", f"{name}.sparse_col_indices")
        fits = crow.shape == (self.shape[0] + 1,) and col.shape == self.values.shape
        # Checks the order without differences, which could overflow: np.repeat relies on these
        # numbers.
        rises = fits and bool((crow[:-1] <= crow[1:]).all())
        if not rises or crow[0] != 0 or crow[-1] != col.size:
            raise ValueError(
                f"{name}: {crow.size} row indices and {col.size} column indices do not describe "
                f"{self.values.size} values of shape {list(self.shape)}."
            )
        if col.size and (int(col.min()) < 0 or int(col.max()) >= self.shape[1]):
            raise ValueError(f"{name}: a column index is outside 0..{self.shape[1] - 1}.")
        self.sparse_crow_indices, self.sparse_col_indices = crow, col

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """A dense tensor of any float or int array, in the same shape."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: Any) -> TensorData:
        """A dense tensor of a torch tensor, in the same shape."""
        return cls(tensor)

    @classmethod
    def from_dense(cls, array: ArrayLike, pad_value: float = 0) -> TensorData:
        """A (N, K) array in CSR form if that is smaller, without the *pad_value* cells."""
        dense = _cast(to_array(array), None, "tensor")
        if dense.ndim != 2:
            raise ValueError(f"from_dense takes a (N, K) array, got shape {dense.shape}.")
        kept = dense != pad_value
        if pad_value != 0 or dense.shape[0] + 1 + 2 * int(kept.sum()) >= dense.size:
            return cls(dense)
        crow = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        return cls(dense[kept], None, dense.shape, crow, np.nonzero(kept)[1])

    @property
    def data(self) -> list[Any]:
        """The stored values as a list of Python numbers, as in the official SDK. A new list each
        time; `values` and `to_numpy()` are faster."""
        found: list[Any] = self.values.tolist()
        return found

    @property
    def dtype(self) -> DType:
        """ "int64" or "float32"."""
        return "float32" if self.values.dtype.kind == "f" else "int64"

    @property
    def is_sparse(self) -> bool:
        return self.sparse_crow_indices is not None

    def to_numpy(self) -> np.ndarray:
        """The array in its shape: a view if dense, a new zero-filled array if sparse."""
        if self.sparse_crow_indices is None:
            return self.values.reshape(self.shape)
        dense = np.zeros(self.shape, self.values.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self.values
        return dense

    def to_torch(self) -> Any:
        """The array as a new torch tensor (torch must be installed)."""
        import torch  # only here: the SDK works without it

        return torch.from_numpy(self.to_numpy().copy())

    def tolist(self) -> list[Any]:
        values: list[Any] = self.to_numpy().tolist()
        return values

    @property
    def nbytes(self) -> int:
        """Bytes of values and indices."""
        indices = (self.sparse_crow_indices, self.sparse_col_indices)
        return self.values.nbytes + sum(i.nbytes for i in indices if i is not None)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.to_numpy(), dtype=dtype, copy=copy if copy else None)

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.shape == other.shape and same(self.to_numpy(), other.to_numpy())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sparse = ", sparse" if self.is_sparse else ""
        return f"TensorData({self.dtype}, shape={list(self.shape)}{sparse})"
