"""What a model reads: token sequences and the training data made of them.

Arrays are numpy from here to the wire; a list is taken anywhere an array is. Does not know about
tokenizers (anything with an `encode` will do) or what a loss does with its inputs. Long, because
the messages of its checks name the value, the place and the fix.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal, Union

import attrs
import numpy as np
import numpy.typing as npt

from tinkex.types import checks, display
from tinkex.types.provenance import ProvenanceSpan, ProvenanceSpans, as_spans, check_cover

DType = Literal["int64", "float32"]
TensorDtype = DType
ArrayLike = Any  # list, tuple, numpy array, torch tensor, TensorData

#: Largest token id that travels (tokens are int32 on the wire).
MAX_TOKEN_ID = 2**31 - 1

#: The loss inputs that may be given as plain lists, with the dtype they travel in.
INPUT_DTYPES: dict[str, DType] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


def to_array(value: ArrayLike) -> np.ndarray:
    """*value* as a numpy array, without copying where that can be: lists, arrays, torch tensors."""
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
        raise ValueError(f"cannot make one array of {_short(value)}: {exc}") from exc


def _own(made: np.ndarray, array: np.ndarray, value: ArrayLike) -> np.ndarray:
    """*made* (from *array*, from *value*); a copy if the caller could still change its memory."""
    lent = isinstance(value, np.ndarray) or hasattr(value, "detach")
    if lent and array.flags.writeable and np.may_share_memory(made, array):
        made = made.copy()
    return made


def as_tokens(value: ArrayLike) -> npt.NDArray[np.int32]:
    """Token ids as a (N,) int32 array.

    Raises:
        TypeError: If they are not whole numbers.
        ValueError: If they are not one-dimensional, negative, or beyond int32.
    """
    if value is None or isinstance(value, (str, bytes, Mapping, Set)):
        raise TypeError(
            f"tokens must be token ids in order, got {_short(value)}; encode text with a tokenizer "
            "first."
        )
    array = to_array(value)
    if array.ndim != 1:
        raise ValueError(
            f"tokens must be one-dimensional, got {_short(value)} of shape {array.shape}; give one "
            "sequence at a time."
        )
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"tokens must be whole numbers, got {array.dtype} ({_short(value)}); encode text with "
            "a tokenizer first."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > MAX_TOKEN_ID:
        bad = low if low < 0 else high
        where = int(np.argmax(array == bad))
        raise ValueError(
            f"token id {bad} at position {where} is outside 0..{MAX_TOKEN_ID}; "
            "token ids are the tokenizer's, never negative."
        )
    return _own(np.ascontiguousarray(array, dtype=np.int32), array, value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


@attrs.frozen
class EncodedTextChunk:
    """A run of text, as token ids: (N,) int32."""

    tokens: npt.NDArray[np.int32] = attrs.field(
        converter=as_tokens, eq=attrs.cmp_using(eq=_same), hash=False
    )

    @property
    def length(self) -> int:
        """How many tokens it takes up."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"EncodedTextChunk({display.tokens(self.tokens)})"


def _check_bytes(instance: object, attribute: object, value: Any) -> None:
    if not isinstance(value, bytes):
        raise TypeError(
            f"image data must be the bytes of a PNG or JPEG file, got {type(value).__name__}; read "
            "the file first: Path(name).read_bytes()."
        )


_check_expected = checks.integer("an integer >= 0 or None", lambda n: n >= 0, optional=True)


def _check_format(instance: object, attribute: object, value: str) -> None:
    if value not in ("png", "jpeg"):
        raise ValueError(f'image format must be "png" or "jpeg", got {value!r}.')


def _expected_length(chunk: ImageChunk | ImageAssetPointerChunk, what: str) -> int:
    if chunk.expected_tokens is None:
        raise ValueError(f"expected_tokens is required to compute the length of an {what}.")
    return chunk.expected_tokens


@attrs.frozen
class ImageChunk:
    """An image in the prompt: the bytes of a PNG or JPEG file."""

    data: bytes = attrs.field(validator=_check_bytes, repr=False)
    format: str = attrs.field(validator=_check_format)
    expected_tokens: int | None = attrs.field(default=None, validator=_check_expected)

    @property
    def length(self) -> int:
        """How many tokens it takes up. ValueError if expected_tokens is not given."""
        return _expected_length(self, "image")


@attrs.frozen
class ImageAssetPointerChunk:
    """An image that the server already has."""

    location: str = attrs.field(validator=checks.text)
    format: str = attrs.field(validator=_check_format)
    expected_tokens: int | None = attrs.field(default=None, validator=_check_expected)

    @property
    def length(self) -> int:
        """How many tokens it takes up. ValueError if expected_tokens is not given."""
        return _expected_length(self, "image asset pointer")


Chunk = Union[EncodedTextChunk, ImageChunk, ImageAssetPointerChunk]
ModelInputChunk = Chunk


def _as_chunks(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    if not isinstance(chunks, Iterable):
        raise TypeError(
            f"a ModelInput is made of chunks, got {_short(chunks)}; for token ids use "
            "ModelInput.from_ints(tokens)."
        )
    chunks = tuple(chunks)
    for i, chunk in enumerate(chunks):
        if not isinstance(chunk, (EncodedTextChunk, ImageChunk, ImageAssetPointerChunk)):
            raise TypeError(
                f"chunk {i} of the ModelInput is a {type(chunk).__name__}; for token ids use "
                "ModelInput.from_ints(tokens)."
            )
    return chunks


@attrs.frozen
class ModelInput:
    """What the model reads, in chunks of text (and images, where the server takes them)."""

    chunks: tuple[Chunk, ...] = attrs.field(converter=_as_chunks)

    def __repr__(self) -> str:
        if len(self.chunks) == 1 and isinstance(self.chunks[0], EncodedTextChunk):
            return f"ModelInput({display.tokens(self.chunks[0].tokens)})"
        return display.lines(f"ModelInput of {len(self.chunks)} chunks", self.chunks, repr)

    @classmethod
    def from_ints(cls, tokens: ArrayLike) -> ModelInput:
        """One chunk of text: token ids as a list, a numpy array or a torch tensor."""
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def from_text(cls, text: str, tokenizer: Any) -> ModelInput:
        """*text* encoded by anything that has `encode(text)`: a tokenizer, or a client."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}.")
        if not hasattr(tokenizer, "encode"):
            raise TypeError(
                f"tokenizer must be something with encode(text), got {type(tokenizer).__name__}."
            )
        return cls.from_ints(tokenizer.encode(text))

    @classmethod
    def empty(cls) -> ModelInput:
        """No chunks yet; `append` gives new ones."""
        return cls(())

    def append(self, chunk: Chunk) -> ModelInput:
        """This input with *chunk* behind it."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """This input with one more token, in the last chunk if that is text."""
        if self.chunks and isinstance(self.chunks[-1], EncodedTextChunk):
            last = EncodedTextChunk(np.append(self.chunks[-1].tokens, token))
            return ModelInput((*self.chunks[:-1], last))
        return self.append(EncodedTextChunk([token]))

    @property
    def length(self) -> int:
        """How many tokens it takes up."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """All token ids, (N,) int32. ValueError if there is a chunk that is not text."""
        if len(self.chunks) == 1 and isinstance(self.chunks[0], EncodedTextChunk):
            return self.chunks[0].tokens
        parts = []
        for i, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(
                    f"chunk {i} is an {type(chunk).__name__}, which has no token ids; only "
                    "text can be used here, so omit it."
                )
            parts.append(chunk.tokens)
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def to_ints(self) -> list[int]:
        """All token ids as a list. ValueError if there is a chunk that is not text."""
        ints: list[int] = self.tokens.tolist()
        return ints


def _cast(array: np.ndarray, dtype: str | None, name: str) -> np.ndarray:
    """*array* as int64 or float32, whichever *dtype* says or its own kind asks for."""
    kind = array.dtype.kind
    if array.size == 0 and kind == "f" and dtype == "int64":  # np.asarray([]) is float64
        return array.astype(np.int64)
    if kind not in "iuf":
        raise TypeError(
            f"{name} must hold int or float numbers, got {array.dtype} ({_short(array)}); "
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
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is found later
        return np.ascontiguousarray(array, dtype=dtype)


def _as_shape(shape: Sequence[int], name: str) -> tuple[int, ...]:
    try:
        return tuple(operator.index(side) for side in shape)
    except TypeError as exc:
        raise TypeError(f"{name}: shape must be a list of whole numbers, got {shape!r}.") from exc


class TensorData:
    """An array that travels: float32 or int64, dense or (two-dimensional) sparse in CSR form.

    Args:
        data: the values; for a dense tensor in C order, or already in shape. An array that its
            giver could still change is copied.
        dtype: "int64" or "float32"; None takes it from the values.
        shape: of the (dense) tensor; None takes the shape of *data*.
        sparse_crow_indices, sparse_col_indices: CSR indices; *data* then holds the stored values
            only and *shape* is needed.

    Attributes:
        data: the stored values, one-dimensional.

    Raises:
        TypeError, ValueError: If values, dtype, shape and indices do not fit together.
    """

    __slots__ = ("data", "shape", "sparse_col_indices", "sparse_crow_indices")

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
        array = _own(_cast(lent, dtype, name), lent, data)
        self.data: np.ndarray = array.reshape(-1)
        self.shape: tuple[int, ...] = array.shape if shape is None else _as_shape(shape, name)
        self.sparse_crow_indices: np.ndarray | None = None
        self.sparse_col_indices: np.ndarray | None = None
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            self._set_sparse(sparse_crow_indices, sparse_col_indices, shape, name)
        elif min(self.shape, default=0) < 0 or math.prod(self.shape) != self.data.size:
            raise ValueError(
                f"{name}: {self.data.size} values do not fill shape {list(self.shape)}."
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
        fits = crow.shape == (self.shape[0] + 1,) and col.shape == self.data.shape
        # Sorted, without a difference that could wrap around: np.repeat trusts these numbers.
        rises = fits and bool((crow[:-1] <= crow[1:]).all())
        if not rises or crow[0] != 0 or crow[-1] != col.size:
            raise ValueError(
                f"{name}: {crow.size} row indices and {col.size} column indices do not describe "
                f"{self.data.size} values of shape {list(self.shape)}."
            )
        if col.size and (int(col.min()) < 0 or int(col.max()) >= self.shape[1]):
            raise ValueError(f"{name}: a column index is outside 0..{self.shape[1] - 1}.")
        self.sparse_crow_indices, self.sparse_col_indices = crow, col

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        """A dense tensor of any float or int array; it keeps its shape."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: Any) -> TensorData:
        """A dense tensor of a torch tensor; it keeps its shape."""
        return cls(tensor)

    @classmethod
    def from_dense(cls, array: ArrayLike, pad_value: float = 0) -> TensorData:
        """A (N, K) array in CSR form where that is smaller, leaving out *pad_value*."""
        dense = _cast(to_array(array), None, "tensor")
        if dense.ndim != 2:
            raise ValueError(f"from_dense takes a (N, K) array, got shape {dense.shape}.")
        kept = dense != pad_value
        if pad_value != 0 or dense.shape[0] + 1 + 2 * int(kept.sum()) >= dense.size:
            return cls(dense)
        crow = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        return cls(dense[kept], None, dense.shape, crow, np.nonzero(kept)[1])

    @property
    def dtype(self) -> DType:
        """ "int64" or "float32"."""
        return "float32" if self.data.dtype.kind == "f" else "int64"

    @property
    def is_sparse(self) -> bool:
        return self.sparse_crow_indices is not None

    def to_numpy(self) -> np.ndarray:
        """The array in its shape: a view where dense, a new zero-filled array where sparse."""
        if self.sparse_crow_indices is None:
            return self.data.reshape(self.shape)
        dense = np.zeros(self.shape, self.data.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self.data
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
        return self.data.nbytes + sum(i.nbytes for i in indices if i is not None)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.to_numpy(), dtype=dtype, copy=copy if copy else None)

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self.shape == other.shape and _same(self.to_numpy(), other.to_numpy())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sparse = ", sparse" if self.is_sparse else ""
        return f"TensorData({self.dtype}, shape={list(self.shape)}{sparse})"


def as_tensor(name: str, value: ArrayLike) -> TensorData:
    """A loss input as it travels; *name* says its dtype.

    Raises:
        ValueError: For a plain list under an unknown name, whose dtype is not defined.
        TypeError: If the numbers are of the wrong kind.
    """
    if isinstance(value, TensorData):
        return value
    if name not in INPUT_DTYPES and isinstance(value, (list, tuple)):
        raise ValueError(
            f"loss input {name!r} is a plain list, whose dtype is not known; wrap it in "
            f"TensorData or a numpy array. Plain lists go with {', '.join(sorted(INPUT_DTYPES))}."
        )
    return TensorData(value, INPUT_DTYPES.get(name), name=name)


def _as_inputs(inputs: Mapping[str, ArrayLike]) -> dict[str, TensorData]:
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"loss_fn_inputs must be a mapping of names to arrays, got {type(inputs).__name__}."
        )
    for name in inputs:
        if not isinstance(name, str):
            raise TypeError(f"loss_fn_inputs: names must be str, got {name!r}.")
    return {name: as_tensor(name, value) for name, value in inputs.items()}


def _check_model_input(instance: object, attribute: object, value: Any) -> None:
    if not isinstance(value, ModelInput):
        raise TypeError(
            f"model_input must be a ModelInput, got {type(value).__name__}; for token ids use "
            "ModelInput.from_ints(tokens)."
        )


@attrs.frozen
class Datum:
    """One training example: what the model reads, and what the loss needs at each position.

    Args:
        model_input: N tokens.
        loss_fn_inputs: arrays of length N (or (N, K)) by name, as the loss function asks for them
            (see `LOSS_FUNCTIONS`). Targets are already shifted: `target_tokens[t]` is the token to
            predict after `model_input[0..t]`.
        model_input_spans, loss_fn_input_spans: where the tokens came from; both or neither. See
            `with_provenance`.
    """

    model_input: ModelInput = attrs.field(validator=_check_model_input)
    loss_fn_inputs: dict[str, TensorData] = attrs.field(converter=_as_inputs, hash=False)
    model_input_spans: tuple[ProvenanceSpan, ...] | None = attrs.field(
        default=None, converter=as_spans
    )
    loss_fn_input_spans: tuple[ProvenanceSpan, ...] | None = attrs.field(
        default=None, converter=as_spans
    )

    def __attrs_post_init__(self) -> None:
        if (self.model_input_spans is None) != (self.loss_fn_input_spans is None):
            raise ValueError(
                "spans come in pairs: give model_input_spans and loss_fn_input_spans, or neither."
            )

    def with_provenance(
        self, model_input: ProvenanceSpans, loss_fn_inputs: ProvenanceSpans
    ) -> Datum:
        """A copy that says which samples its tokens came from.

        Args:
            model_input: spans of the input, in order; they cover its N tokens.
            loss_fn_inputs: the same of `loss_fn_inputs["target_tokens"]`.

        Raises:
            ValueError: If they cover fewer or more tokens.
        """
        check_cover("model_input", as_spans(model_input), self.model_input.length)
        targets = self.loss_fn_inputs.get("target_tokens")
        if targets is not None and len(targets.shape) == 1:
            check_cover('loss_fn_inputs["target_tokens"]', as_spans(loss_fn_inputs), len(targets))
        return attrs.evolve(self, model_input_spans=model_input, loss_fn_input_spans=loss_fn_inputs)

    def __repr__(self) -> str:
        names = ", ".join(f"{name} {list(t.shape)}" for name, t in self.loss_fn_inputs.items())
        return f"<Datum of {self.model_input!r}; {names}>"

    @classmethod
    def from_messages(
        cls, messages: Any, tokenizer: Any, tools: Any = None, train_on: str = "assistant"
    ) -> Datum:
        """Of a conversation, rendered with the tokenizer's chat template: see `tinkex.render`."""
        datum: Datum = _renderer().render(messages, tokenizer, tools, train_on).datum()
        return datum

    @classmethod
    def from_completion(cls, prompt: str, completion: str, tokenizer: Any) -> Datum:
        """Of a prompt and what follows it; the completion and the end of text count."""
        datum: Datum = _renderer().render_completion(prompt, completion, tokenizer).datum()
        return datum

    @classmethod
    def from_text(cls, text: str, tokenizer: Any) -> Datum:
        """Of plain text; all of it counts."""
        datum: Datum = _renderer().render_text(text, tokenizer).datum()
        return datum


def _renderer() -> Any:
    """`tinkex.text.renderer`, which builds on this module and is imported when it is used."""
    return importlib.import_module("tinkex.text.renderer")
