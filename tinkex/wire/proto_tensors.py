"""Arrays as bytes, and the Tensor message, for the protobuf forms of requests and results.

Arrays are sent as little-endian bytes and read as views: without loops over their numbers, and
without copies unless the type is converted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from tinkex import types
from tinkex.wire.problems import Wrong, make_tensor
from tinkex.wire.proto_messages import ENUMS

R = TypeVar("R")

#: Part of the message table of every module that reads or writes tensors.
MESSAGES = """
Tensor
  1 bytes                       dense                   oneof:encoding
  2 SparseCsr                   sparse_csr              oneof:encoding
  3 DType                       dtype
  4 repeated int64              shape
SparseCsr
  1 bytes                       values
  2 bytes                       crow_indices
  3 bytes                       col_indices
"""

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
#: The numpy format of the numbers of each DType: little-endian on every machine.
LAYOUTS = {FLOAT32: "<f4", INT64: "<i8", INT32: "<i4", BFLOAT16: "<u2"}
DTYPES = {"float32": FLOAT32, "int64": INT64}


#: Arrays of at most this many bytes are copied, which is quicker than making a view.
SMALL = 1 << 13


def to_bytes(array: np.ndarray, layout: str) -> bytes:
    """A copy of the numbers in *layout*, such as "<f4"."""
    return array.astype(layout, copy=False).tobytes()


def from_bytes(data: bytes, dtype: int) -> np.ndarray:
    """The numbers in *data*; a read-only view unless the type is converted.

    bfloat16 becomes float32 and int32 becomes int64.
    """
    if dtype not in LAYOUTS:
        raise Wrong(
            f"is DType {dtype}, but must be one of {', '.join(ENUMS['DType'][1:])}.", "dtype"
        )
    layout = np.dtype(LAYOUTS[dtype])
    if len(data) % layout.itemsize:
        raise Wrong(f"holds {len(data)} bytes, which is not a multiple of {layout.itemsize}.")
    array = np.frombuffer(data, layout)
    if dtype == INT32:
        return array.astype(np.int64)
    if dtype == BFLOAT16:  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(layout.newbyteorder("="), copy=False)


def read_tokens(data: bytes) -> np.ndarray:
    """Token ids, (N,) int64."""
    return from_bytes(data, INT32)


def read_floats(data: bytes) -> np.ndarray:
    """(N,) float32; a read-only view."""
    return from_bytes(data, FLOAT32)


def at(place: str, read: Callable[..., R], *arguments: Any) -> R:
    """Call *read*; errors get *place* as their position."""
    try:
        return read(*arguments)
    except Wrong as wrong:
        wrong.inside(place)
        raise


class Body:
    """A message being written: its parts, and their length in bytes.

    protobuf copies an array three times to put it into a request; here it is copied once, when the
    parts are joined.
    """

    __slots__ = ("parts", "size")

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.size = 0

    def add(self, number: int, content: bytes | memoryview) -> None:
        """Field *number*, of bytes, a string in UTF-8 or a message that is written already."""
        size = len(content)
        head = _field_head(number, size)
        self.parts += (head, content)
        self.size += len(head) + size

    def add_message(self, number: int, message: Body) -> None:
        """Field *number*, of a message."""
        head = _field_head(number, message.size)
        self.parts.append(head)
        self.parts += message.parts
        self.size += len(head) + message.size

    def add_fields(self, fields: bytes) -> None:
        """Fields that are written already."""
        self.parts.append(fields)
        self.size += len(fields)


@functools.lru_cache(1 << 12)
def _field_head(number: int, size: int) -> bytes:
    """What comes before the *size* bytes of a field: most sizes of a batch come again and again."""
    return varint(number << 3 | 2) + varint(size)


def varint(value: int) -> bytes:
    """*value* in groups of seven bits, lowest first; the eighth bit marks that more follow."""
    if value < 0x80:
        return bytes((value,))
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)


def bytes_of(array: np.ndarray, layout: str) -> bytes | memoryview:
    """The bytes of *array* in *layout*; large arrays that already have it are not copied."""
    if array.nbytes <= SMALL:
        return to_bytes(array, layout)
    return np.ascontiguousarray(array, layout).reshape(-1).view(np.uint8).data


def write_tensor(tensor: types.TensorData) -> Body:
    """A Tensor message, dense or sparse like *tensor*."""
    dtype = DTYPES[tensor.dtype]
    values = bytes_of(tensor.values, LAYOUTS[dtype])
    body = Body()
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        sparse = Body()
        sparse.add(1, values)
        sparse.add(2, bytes_of(tensor.sparse_crow_indices, "<i8"))
        sparse.add(3, bytes_of(tensor.sparse_col_indices, "<i8"))
        body.add_message(2, sparse)
    else:
        body.add(1, values)
    body.add_fields(_dtype_and_shape(dtype, tuple(tensor.shape)))
    return body


@functools.lru_cache(1 << 10)
def _dtype_and_shape(dtype: int, shape: tuple[int, ...]) -> bytes:
    """Fields 3 and 4 of a Tensor, which are the same in most tensors of a batch."""
    lengths = b"".join(map(varint, shape))
    return varint(3 << 3) + varint(dtype) + _field_head(4, len(lengths)) + lengths


def read_tensor(message: Any) -> types.TensorData:
    """The inverse of `write_tensor`; views of the message's bytes."""
    shape = list(message.shape) or None
    if message.WhichOneof("encoding") != "sparse_csr":
        return make_tensor(from_bytes(message.dense, message.dtype), shape)
    sparse = message.sparse_csr
    return make_tensor(
        at("values", from_bytes, sparse.values, message.dtype),
        shape,
        at("crow_indices", from_bytes, sparse.crow_indices, INT64),
        at("col_indices", from_bytes, sparse.col_indices, INT64),
    )
