"""Model cards: README.md of an exported model, with its training data, settings and losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tinkex.checkpoints.formats import FORMATS


@attrs.frozen
class Training:
    """The training data, settings and losses in a card; see `tinkex train`.

    Attributes:
        data_sha256: of the training data.
        steps: number of training steps.
        settings: of the run, by name; None values are omitted.
        losses: held-out losses before and after training, in nats per token. None if nothing was
            held out.
    """

    data_sha256: str
    steps: int
    settings: Mapping[str, Any]
    losses: tuple[float, float] | None = None


def text(name: str, base_model: str, form: str, training: Training | None) -> str:
    """
    The card as Markdown, with the metadata that the Hugging Face hub reads.

    Args:
        base_model: its name on the hub, if it is there.
        form: a name in `formats.FORMATS`.
        training: None if only the weights are known.
    """
    kind = FORMATS[form]
    lines = ["---", f"base_model: {base_model}"]
    if kind.library is not None:
        lines.append(f"library_name: {kind.library}")
    lines += ["pipeline_tag: text-generation", "tags:", "- tinkex", "- lora", "---", ""]
    lines += [
        f"# {name}",
        "",
        f"{kind.description} Fine-tuned from `{base_model}` with tinkex.",
        "",
    ]
    lines += ["## Use", "", f"```{kind.language}", kind.usage.format(name=name), "```", ""]
    if training is not None:
        lines += _training(training)
    return "\n".join(lines)


def _training(training: Training) -> list[str]:
    lines = ["## Training", "", "| | |", "|---|---|", f"| Steps | {training.steps} |"]
    if training.losses is not None:
        before, after = training.losses
        lines.append(f"| Held-out loss per token | {before:.4f} before, {after:.4f} after |")
    lines.append(f"| SHA-256 of the data | `{training.data_sha256}` |")
    lines += [
        f"| {key} | {value} |" for key, value in training.settings.items() if value is not None
    ]
    return [*lines, ""]
