"""Encryption of files to the public keys of their readers, by age (https://age-encryption.org).

Uses pyrage, which is optional: `pip install 'tinkex[age]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinkex import types

SUFFIX = ".age"


def recipients_of(keys: Sequence[str]) -> list[Any]:
    """Parse public keys for pyrage.

    Raises:
        ValueError: If one is not a public key, or pyrage is not installed.
    """
    checked = types.check_recipients(keys) or []
    pyrage = _pyrage()
    recipients = []
    for key in checked:
        kind = pyrage.x25519 if key.startswith("age1") else pyrage.ssh
        try:
            recipients.append(kind.Recipient.from_str(key))
        except pyrage.RecipientError as exc:
            raise ValueError(
                f"age_encryption_recipients holds {key[:80]!r}, which is not a public key of age "
                f"or SSH ({exc}); copy the whole line that begins with 'age1' or 'ssh-'."
            ) from exc
    return recipients


def encrypt_folder(folder: Path, keys: Sequence[str]) -> None:
    """Replace every file in *folder* by its encrypted form, with `SUFFIX` appended to its name."""
    recipients = recipients_of(keys)
    pyrage = _pyrage()
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        pyrage.encrypt_file(str(file), f"{file}{SUFFIX}", recipients)
        file.unlink()


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError as exc:
        raise ValueError(
            "this server cannot encrypt files, because pyrage is not installed there; install it "
            "with: pip install 'tinkex[age]', or omit age_encryption_recipients."
        ) from exc
    return pyrage
