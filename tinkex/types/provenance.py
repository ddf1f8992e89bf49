"""Provenance of the tokens of a datum: spans that name samples of a server.

A span of consecutive tokens is part of a sampled sequence, or of its prompt. The spans of a datum
cover all its tokens. Servers use them to look up what they recorded during sampling
(`record_stability_info`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Union

import attrs

from tinkex.types import checks
from tinkex.types.dataclass_form import like_a_dataclass

__all__ = [
    "PromptProvenanceSpan",
    "ProvenanceSpan",
    "ProvenanceSpans",
    "SampledProvenanceSpan",
]

_WHOLE = "an integer >= 0"


def _check_sequence_id(instance: object, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"sequence_id must be the sequence_id of a SampledSequence, got {value!r}."
        )


@attrs.frozen(kw_only=True)
class _Span:
    sequence_id: str = attrs.field(validator=_check_sequence_id)
    offset: int = attrs.field(default=0, validator=checks.integer(_WHOLE, lambda n: n >= 0))
    length: int = attrs.field(validator=checks.integer(_WHOLE, lambda n: n >= 0))


@like_a_dataclass
@attrs.frozen(kw_only=True)
class PromptProvenanceSpan(_Span):
    """Tokens of a sequence's prompt.

    Args:
        sequence_id: of the sequence.
        offset: position of the first token in the prompt.
        length: number of tokens.
    """


@like_a_dataclass
@attrs.frozen(kw_only=True)
class SampledProvenanceSpan(_Span):
    """Tokens of a sequence; arguments as for `PromptProvenanceSpan`, relative to the sequence."""


ProvenanceSpan = Union[PromptProvenanceSpan, SampledProvenanceSpan]
ProvenanceSpans = Sequence[ProvenanceSpan]


def as_spans(value: Iterable[Any] | None) -> tuple[ProvenanceSpan, ...] | None:
    """Spans as a tuple. TypeError if an element is not a span."""
    if value is None:
        return None
    spans = tuple(value)
    for span in spans:
        if not isinstance(span, (PromptProvenanceSpan, SampledProvenanceSpan)):
            raise TypeError(
                "spans must be PromptProvenanceSpan or SampledProvenanceSpan, got "
                f"{type(span).__name__}."
            )
    return spans


def check_cover(what: str, spans: tuple[ProvenanceSpan, ...] | None, length: int) -> None:
    """Raise ValueError unless *spans* cover exactly *length* tokens."""
    covered = sum(span.length for span in spans or ())
    if spans is not None and covered != length:
        raise ValueError(
            f"the spans of {what} cover {covered} tokens, but it has {length}; they must cover "
            "each of them once."
        )
