"""Fast products are products."""

from __future__ import annotations

import pytest
import torch

from tinkex.local import products


@pytest.mark.parametrize("columns", [100, products.WIDE, products.WIDE + products.BLOCK + 7])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_is_that_of_torch(columns, biased):
    """Narrow, wide, and wide with a last block that is not full."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(5, 16, generator=generator),
        torch.randn(columns, 16, generator=generator),
    )
    bias = torch.randn(columns, generator=generator) if biased else None

    actual = products.linear(x, weight, bias)

    torch.testing.assert_close(actual, torch.nn.functional.linear(x, weight, bias))
