"""Model inputs: token sequences, and training data made of them.

Does not know about tokenizers (any object with `encode` works) or how losses use their inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Set
from functools import cached_property
from typing import Any, Union

import attrs
import numpy as np
import numpy.typing as npt

from tinkex.types import checks, display
from tinkex.types.dataclass_form import like_a_dataclass
from tinkex.types.provenance import ProvenanceSpan, ProvenanceSpans, as_spans, check_cover
from tinkex.types.tensors import ArrayLike, DType, TensorData, own, same, short, to_array

__all__ = [
    "Chunk",
    "Datum",
    "EncodedTextChunk",
    "ImageAssetPointerChunk",
    "ImageChunk",
    "ModelInput",
    "ModelInputChunk",
]

#: Largest token id (tokens are int32 on the wire).
MAX_TOKEN_ID = 2**31 - 1

#: The loss inputs that may be given as plain lists, with their dtype on the wire.
INPUT_DTYPES: dict[str, DType] = {
    "target_tokens": "int64",
    "weights": "float32",
    "advantages": "float32",
    "logprobs": "float32",
    "clip_low_threshold": "float32",
    "clip_high_threshold": "float32",
    "sequence_ratio_mask": "float32",
}


def as_tokens(value: ArrayLike) -> npt.NDArray[np.int32]:
    """Token ids as a (N,) int32 array.

    Raises:
        TypeError: If they are not integers.
        ValueError: If they are not one-dimensional, negative, or beyond int32.
    """
    if value is None or isinstance(value, (str, bytes, Mapping, Set)):
        raise TypeError(
            f"tokens must be token ids in order, got {short(value)}; encode text with a tokenizer "
            "first."
        )
    array = to_array(value)
    if array.ndim != 1:
        raise ValueError(
            f"tokens must be one-dimensional, got {short(value)} of shape {array.shape}; give one "
            "sequence at a time."
        )
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"tokens must be whole numbers, got {array.dtype} ({short(value)}); encode text with "
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
    return own(np.ascontiguousarray(array, dtype=np.int32), array, value)


@attrs.frozen
class EncodedTextChunk:
    """A chunk of text, as token ids.

    Attributes:
        tokens_np: (N,) int32.
        tokens: the same as a list, created at the first access.
    """

    tokens_np: npt.NDArray[np.int32] = attrs.field(
        alias="tokens", converter=as_tokens, eq=attrs.cmp_using(eq=same), hash=False
    )

    @cached_property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.tokens_np.tolist()
        return tokens

    @property
    def length(self) -> int:
        """How many tokens it takes up."""
        return len(self.tokens_np)

    def __repr__(self) -> str:
        return f"EncodedTextChunk({display.tokens(self.tokens_np)})"


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
    """A reference to an image that the server already has."""

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
            f"a ModelInput is made of chunks, got {short(chunks)}; for token ids use "
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
    """The input of a model, in chunks of text (and images, if the server supports them)."""

    chunks: tuple[Chunk, ...] = attrs.field(converter=_as_chunks)

    def __repr__(self) -> str:
        if len(self.chunks) == 1 and isinstance(self.chunks[0], EncodedTextChunk):
            return f"ModelInput({display.tokens(self.chunks[0].tokens_np)})"
        return display.lines(f"ModelInput of {len(self.chunks)} chunks", self.chunks, repr)

    @classmethod
    def from_ints(cls, tokens: ArrayLike) -> ModelInput:
        """One chunk of text: token ids as a list, a numpy array or a torch tensor."""
        return cls((EncodedTextChunk(tokens),))

    @classmethod
    def from_text(cls, text: str, tokenizer: Any) -> ModelInput:
        """*text* encoded by any object with `encode(text)`: a tokenizer, or a client."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}.")
        if not hasattr(tokenizer, "encode"):
            raise TypeError(
                f"tokenizer must be something with encode(text), got {type(tokenizer).__name__}."
            )
        return cls.from_ints(tokenizer.encode(text))

    @classmethod
    def empty(cls) -> ModelInput:
        """An input without chunks, to `append` to."""
        return cls(())

    def append(self, chunk: Chunk) -> ModelInput:
        """This input with *chunk* appended."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """This input with one more token, in the last chunk if it is text."""
        if self.chunks and isinstance(self.chunks[-1], EncodedTextChunk):
            last = EncodedTextChunk(np.append(self.chunks[-1].tokens_np, token))
            return ModelInput((*self.chunks[:-1], last))
        return self.append(EncodedTextChunk([token]))

    @property
    def length(self) -> int:
        """How many tokens it takes up."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """All token ids, (N,) int32. ValueError if a chunk is not text."""
        if len(self.chunks) == 1 and isinstance(self.chunks[0], EncodedTextChunk):
            return self.chunks[0].tokens_np
        parts = []
        for i, chunk in enumerate(self.chunks):
            if not isinstance(chunk, EncodedTextChunk):
                raise ValueError(
                    f"chunk {i} is an {type(chunk).__name__}, which has no token ids; only "
                    "text can be used here, so omit it."
                )
            parts.append(chunk.tokens_np)
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def to_ints(self) -> list[int]:
        """All token ids as a list. ValueError if a chunk is not text."""
        ints: list[int] = self.tokens.tolist()
        return ints


def as_tensor(name: str, value: ArrayLike) -> TensorData:
    """A loss input as a tensor; *name* determines its dtype.

    Raises:
        ValueError: For a plain list under an unknown name, whose dtype is not defined.
        TypeError: If the numbers have the wrong type.
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


@like_a_dataclass
@attrs.frozen
class Datum:
    """One training example: the model input, and the loss inputs at each position.

    Args:
        model_input: N tokens.
        loss_fn_inputs: arrays of length N (or (N, K)) by name, as required by the loss function
            (see `LOSS_FUNCTIONS`). Targets are already shifted: `target_tokens[t]` is the token to
            predict after `model_input[0..t]`.
        model_input_spans, loss_fn_input_spans: the source of the tokens; both or neither. See
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
        """A copy with the samples that its tokens came from.

        Args:
            model_input: spans of the input, in order; they cover its N tokens.
            loss_fn_inputs: the same for `loss_fn_inputs["target_tokens"]`.

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
        """A datum of a conversation, rendered with the chat template: see `tinkex.render`."""
        datum: Datum = _renderer().render(messages, tokenizer, tools, train_on).datum()
        return datum

    @classmethod
    def from_completion(cls, prompt: str, completion: str, tokenizer: Any) -> Datum:
        """A datum of a prompt and a completion, which is trained on with the end of text."""
        datum: Datum = _renderer().render_completion(prompt, completion, tokenizer).datum()
        return datum

    @classmethod
    def from_text(cls, text: str, tokenizer: Any) -> Datum:
        """A datum of plain text; all of it is trained on."""
        datum: Datum = _renderer().render_text(text, tokenizer).datum()
        return datum


def _renderer() -> Any:
    """`tinkex.text.renderer`, which imports this module and is therefore imported late."""
    return importlib.import_module("tinkex.text.renderer")
