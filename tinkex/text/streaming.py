"""Decodes tokens as they arrive, in whole characters, and applies stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

#: The character that decoders write for incomplete bytes.
HALF = "\ufffd"


class TokenText:
    """
    Turns tokens into pieces of text; concatenated, they are the text of all tokens.

    A token may hold part of a character, and its text may depend on its neighbour (a leading space,
    in SentencePiece). So every piece is the difference of two decodings that begin some tokens
    earlier.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._begin = 0  # decoding begins here
        self._given = 0  # the text of the tokens before this one has been returned

    def push(self, token: int) -> str:
        """The text that *token* completes; "" while a character is incomplete."""
        self._tokens.append(token)
        return self._piece(final=False)

    def finish(self) -> str:
        """The text that is still held back."""
        return self._piece(final=True)

    def _piece(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._given])
        text, upto = self._decode(self._tokens[self._begin :]), len(self._tokens)
        if text.endswith(HALF) and not final:
            text, upto = self._without_end(text)
        if len(text) <= len(before):
            return ""
        self._begin, self._given = self._given, upto
        return text[len(before) :]

    def _without_end(self, text: str) -> tuple[str, int]:
        """*text* without the last tokens, which may be the beginning of a character, and the number
        of its tokens: the most that decode to the same text with and without the tokens after
        them."""
        for upto in range(len(self._tokens) - 1, self._given, -1):
            head = self._decode(self._tokens[self._begin : upto])
            if head + self._decode(self._tokens[upto:]) == text:
                return head, upto
        return "", 0


class StopStrings:
    """
    Ends a text before the first of some strings.

    Text that may be the beginning of such a string is held back until this is decided.

    Args:
        stops: the strings; if empty, all text passes through at once.

    Attributes:
        found: the string that ended the text, or None.
        rest: the text after that string.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None
        self.rest = ""

    def push(self, text: str) -> str:
        """The new text that is certainly before any stop string."""
        if self.found is not None:
            self.rest += text
            return ""
        self._held += text
        first = len(self._held)
        for stop in self._stops:
            at = self._held.find(stop)
            if 0 <= at < first:
                first, self.found = at, stop
        if self.found is None:
            first -= self._overlap()
        passed, self._held = self._held[:first], self._held[first:]
        if self.found is not None:
            self.rest, self._held = self._held[len(self.found) :], ""
        return passed

    def finish(self) -> str:
        """The text that was held back, at the end of the input."""
        passed, self._held = self._held, ""
        return passed

    def _overlap(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
