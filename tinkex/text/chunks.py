"""Encodes texts, each distinct piece once, and derives token weights from characters.

A tokenizer first splits a text at its control tokens, so the text between two of them always has
the same tokens. The renderings of one conversation, and many conversations' system prompts, share
most of their chunks. Does not know about messages or templates.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from tinkex.text.tokenizer import Encoding, Tokenizer

Ints = npt.NDArray[np.int64]
_NONE: Ints = np.zeros(0, np.int64)


class Chunk:
    """A piece of text as tokens.

    Attributes:
        ids: (T,) the tokens.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.ids: Ints = np.asarray(encoding.ids, np.int64)
        self._encoding = encoding

    def first_after(self, position: int) -> int:
        """The first token that covers the character at *position* or a later one."""
        return int((self._extents[1] <= position).sum()) if position else 0

    def last_before(self, position: int) -> int:
        """The token after the last one that covers a character before *position*."""
        return int((self._extents[0] < position).sum())

    @cached_property
    def _extents(self) -> tuple[Ints, Ints]:
        """
        The characters, start and end, that each token covers.

        Tokenizers trim white space off offsets; characters that no token covers belong to the next
        one.
        """
        offsets = np.asarray(self._encoding.offsets, np.int64).reshape(-1, 2)
        seen = np.maximum.accumulate(offsets[:, 1])
        starts = np.minimum(offsets[:, 0], np.concatenate([[0], seen])[:-1])
        # A token without characters keeps its position.
        return starts, np.maximum(offsets[:, 1], starts + 1)


class EncodedText:
    """A text as tokens, assembled from chunks.

    Attributes:
        ids: (T,) the tokens.
    """

    def __init__(self, chunks: Sequence[Chunk], lengths: Sequence[int]) -> None:
        self.ids: Ints = np.concatenate([chunk.ids for chunk in chunks]) if chunks else _NONE
        self._chunks = chunks
        self._begins = [0, *accumulate(lengths)]
        self._firsts = [0, *accumulate(len(chunk.ids) for chunk in chunks)]

    def tokens_of(self, start: int, stop: int) -> tuple[int, int]:
        """The tokens, start and end, that cover any of the characters *start* to *stop*."""
        total = len(self.ids)
        if start >= min(stop, self._begins[-1]):
            return total, total
        k = bisect_right(self._begins, start) - 1
        first = self._firsts[k] + self._chunks[k].first_after(start - self._begins[k])
        k = bisect_right(self._begins, stop) - 1
        last = self._firsts[k]
        if stop > self._begins[k]:
            last += self._chunks[k].last_before(stop - self._begins[k])
        return (first, last) if first < last else (total, total)


class ChunkEncoder:
    """Encodes many texts with one tokenizer of ours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """The same tokens as encoding each text as a whole, without added special tokens."""
        cut = [self._cut(text) for text in texts]
        unique = list(dict.fromkeys(piece for pieces in cut for piece in pieces))
        chunks = dict(zip(unique, map(Chunk, self._tokenizer.encode_batch(unique))))
        return [
            EncodedText([chunks[piece] for piece in pieces], [*map(len, pieces)]) for pieces in cut
        ]

    def _cut(self, text: str) -> list[str]:
        """*text* in pieces; each except the first begins with a control token."""
        if self._border is None:
            return [text]
        borders = [0, *(m.start() for m in self._border.finditer(text) if m.start()), len(text)]
        return [text[start:stop] for start, stop in pairwise(borders)]

    @cached_property
    def _border(self) -> re.Pattern[str] | None:
        """Matches control tokens; None if one of them depends on the text before it.

        Of several tokens at the same position, the tokenizer takes the longest.
        """
        found = self._tokenizer.first_cuts
        if not found:
            return None
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))))
