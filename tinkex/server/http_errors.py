"""Refused requests: an HTTP status and one sentence.

Does not know about HTTP frameworks; `request_context` turns a Refusal into a response.
"""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(Exception):
    """The request is refused, and nothing has changed.

    Attributes:
        status: the HTTP status.
        sentence: what is wrong, with the value and the fix.
        headers: additional response headers.
    """

    def __init__(
        self, status: int, sentence: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.headers = dict(headers or {})

    @property
    def category(self) -> str:
        """ "user" if a different request could succeed, else "server"."""
        return "server" if self.status >= 500 or self.status in (408, 429) else "user"


def not_found(what: str, name: object) -> Refusal:
    """404 for an object that does not exist or belongs to another user: the same text for both."""
    return Refusal(404, f"{what} {shown(name)} is not known to this server.")


def not_offered(what: str, instead: str = "") -> Refusal:
    """404 for an unsupported feature; clients would retry a 501."""
    return Refusal(404, f"this server does not offer {what}." + (f" {instead}" if instead else ""))


def shown(value: object, length: int = 80) -> str:
    """A value for use in a sentence: quoted and shortened."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
