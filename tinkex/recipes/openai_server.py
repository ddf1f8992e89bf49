"""Chats with the model of an OpenAI-style server, such as vLLM, llama.cpp, Ollama, or our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tinkex import errors

if TYPE_CHECKING:
    import requests

    from tinkex.recipes.conversation import Settings

#: Timeouts in seconds: to connect, and between two pieces of an answer.
TIMEOUT = (10.0, 300.0)
#: Answers are truncated to this many characters.
MOST_CHARACTERS = 10_000_000


def is_openai_style(base_url: str | None) -> bool:
    """True if the address is a base URL of OpenAI's clients: it ends in /v1."""
    return base_url is not None and urlsplit(base_url).path.rstrip("/").endswith("/v1")


class OpenAIServer:
    """
    A model of an OpenAI-style server, as a `Speaker`.

    Args:
        base_url: ends in /v1.
        api_key: "" for none.
        model: the server's name of the model.
    """

    has_template = True  # the server applies it

    def __init__(self, base_url: str, api_key: str, model: str) -> None:
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._said: dict[str, str] = {}

    @property
    def message(self) -> dict[str, Any] | None:
        return {"role": "assistant", "content": "", **self._said} if self._said else None

    def pieces(self, messages: list[dict[str, Any]], settings: Settings) -> Iterator[str]:
        """
        Yield the answer to *messages* in pieces; reasoning is stored but not yielded.

        Raises:
            TinkexError: If the server does not answer, or refuses the request.
        """
        import requests

        self._said = {}
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "stream": True,
        }
        if settings.seed is not None:
            body["seed"] = settings.seed
        try:
            with requests.post(
                self._url, json=body, headers=self._headers, timeout=TIMEOUT, stream=True
            ) as response:
                if not response.ok:
                    raise errors.RequestFailedError(_refusal(response))
                yield from self._read(response)
        except requests.RequestException as exc:
            raise errors.APIConnectionError(f"{self._url} does not answer: {exc}") from exc

    def _read(self, response: requests.Response) -> Iterator[str]:
        size = 0
        for line in response.iter_lines():
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            for name, text in _new_text(data).items():
                size += len(text)
                self._said[name] = self._said.get(name, "") + text
                if name == "content":
                    yield text
            if size > MOST_CHARACTERS:
                return


def _new_text(data: bytes) -> dict[str, str]:
    """The text that an event adds to "content" and "reasoning_content". Raises TinkexError."""
    try:
        event = json.loads(data)
        if event.get("error"):
            error = event["error"]
            reason = error.get("message", error) if isinstance(error, dict) else error
            raise errors.RequestFailedError(f"the server failed in its answer: {reason}")
        choices = event.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        found = {name: delta.get(name) for name in ("reasoning_content", "content")}
    except (ValueError, AttributeError, LookupError, TypeError) as exc:
        raise errors.APIResponseValidationError(
            f"the server's answer is not in OpenAI's form: {data[:200]!r}"
        ) from exc
    return {name: text for name, text in found.items() if isinstance(text, str) and text}


def _refusal(response: requests.Response) -> str:
    try:
        error = response.json()["error"]
        reason = error["message"] if isinstance(error, dict) else error
    except (ValueError, LookupError, TypeError):
        reason = response.text[:200]
    return f"{response.url} answers {response.status_code}: {reason}"
