"""Tinkex: fine-tune language models from plain, blocking Python.

A synchronous SDK for the Tinker training API, with a training engine of its own. Start with
`ServiceClient`. Nothing is defined here; each name is imported when it is first used, so that
`tinkex --help` loads neither numpy nor requests.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tinkex._version import __version__

if TYPE_CHECKING:
    from tinkex import errors, types
    from tinkex.config import Config, Patience, SamplingLimits
    from tinkex.errors import TinkexError
    from tinkex.futures import OperationFuture
    from tinkex.recipes.callbacks import Callback
    from tinkex.recipes.run import Run, load_run
    from tinkex.rest import RestClient
    from tinkex.runtime.retry import Retry
    from tinkex.sampling import SamplingClient
    from tinkex.service import ServiceClient
    from tinkex.text.renderer import Rendered, render, render_prompt, render_turns
    from tinkex.text.responses import parse_response
    from tinkex.training import ClientSpec, TrainingClient

__all__ = [
    "Callback",
    "ClientSpec",
    "Config",
    "OperationFuture",
    "Patience",
    "Rendered",
    "RestClient",
    "Retry",
    "Run",
    "SamplingClient",
    "SamplingLimits",
    "ServiceClient",
    "TinkexError",
    "TrainingClient",
    "__version__",
    "errors",
    "load_run",
    "parse_response",
    "render",
    "render_prompt",
    "render_turns",
    "types",
]

#: The modules that define the names above; the others are modules themselves.
_HOMES = {
    "Callback": "recipes.callbacks",
    "ClientSpec": "training",
    "Config": "config",
    "OperationFuture": "futures",
    "Patience": "config",
    "Rendered": "text.renderer",
    "RestClient": "rest",
    "Retry": "runtime.retry",
    "Run": "recipes.run",
    "SamplingClient": "sampling",
    "SamplingLimits": "config",
    "ServiceClient": "service",
    "TinkexError": "errors",
    "TrainingClient": "training",
    "load_run": "recipes.run",
    "parse_response": "text.responses",
    "render": "text.renderer",
    "render_prompt": "text.renderer",
    "render_turns": "text.renderer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES.get(name, name)}", __name__)
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
