"""Tinkex: fine-tune language models from plain, blocking Python.

A synchronous SDK for the Tinker training API, with a training engine of its own. Start with
`ServiceClient`. Nothing is defined here.
"""

from . import errors, types
from ._version import __version__
from .config import Config, Patience, SamplingLimits
from .errors import TinkexError
from .futures import OperationFuture
from .rest import RestClient
from .sampling import SamplingClient
from .service import ServiceClient
from .training import ClientSpec, TrainingClient
from .transport import Retry

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
