"""Reads and checks the fields of a JSON body; errors name the field and the value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tinkex import types
from tinkex.server.http_errors import Refusal, shown


class Fields:
    """The fields of one JSON object, checked when they are read; null counts as absent.

    Raises:
        Refusal: 400, by every method, naming the field, its value and what is expected.
    """

    def __init__(self, body: Any) -> None:
        if not isinstance(body, dict):
            raise Refusal(400, f"the body must be a JSON object, got {shown(body)}.")
        self._body: Mapping[str, Any] = body

    def get(self, name: str, default: Any = None) -> Any:
        value = self._body.get(name)
        return default if value is None else value

    def needed(self, name: str) -> Any:
        value = self._body.get(name)
        if value is None:
            raise Refusal(400, f"{name} is missing; give one.")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.needed(name) if default is None else self.get(name, default)
        if not isinstance(value, str):
            raise Refusal(400, f"{name} must be a string, got {shown(value)}.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise Refusal(400, f"{name} must be true or false, got {shown(value)}.")
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Refusal(
                400, f"{name} must be an integer from {low} to {high}, got {shown(value)}."
            )
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refusal(400, f"{name} must be a number, got {shown(value)}.")
        if not low <= value <= high:
            raise Refusal(400, f"{name} must be from {low:g} to {high:g}, got {value:g}.")
        return float(value)

    def strings(self, name: str, most: int) -> list[str]:
        """A string or a list of strings; empty ones are omitted."""
        value = self.get(name, [])
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise Refusal(400, f"{name} must be a string or a list of strings, got {shown(value)}.")
        if len(items) > most:
            raise Refusal(400, f"{name} must hold at most {most} strings, got {len(items)}.")
        return [item for item in items if item]

    def objects(self, name: str) -> list[dict[str, Any]]:
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise Refusal(400, f"{name} must be a list of objects, got {shown(value)}.")
        return value

    def refuse_unless(self, name: str, accepted: Sequence[Any], instead: str) -> None:
        """Refuse every value except *accepted*, for features that this server does not support."""
        value = self._body.get(name)
        if value is not None and value not in accepted:
            raise Refusal(
                400, f"{name} = {shown(value)} is not supported by this server; {instead}"
            )

    def sampling(self, max_tokens: int | None, stop: Sequence[int] | None) -> types.SamplingParams:
        """`temperature`, `top_p`, `top_k`, `seed`: the names in all these APIs."""
        return types.SamplingParams(
            max_tokens=max_tokens,
            seed=self.integer("seed", None, 0, 2**63 - 1),
            stop=stop,
            temperature=self.number("temperature", 1.0, 0.0, 100.0),
            top_k=self.integer("top_k", -1, -1, 2**31 - 1) or -1,
            top_p=self.number("top_p", 1.0, 1e-9, 1.0),
        )
