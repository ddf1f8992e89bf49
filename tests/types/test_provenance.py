"""Provenance: spans name samples, and cover the tokens of a datum exactly once."""

from __future__ import annotations

import pytest

from tinkex import types

DATUM = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
PROMPT = types.PromptProvenanceSpan(sequence_id="s", length=1)
SAMPLED = types.SampledProvenanceSpan(sequence_id="s", length=2)


def test_a_datum_carries_the_spans_of_its_tokens_and_its_targets():
    datum = DATUM.with_provenance(model_input=[PROMPT, SAMPLED], loss_fn_inputs=[SAMPLED, PROMPT])

    assert ((PROMPT, SAMPLED), (SAMPLED, PROMPT)) == (
        datum.model_input_spans,
        datum.loss_fn_input_spans,
    )
    assert DATUM.model_input_spans is None
    assert datum != DATUM


@pytest.mark.parametrize(
    "inputs, targets, match",
    [
        ([PROMPT], [PROMPT, SAMPLED], "model_input cover 1 tokens, but it has 3"),
        ([PROMPT, SAMPLED], [SAMPLED, SAMPLED], "target_tokens.* cover 4 tokens, but it has 3"),
    ],
)
def test_spans_that_miss_or_repeat_a_token_are_refused(inputs, targets, match):
    with pytest.raises(ValueError, match=match):
        DATUM.with_provenance(inputs, targets)


def test_spans_come_in_pairs_and_are_spans():
    with pytest.raises(ValueError, match="pairs"):
        types.Datum(DATUM.model_input, {}, [PROMPT])
    with pytest.raises(TypeError, match="got str"):
        types.Datum(DATUM.model_input, {}, ["s"], ["s"])


@pytest.mark.parametrize("cls", [types.PromptProvenanceSpan, types.SampledProvenanceSpan])
@pytest.mark.parametrize(
    "values",
    [
        {"sequence_id": "", "length": 1},
        {"sequence_id": "s", "length": -1},
        {"sequence_id": "s", "length": 1, "offset": -1},
        {"sequence_id": "s", "length": 1.5},
        {"sequence_id": None, "length": 1},
    ],
)
def test_a_span_names_a_sequence_and_counts_tokens(cls, values):
    with pytest.raises((ValueError, TypeError)):
        cls(**values)
