"""Whatever computes a base model offers all that the engine asks for."""

from __future__ import annotations

import inspect

import pytest

from tinkex.engine import base_model, fast_path
from tinkex.engine.model import Training

PAIRS = [
    (base_model.BaseModel, fast_path.FastModel),
    (base_model.SamplingState, fast_path.FastSampling),
    (base_model.TrainingBatch, Training),
]


@pytest.mark.parametrize(("interface", "implementation"), PAIRS)
def test_every_member_is_there_with_the_same_arguments(interface, implementation):
    """By name, since an attrs field and a property are both fine."""
    fields = {a.name for a in getattr(implementation, "__attrs_attrs__", ())}
    for name, member in vars(interface).items():
        if name.startswith("_"):
            continue
        assert name in fields or hasattr(implementation, name), name
        if inspect.isfunction(member):
            ours = inspect.signature(getattr(implementation, name)).parameters
            assert list(inspect.signature(member).parameters) == list(ours), name
