"""AdamW, against torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch

from tinkex import types
from tinkex.engine import optim


def _gradients(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(200, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(
    "params",
    [
        types.AdamParams(),
        types.AdamParams(learning_rate=1e-2, beta1=0.8, beta2=0.999, eps=1e-6, weight_decay=0.1),
        types.AdamParams(learning_rate=0.1, beta1=0.0, beta2=0.0),
    ],
)
def test_steps_are_those_of_torch(params, monkeypatch):
    """Bias correction, decoupled decay and eps as torch has them; 30 parameters at a time."""
    monkeypatch.setitem(optim.PARAMETERS, "cpu", 30)
    actual = torch.randn(200, generator=torch.Generator().manual_seed(1))
    expected = actual.clone().requires_grad_()
    reference = torch.optim.AdamW(
        [expected],
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    optimizer = optim.AdamW(200, torch.device("cpu"))

    for gradient in _gradients(10):
        optimizer.step(actual, gradient, params)
        expected.grad = gradient.clone()
        reference.step()

    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-7)


def test_settings_may_change_from_step_to_step():
    """They travel with each step; only the moments stay."""
    actual, expected = torch.ones(200), torch.ones(200).requires_grad_()
    reference = torch.optim.AdamW([expected], betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)
    optimizer = optim.AdamW(200, torch.device("cpu"))

    for i, gradient in enumerate(_gradients(5)):
        optimizer.step(actual, gradient, types.AdamParams(learning_rate=0.01 * (i + 1)))
        reference.param_groups[0]["lr"] = 0.01 * (i + 1)
        expected.grad = gradient.clone()
        reference.step()

    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_is_that_of_torch(largest):
    """By the global norm, and only when it is larger."""
    [actual] = _gradients(1)
    parameter = torch.zeros(200).requires_grad_()
    parameter.grad = actual.clone()
    norm = torch.nn.utils.clip_grad_norm_([parameter], largest)

    optim.clip_(actual, float(norm), largest)

    torch.testing.assert_close(actual, parameter.grad)


def test_a_step_without_gradient_still_counts():
    """Momentum is kept; the count of steps is part of the state."""
    weights, optimizer = torch.zeros(3), optim.AdamW(3, torch.device("cpu"))

    optimizer.step(weights, torch.zeros(3), types.AdamParams())

    assert 1 == optimizer.steps
    assert torch.equal(torch.zeros(3), weights)
