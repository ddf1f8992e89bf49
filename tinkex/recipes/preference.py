"""`tinkex.preference`: training on pairs of a chosen and a rejected answer, in one call.

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
        beta: the higher, the closer the model stays to the reference model.
        label_smoothing: assumed fraction of pairs with swapped labels.
        options: all other arguments of `tinkex.finetune`.

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
        margin: target difference between the rewards of the chosen and the rejected answer.
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
    """Odds ratio preference optimization: imitates chosen answers and penalizes rejected ones.

    Args:
        beta: weight of the odds ratio term relative to the imitation loss.
    """
    return finetune(data, base_model, output, method="orpo", beta=beta, **options)
