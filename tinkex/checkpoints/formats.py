"""The formats in which a trained model is exported: how each is written and described.

To add a format, add an entry to `FORMATS`: the command line, the model card and `Run.export` use
it. Does not import the engine, so that `tinkex --help` is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import attrs


class Source(Protocol):
    """A trained model: the argument of a format's `write`.

    Attributes:
        name: of the exported model.
        gguf_type: of the matrices in a GGUF file: "F16", "Q8_0" or "F32".
    """

    @property
    def name(self) -> str: ...
    @property
    def gguf_type(self) -> str: ...

    def write_adapter(self, folder: Path) -> None:
        """Write the PEFT adapter into the new *folder*."""

    def write_merged(self, folder: Path) -> None:
        """Write the base model with the adapter merged in, as a Hugging Face directory."""


@attrs.frozen
class Format:
    """One format.

    Attributes:
        help: a sentence for `--to`.
        description: a sentence for the model card.
        usage: an example for the model card, with {name}; braces are doubled.
        language: of the example.
        library: `library_name` of the hub; None if the hub has none.
        write: writes the model into a folder that does not exist yet.
    """

    help: str
    description: str
    usage: str
    language: str
    library: str | None
    write: Callable[[Source, Path], None]


def _write_gguf(model: Source, folder: Path) -> None:
    from tinkex.engine import gguf_writer

    merged = folder.with_name("merged")
    model.write_merged(merged)
    folder.mkdir()
    gguf_writer.write(merged, folder / f"{model.name}.gguf", model.gguf_type)


#: All formats by name.
FORMATS = {
    "peft": Format(
        "the adapter",
        "A LoRA adapter in PEFT's format.",
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        "python",
        "peft",
        lambda model, folder: model.write_adapter(folder),
    ),
    "hf": Format(
        "merged into the base model, as a Hugging Face directory",
        "A complete model: the base model with the adapter merged in.",
        "from transformers import pipeline\n\n"
        'ask = pipeline("text-generation", "{name}")\n'
        'print(ask([{{"role": "user", "content": "..."}}]))',
        "python",
        "transformers",
        lambda model, folder: model.write_merged(folder),
    ),
    "gguf": Format(
        "the same as a GGUF file, for llama.cpp",
        "A complete model as a GGUF file, with tokenizer and chat template.",
        "llama-cli -m {name}.gguf",
        "shell",
        None,
        _write_gguf,
    ),
}
