"""The standard functions of `dataclasses` on data and samples, as in the official SDK."""

from __future__ import annotations

import dataclasses
import pprint

import numpy as np
import pytest

from tinkex import types

DATUM = types.Datum(types.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})
SEQUENCE = types.SampledSequence([5, 6], [-1.0, -2.0], "stop", "s:0")
SPAN = types.PromptProvenanceSpan(sequence_id="s:0", length=2)


@pytest.mark.parametrize(
    "value, changes",
    [
        (DATUM, {"loss_fn_inputs": {"target_tokens": [2, 4]}}),
        (SEQUENCE, {"stop_reason": "length"}),
        (types.SampleResponse([SEQUENCE]), {"prompt_logprobs": [None, -1.0]}),
        (types.ForwardBackwardOutput([], {"loss:sum": 1.0}), {"metrics": {}}),
        (SPAN, {"offset": 1}),
        (types.SampledProvenanceSpan(sequence_id="s:0", length=2), {"length": 3}),
        (types.PromptAltTokens(types.TensorData([[1]]), types.TensorData([[0.5]])), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_replace_changes_what_it_names_and_keeps_the_rest(value, changes):
    changed = dataclasses.replace(value, **changes)

    assert type(value) is type(changed)
    for field in dataclasses.fields(value):
        expected = changes.get(field.name, getattr(value, field.name))
        if field.name == "loss_fn_inputs":
            expected = {name: types.TensorData(x) for name, x in expected.items()}
        np.testing.assert_equal(getattr(changed, field.name), expected)


def test_replace_checks_like_the_constructor():
    with pytest.raises(ValueError, match="pairs"):
        dataclasses.replace(DATUM, model_input_spans=[SPAN])
    with pytest.raises(TypeError):
        dataclasses.replace(DATUM, modelinput=None)


def test_values_are_printed_as_before():
    """pprint treats dataclasses in its own way."""
    assert repr(DATUM) == pprint.pformat(DATUM)
