"""GGUF files: header, positions of tensors, tokenizer and chat template.

GGUF is llama.cpp's format: one file with metadata, tokenizer and (quantized) weights. The header is
read with `struct` because a tokenizer has 100,000 strings, which take the `gguf` package seconds.
Does not read weights.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

SUFFIX = ".gguf"

#: A tokenizers.Tokenizer; the library is imported only when needed, because that takes 20 ms.
Tokenizer = Any

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
#: Most elements of a list in the header; the largest vocabularies have 300,000 entries.
_MOST_ELEMENTS = 2**24
_STRING, _ARRAY = 8, 9

#: struct's letter for each scalar type of the format.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

#: Kinds of tokens (tokenizer.ggml.token_type).
_CONTROL, _USER_DEFINED = 3, 4

#: Word patterns of GPT-2's successors, by llama.cpp's names.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "tekken": _TEKKEN,
}
#: GPT-2's pattern: unchanged, or with single digits.
_GPT_2 = ("gpt-2", "default")
_DIGITS = ("smollm", "starcoder", "refact", "command-r")
#: Our name for the built-in model's tokenizer, which does not split words.
_BYTES = "tinkex-bytes"
#: A text that each pattern splits differently.
_PROBE = "I'll  pay 12345 EUR, it's DON'T!\n\n  HelloWorld /// café\t x_1\r\n ...?/\n"
#: Patterns with which whole words of the vocabulary are used without merging.
_IGNORE_MERGES = ("llama-bpe", "llama3", "tekken")
#: Patterns with which every text begins with the begin-of-text token unless the file disables it.
_ADD_BOS = ("llama-bpe", "llama3", "tekken")


class GgufError(ValueError):
    """The file cannot be used; the message names the file, the reason and the fix."""


@attrs.frozen
class TensorInfo:
    """A tensor's position in the file.

    Attributes:
        shape: rows first, as in numpy (GGUF stores the reverse).
        kind: number of the element type in ggml.
        offset: from the beginning of the file, in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@attrs.frozen(eq=False)
class Gguf:
    """The header of a GGUF file."""

    path: Path
    metadata: Mapping[str, Any] = attrs.field(repr=False)
    tensors: Mapping[str, TensorInfo] = attrs.field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def error(self, reason: str) -> GgufError:
        return GgufError(f"{str(self.path)!r} cannot be used: {reason}")


def is_gguf(name: str) -> bool:
    """True if *name* is the path of a file that ends in .gguf."""
    return name.lower().endswith(SUFFIX) and Path(name).expanduser().is_file()


def read(path: Path) -> Gguf:
    """
    The header of the file at *path*.

    Raises:
        GgufError: If it is no GGUF file, of an unknown version, or truncated.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        beginning = file.read(4)
        if beginning != _MAGIC:
            hint = "it is a git-lfs pointer; run `git lfs pull`" if beginning == b"vers" else (
                f"it begins with {beginning!r} instead of {_MAGIC!r}; give a file in llama.cpp's "
                "GGUF format"
            )  # fmt: skip
            raise GgufError(f"{str(path)!r} is not a GGUF file: {hint}.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Header(path, data).read()
            except (struct.error, OverflowError, MemoryError) as exc:
                raise GgufError(
                    f"{str(path)!r} is truncated: the header is not complete after "
                    f"{len(data):,} bytes; download it again."
                ) from exc
            except (UnicodeDecodeError, KeyError, RecursionError) as exc:
                raise GgufError(f"{str(path)!r} is damaged ({exc!r}); download it again.") from exc


class _Header:
    """Reads a header sequentially."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 4

    def read(self) -> Gguf:
        version = self._one("I")
        if version not in _VERSIONS:
            raise GgufError(
                f"{str(self._path)!r} has GGUF version {version}; versions 2 and 3 (little-endian) "
                "can be read. Convert it again with a current llama.cpp."
            )
        tensors, entries = self._one("Q"), self._one("Q")
        metadata = {}
        for _ in range(entries):
            key = self._string()
            metadata[key] = self._value(self._one("I"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32)) or 32
        begin = -(-self._at // alignment) * alignment
        infos = {info.name: attrs.evolve(info, offset=begin + info.offset) for info in found}
        return Gguf(self._path, metadata, infos)

    def _one(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self._data, self._at)
        self._at += struct.calcsize(f"<{letter}")
        return value

    def _string(self) -> str:
        length = self._one("Q")
        if length > len(self._data) - self._at:
            raise struct.error("string beyond the end")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._one(_SCALARS[kind])
        element, count = self._one("I"), self._one("Q")
        if count > _MOST_ELEMENTS:
            raise GgufError(
                f"{str(self._path)!r} has a list of {count} elements in its header; at most "
                f"{_MOST_ELEMENTS} are read. The file is damaged."
            )
        if element in _SCALARS:
            letters = f"<{count}{_SCALARS[element]}"
            values = struct.unpack_from(letters, self._data, self._at)
            self._at += struct.calcsize(letters)
            return list(values)
        return [self._value(element) for _ in range(count)]

    def _tensor(self) -> TensorInfo:
        name = self._string()
        shape = tuple(self._one("Q") for _ in range(self._one("I")))[::-1]
        return TensorInfo(name, shape, self._one("I"), self._one("Q"))


# The tokenizer


def settings(file: Gguf) -> dict[str, Any]:
    """The tokenizer's settings, in the form of Hugging Face's tokenizer_config.json."""
    tokens = _tokens(file)
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, name in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("pad_token", "padding"),
    ):
        number = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= number < len(tokens):
            found[key] = tokens[number]
    template = file.metadata.get("tokenizer.chat_template")
    if template:
        found["chat_template"] = template
    context = file.metadata.get(f"{file.architecture}.context_length")
    if context:
        found["model_max_length"] = context
    return found


def build_tokenizer(file: Gguf) -> Tokenizer:
    """
    The tokenizer in the file.

    Raises:
        GgufError: If there is none, or its kind is not supported.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(file)
    elif kind == "llama":
        tokenizer = _sentence_piece(file)
    else:
        raise file.error(
            f"its tokenizer is of kind {kind!r} (tokenizer.ggml.model); supported are 'gpt2' "
            "and 'llama'. Use the model's Hugging Face directory instead."
        )
    _add_special(tokenizer, file)
    return tokenizer


def _tokens(file: Gguf) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise file.error("it has no tokenizer (tokenizer.ggml.tokens); convert the model again.")
    return tokens


def _byte_level(file: Gguf) -> Tokenizer:
    """GPT-2's kind: byte pair encoding of bytes, with words split by a pattern."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if name not in (*_GPT_2, *_DIGITS, *_PATTERNS, _BYTES):
        known = ", ".join([*_GPT_2, *_DIGITS, *_PATTERNS])
        raise file.error(
            f"its tokenizer splits words as {name!r} (tokenizer.ggml.pre); supported are {known}. "
            "Use the model's Hugging Face directory instead."
        )
    vocabulary = {token: i for i, token in enumerate(_tokens(file))}
    merges = [
        tuple(merge.split(" ", 1)) for merge in file.metadata.get("tokenizer.ggml.merges", [])
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=name in _IGNORE_MERGES)
    )
    if _PATTERNS.get(name) == _QWEN_2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter(name)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def splitter(name: str) -> Any:
    """The byte-level BPE pre-tokenizer with llama.cpp's name *name*."""
    from tokenizers import Regex, pre_tokenizers

    if name in _GPT_2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name == _BYTES:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(_PATTERNS[name]), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def pattern_of(tokenizer: Tokenizer) -> str:
    """
    llama.cpp's name for a byte-level tokenizer's word pattern, detected by splitting a probe text.

    Raises:
        ValueError: If no known pattern splits like it.
    """
    actual = tokenizer.pre_tokenizer.pre_tokenize_str(_PROBE)
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", _BYTES):
        if splitter(name).pre_tokenize_str(_PROBE) == actual:
            return name
    raise ValueError(
        "the tokenizer splits words in a way that GGUF has no known name for; it can be exported "
        "as a Hugging Face directory instead."
    )


def _sentence_piece(file: Gguf) -> Tokenizer:
    """SentencePiece's kind: byte pair encoding of characters, with bytes for unknown ones."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    tokens, scores = _tokens(file), file.metadata["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # The file has no merges: any two tokens may merge into a token, best score first.
    found = []
    for token, score in zip(tokens, scores):
        parts = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        parts.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(pair, score) for pair in parts]
    found.sort(key=lambda item: (item[1], len(item[0][0]), len(item[0][1])), reverse=True)
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(
        vocabulary,
        [pair for pair, _ in found],
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    space = normalizers.Replace(" ", "▁")
    begins_with_space = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    first = [normalizers.Prepend("▁")] if begins_with_space else []
    tokenizer.normalizer = normalizers.Sequence([*first, space])
    last = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer


def _add_special(tokenizer: Tokenizer, file: Gguf) -> None:
    """Add control tokens, at which text is split, and the tokens that begin and end every text."""
    from tokenizers import AddedToken, processors

    tokens = _tokens(file)
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds):
        if kind in (_CONTROL, _USER_DEFINED):
            is_special = kind == _CONTROL
            added = AddedToken(token, special=is_special, normalized=False)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
    is_sentence_piece = file.metadata["tokenizer.ggml.model"] == "llama"
    adds_bos = is_sentence_piece or file.metadata.get("tokenizer.ggml.pre") in _ADD_BOS
    adds_bos = file.metadata.get("tokenizer.ggml.add_bos_token", adds_bos)
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    eos = file.metadata.get("tokenizer.ggml.eos_token_id")
    around: dict[str, int] = {}
    pieces = ["$A"]
    if adds_bos and bos is not None:
        pieces.insert(0, tokens[bos])
        around[tokens[bos]] = bos
    if file.metadata.get("tokenizer.ggml.add_eos_token", False) and eos is not None:
        pieces.append(tokens[eos])
        around[tokens[eos]] = eos
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(pieces), special_tokens=list(around.items())
        )
