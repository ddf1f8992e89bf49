"""What the server answers when it does not take a request: a status and one sentence.

Knows nothing of HTTP frameworks: the server turns a Refusal into a response.
"""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(Exception):
    """The request is not taken; nothing has changed.

    Attributes:
        status: the HTTP status.
        sentence: what is wrong, with the value and the mend.
        headers: further headers of the answer.
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
        """ "user" where a change of the request can help, else "server"."""
        return "server" if self.status >= 500 or self.status in (408, 429) else "user"


def not_found(what: str, name: object) -> Refusal:
    """404 for a thing that is not there, or is another user's: the two read the same."""
    return Refusal(404, f"{what} {shown(name)} is not known to this server.")


def not_offered(what: str, instead: str = "") -> Refusal:
    """501 would be retried by clients; what is not offered never will be: 404, with a sentence."""
    return Refusal(404, f"this server does not offer {what}." + (f" {instead}" if instead else ""))


def shown(value: object, length: int = 80) -> str:
    """A value as it may appear in a sentence: quoted and not too long."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
