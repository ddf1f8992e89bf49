"""The Jinja environment of chat templates: exactly the names of transformers' environment.

The sandbox, filters, globals, loop controls and `{% generation %}` follow
`transformers.utils.chat_template_utils`, so that templates render the same text as there. Imported
when the first template is compiled: Jinja is optional.
"""

from __future__ import annotations

import json
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

#: Marks around {% generation %} blocks, removed after rendering. Unicode guarantees that these two
#: are never characters.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"

TemplateError = jinja2.TemplateError

_DICT_ATTRIBUTES = frozenset(dir(dict))
#: Methods of str that the sandbox allows unchanged; it replaces "format".
_STR_METHODS = frozenset(
    name for name in dir(str) if not name.startswith("_") and not name.startswith("format")
)
#: Types whose values the sandbox always allows.
_PLAIN_KINDS = frozenset({bool, int, str, list, dict})


class Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's text."""

    tags = {"generation"}  # noqa: RUF012 (the base class wants a set)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """
    The sandbox, with a short cut for the most frequent look-ups.

    Jinja's checks take half the time of a rendering. Their result for keys of plain dicts, methods
    of plain str, and values in `loop` and `namespace()` is always the same, so it is returned here
    directly; all other look-ups and calls go through the sandbox.
    """

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if kind is str and attribute in _STR_METHODS:
            return getattr(obj, attribute)
        if kind in (_Namespace, LoopContext) and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in _PLAIN_KINDS:
                return value
        return super().getattr(obj, attribute)

    def is_safe_callable(self, obj: Any) -> bool:
        # A method written in C has no attributes that could mark it as unsafe.
        return type(obj) is BuiltinMethodType or super().is_safe_callable(obj)


class _Namespace(Namespace):
    """`namespace` in templates: holds the template's values, but no private names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` can be a name
        self, *given = args
        Namespace.__init__(self, _public(dict(*given, **kwargs)))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, _public({name: value})[name])


def _public(names: dict[str, Any]) -> dict[str, Any]:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"a name that begins with an underscore cannot be kept in a namespace: {name}"
            )
    return names


class _Dict:
    """`dict` in templates: makes dicts, and gives no access to the rest of Python."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def environment() -> ChatEnvironment:
    made = ChatEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return made


def take_out_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A rendered text without marks, and the ranges of characters in {% generation %} blocks."""
    if _OPEN not in text:
        return text, []
    ranges: list[tuple[int, int]] = []
    clean = ""
    for part in text.split(_OPEN):
        inside, is_marked, after = part.partition(_CLOSE)
        if is_marked:
            ranges.append((len(clean), len(clean) + len(inside)))
        clean += inside + after
    return clean, ranges
