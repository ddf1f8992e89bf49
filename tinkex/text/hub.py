"""Asks the Hugging Face hub once whether a file is there, before anything is downloaded.

Without a network its library tries again and again, and takes half a minute to fail. Where the
library is not installed, ImportError is raised.
"""

from __future__ import annotations

#: Seconds that the hub has to answer.
TIMEOUT = 10


def check_file(repository: str, file: str, revision: str | None = None) -> None:
    """Make one request that tells whether *file* can be downloaded.

    Raises:
        OSError, ValueError: If not: no network, no such repository, no access, not an id.
    """
    import huggingface_hub

    address = huggingface_hub.hf_hub_url(repository, file, revision=revision)
    try:
        huggingface_hub.get_hf_file_metadata(address, timeout=TIMEOUT)
    except (OSError, ValueError):
        raise
    except Exception as exc:  # of the HTTP library that it uses, which changes with its version
        raise OSError(f"{address} cannot be reached: {exc}") from exc


def check_data_set(repository: str) -> None:
    """Make one request that tells whether the data set *repository* can be read.

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
    """True if the library has kept a copy of *file* on this machine."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
    return isinstance(found, str)
