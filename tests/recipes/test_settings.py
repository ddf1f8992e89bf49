"""Settings: what is refused, with the value and the reason."""

from __future__ import annotations

import pytest

from tinkex.recipes.settings import Settings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"batch_size": "8"}, "batch_size must be a whole number of at least 1, got '8'"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"eval_fraction": 1}, "eval_fraction must be from 0 to below 1"),
        ({"beta2": 1.0}, "beta2 must be from 0 to below 1, got 1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number of at least 0, got nan"),
        ({"learning_rate": "1e-4"}, "learning_rate must be above 0 and at most 1, got '1e-4'"),
        ({"schedule": "cosin"}, "schedule must be constant or linear or cosine, got 'cosin'"),
        ({"patience": 0}, "patience must be a whole number of at least 1, got 0"),
        ({"keep": 1.5}, "keep must be a whole number of at least 1"),
        ({"prompts": "text"}, "prompts must be a list of texts"),
    ],
)
def test_a_bad_setting_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        Settings("tiny", **given)


@pytest.mark.parametrize("given", ["tensorboard, wandb", ["tensorboard", "wandb"]])
def test_trackers_are_a_list_or_text_with_commas(given):
    assert ["tensorboard", "wandb"] == Settings("tiny", report_to=given).report_to
