"""`tinkex.preference`: training on pairs of a better and a worse answer, in one call.

The same as `tinkex train --method dpo` and the others; the losses are in preference_losses.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinkex.recipes.finetune import finetune
from tinkex.recipes.run import Run


def dpo(
    data: Any = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Run:
    """
    Direct preference optimization.

    Args:
        data: rows with "chosen" and "rejected", and "prompt" unless both hold the whole
            conversation; as for `tinkex.finetune`.
        beta: the higher, the closer the model stays to what it was before.
        label_smoothing: the fraction of pairs that are taken to be labelled the wrong way.
        options: everything else that `tinkex.finetune` takes.

    Raises:
        ValueError, TypeError, TinkexError, KeyboardInterrupt: As `tinkex.finetune`.
    """
    return finetune(
        data,
        base_model,
        output,
        method="dpo",
        beta=beta,
        label_smoothing=label_smoothing,
        **options,
    )


def ipo(
    data: Any = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    beta: float = 0.1,
    **options: Any,
) -> Run:
    """Identity preference optimization: the gap of the answers approaches 1 / (2 beta) per token.

    Arguments and errors are those of `dpo`.
    """
    return finetune(data, base_model, output, method="ipo", beta=beta, **options)


def simpo(
    data: Any = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    beta: float = 2.0,
    margin: float = 1.0,
    **options: Any,
) -> Run:
    """Simple preference optimization: log-probabilities per token, without a reference model.

    Args:
        beta: scale of the rewards.
        margin: by how much the reward of the chosen answer should be higher.
    """
    return finetune(data, base_model, output, method="simpo", beta=beta, margin=margin, **options)


def orpo(
    data: Any = None,
    base_model: str | None = None,
    output: str | Path = "run",
    *,
    beta: float = 0.1,
    **options: Any,
) -> Run:
    """Odds ratio preference optimization: imitates the chosen answers and disfavours the others.

    Args:
        beta: weight of the odds ratio beside the imitation.
    """
    return finetune(data, base_model, output, method="orpo", beta=beta, **options)
