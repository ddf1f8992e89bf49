"""The public surface of the official SDK as JSON: `PYTHON surface.py`, in its environment.

Only facts: names, and for what can be called the names, kinds and defaults of its parameters. The
surface of the newest version is kept in surface.json, which `make conformance` writes.
"""

from __future__ import annotations

import enum
import inspect
import json

import tinker
from tinker import types

CLASSES = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture")


def default(parameter):
    """As text; None if there is none."""
    value = parameter.default
    if value is parameter.empty:
        return None
    return value.value if isinstance(value, enum.Enum) else repr(value)


def parameters(function):
    """[name, kind, default] of each parameter, or None if they cannot be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    return [
        [parameter.name, parameter.kind.name, default(parameter)]
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls") and not parameter.name.startswith("_")
    ]


def methods(cls):
    found = {}
    for name in sorted(dir(cls)):
        if name == "__init__" or not name.startswith("_"):
            value = inspect.getattr_static(cls, name)
            if callable(value) or isinstance(value, (staticmethod, classmethod)):
                found[name] = parameters(getattr(cls, name))
    return found


def fields(cls):
    """Names of the public fields of a type: pydantic's, or a dataclass's."""
    named = getattr(cls, "model_fields", None) or getattr(cls, "__dataclass_fields__", {})
    return sorted(name for name in named if name != "type" and not name.startswith("_"))


def surface():
    classes = {name: getattr(tinker, name, None) for name in CLASSES}
    if classes["RestClient"] is None:
        from tinker.lib.public_interfaces.rest_client import RestClient

        classes["RestClient"] = RestClient
    public = {name: getattr(types, name) for name in dir(types) if name[0].isupper()}
    return {
        "version": tinker.__version__,
        "names": sorted(name for name in tinker.__all__ if not name.startswith("__")),
        "classes": {name: methods(cls) for name, cls in classes.items()},
        "types": {
            name: fields(value) if isinstance(value, type) else []
            for name, value in sorted(public.items())
        },
    }


if __name__ == "__main__":
    print(json.dumps(surface(), indent=1, sort_keys=True))
