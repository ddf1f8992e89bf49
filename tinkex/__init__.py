"""Tinkex: fine-tune language models from plain, blocking Python.

A synchronous SDK for the Tinker training API, with a training engine of its own. Start with
`ServiceClient`. Nothing is defined here; each name is imported when it is first used, so that
`tinkex --help` loads neither numpy nor requests.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import errors, types
    from .config import Config, Patience, SamplingLimits
    from .errors import TinkexError
    from .futures import OperationFuture
    from .rest import RestClient
    from .retry import Retry
    from .sampling import SamplingClient
    from .service import ServiceClient
    from .training import ClientSpec, TrainingClient

__all__ = [
    "ClientSpec",
    "Config",
    "OperationFuture",
    "Patience",
    "RestClient",
    "Retry",
    "SamplingClient",
    "SamplingLimits",
    "ServiceClient",
    "TinkexError",
    "TrainingClient",
    "__version__",
    "errors",
    "types",
]

#: The modules that define the names above; the others are modules themselves.
_HOMES = {
    "ClientSpec": "training",
    "Config": "config",
    "OperationFuture": "futures",
    "Patience": "config",
    "RestClient": "rest",
    "Retry": "retry",
    "SamplingClient": "sampling",
    "SamplingLimits": "config",
    "ServiceClient": "service",
    "TinkexError": "errors",
    "TrainingClient": "training",
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
