"""Chat templates: Jinja text of a model, compiled once and rendered as in transformers.

template_environment.py defines the names that templates may use. Does not know about tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import datetime
from functools import lru_cache
from typing import Any

from tinkex import errors


class TemplateRefusedError(ValueError):
    """The template does not accept these messages; with the reason."""


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, str] | None = None,
    date: Date | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """
    A conversation as text, and the ranges of characters inside {% generation %} blocks.

    Args:
        variables: names of special tokens and their text, such as bos_token.
        date: for `strftime_now`; None is the current time.

    Raises:
        TemplateRefusedError: If the template raises an error, or cannot be used at all.
        MissingExtraError: If Jinja is not installed.
    """
    now = datetime.now() if date is None else datetime(date.year, date.month, date.day)
    environment = _environment()
    compiled = _compile(template)
    try:
        text: str = compiled.render(
            **(variables or {}),
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=now.strftime,
        )
    except environment.TemplateError as exc:
        raise TemplateRefusedError(
            f"the chat template does not accept these messages: {exc}"
        ) from exc
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as exc:
        # Errors in the template's expressions for messages that its author did not expect.
        raise TemplateRefusedError(
            f"the chat template fails on these messages ({type(exc).__name__}: {exc})"
        ) from exc
    found: tuple[str, list[tuple[int, int]]] = environment.take_out_marks(text)
    return found


@lru_cache(maxsize=32)
def _compile(template: str) -> Any:
    environment = _environment()
    try:
        return environment.environment().from_string(template)
    except environment.TemplateError as exc:
        raise TemplateRefusedError(f"the chat template cannot be used: {exc}") from exc


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The module `template_environment`, which needs Jinja."""
    try:
        from tinkex.text import template_environment
    except ImportError as exc:
        raise errors.MissingExtraError(
            "chat templates need jinja2, which is not installed: pip install jinja2."
        ) from exc
    return template_environment
