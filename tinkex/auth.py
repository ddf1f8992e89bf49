"""The API key: which one is used, its source, and whether a server accepts it.

The key is found as in the clients: the argument, TINKER_API_KEY, TINKER_CREDENTIAL_CMD, then the
credentials file of the official command line and `tinkex auth login`.
"""

from __future__ import annotations

from tinkex import config, errors
from tinkex.rest import RestClient


def get_tinker_token() -> str | None:
    """The key from TINKER_API_KEY or the credentials file, or None.

    TINKER_CREDENTIAL_CMD is not run.
    """
    return config.variable("TINKER_API_KEY") or config.stored_key() or None


def tinker_has_credentials() -> bool:
    """True if there is a key, or a command that prints one. Sends and runs nothing."""
    return bool(get_tinker_token() or config.variable("TINKER_CREDENTIAL_CMD"))


def raise_if_tinker_not_accessible() -> None:
    """Request the capabilities of the server named in the environment, once.

    Raises:
        TinkexError: If there is no key for the official service, or the server cannot be reached
            or refuses it.
    """
    try:
        with RestClient() as client:
            client.get_server_capabilities()
    except ValueError as exc:  # no key, or not a key of the official service
        raise errors.TinkexError(str(exc)) from exc
