"""What is read of configurations, in the words of several families."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tinkex.engine import configuration


def test_a_rotary_embedding_may_be_one_or_several():
    one = {"rope_type": "yarn", "factor": 4.0}
    both = {"full_attention": one, "sliding_attention": {"rope_type": "default"}}

    assert [one] == list(configuration.rope_parameters(SimpleNamespace(rope_parameters=one)))
    assert list(both.values()) == list(
        configuration.rope_parameters(SimpleNamespace(rope_parameters=both))
    )
    assert [{}] == list(configuration.rope_parameters(SimpleNamespace()))


@pytest.mark.parametrize(
    ("settings", "context"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"seq_length": 512}, 512),
        ({}, 32768),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 4096,
                },
            },
            4096,
        ),
    ],
)
def test_the_longest_text(settings, context):
    assert context == configuration.context(SimpleNamespace(**settings))


def test_the_configuration_of_generation_says_what_ends_a_text():
    model = SimpleNamespace(eos_token_id=2)

    assert (2,) == configuration.eos_tokens(model)
    assert (7, 8) == configuration.eos_tokens(model, SimpleNamespace(eos_token_id=[7, 8]))
    assert (2,) == configuration.eos_tokens(model, SimpleNamespace(eos_token_id=None))
    assert () == configuration.eos_tokens(SimpleNamespace())
