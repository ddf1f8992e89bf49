"""Chat templates: Jinja text of a model, compiled once and rendered as transformers renders it.

The environment (sandbox, filters, globals, loop controls, `{% generation %}`) follows
`transformers.utils.chat_template_utils`, so that a template gives the same text here and there.
Does not know about tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date as Date
from datetime import datetime
from functools import lru_cache
from typing import Any

from tinkex import errors

#: Put around what stands in {% generation %} while a template is rendered, then taken out. Unicode
#: guarantees that these two are never characters.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class TemplateRefusedError(ValueError):
    """The template does not accept these messages. The message says why."""


def is_generation_marked(template: str) -> bool:
    """True if the template says itself, with {% generation %}, what the assistant says."""
    return "endgeneration" in template


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
        date: what `strftime_now` formats; None is the time now.

    Raises:
        TemplateRefusedError: If the template raises an error, or cannot be used at all.
        MissingExtraError: If Jinja is not installed.
    """
    now = datetime.now() if date is None else datetime(date.year, date.month, date.day)
    compiled, template_error = _compile(template)
    try:
        text: str = compiled.render(
            **(variables or {}),
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            strftime_now=now.strftime,
        )
    except template_error as exc:
        raise TemplateRefusedError(
            f"the chat template does not accept these messages: {exc}"
        ) from exc
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as exc:
        # What a template's own expressions raise for messages that its author did not expect.
        raise TemplateRefusedError(
            f"the chat template fails on these messages ({type(exc).__name__}: {exc})"
        ) from exc
    return _take_out_marks(text) if _OPEN in text else (text, [])


def _take_out_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    ranges: list[tuple[int, int]] = []
    clean = ""
    for part in text.split(_OPEN):
        inside, is_marked, after = part.partition(_CLOSE)
        if is_marked:
            ranges.append((len(clean), len(clean) + len(inside)))
        clean += inside + after
    return clean, ranges


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter; Jinja's own escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@lru_cache(maxsize=32)
def _compile(template: str) -> tuple[Any, type[Exception]]:
    """The compiled template, and the class of the errors that it raises."""
    try:
        import jinja2
        from jinja2 import ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as exc:
        raise errors.MissingExtraError(
            "chat templates need jinja2, which is not installed: pip install jinja2."
        ) from exc

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %}: marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 (the base class wants a set)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(template), jinja2.TemplateError
    except jinja2.TemplateError as exc:
        raise TemplateRefusedError(f"the chat template cannot be used: {exc}") from exc
