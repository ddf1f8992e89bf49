"""Checks with one request whether the Hugging Face hub has a file, before downloads.

Without a network the hub's library retries and takes half a minute to fail. Raises ImportError if
the library is not installed.
"""

from __future__ import annotations

#: Timeout of the request, in seconds.
TIMEOUT = 10


def check_file(repository: str, file: str, revision: str | None = None) -> None:
    """Check with one request that *file* can be downloaded.

    Raises:
        OSError, ValueError: If it cannot: no network, no such repository, no access, not an id.
    """
    import huggingface_hub

    address = huggingface_hub.hf_hub_url(repository, file, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(address, timeout=TIMEOUT)
    except (OSError, ValueError):
        raise
    except Exception as exc:  # of its HTTP library, which depends on its version
        raise OSError(f"{address} cannot be reached: {exc}") from exc


def check_data_set(repository: str) -> None:
    """Check with one request that the data set *repository* can be read.

    Raises:
        OSError, ValueError: As `check_file`.
    """
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(repository, timeout=TIMEOUT)
    except (OSError, ValueError):
        raise
    except Exception as exc:
        raise OSError(f"the hub cannot be reached: {exc}") from exc


def is_cached(repository: str, file: str, revision: str | None = None) -> bool:
    """True if the library has a cached copy of *file* on this machine."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
    return isinstance(found, str)
