"""Fast products are products."""

from __future__ import annotations

import pytest
import torch

from tinkex.local import products


@pytest.mark.parametrize("columns", [20, 100, products.WIDE, products.WIDE + products.BLOCK + 7])
@pytest.mark.parametrize("rows", [0, 1, 2, products.FEW + 1, products.FEW_OF_TALL + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_is_that_of_torch(columns, rows, biased):
    """Narrow, tall, wide, wide with a last block that is not full; one row, few, and many."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(rows, 16, generator=generator),
        torch.randn(columns, 16, generator=generator),
    )
    bias = torch.randn(columns, generator=generator) if biased else None

    actual = products.linear(x, weight, bias)

    assert actual.is_contiguous()
    torch.testing.assert_close(actual, torch.nn.functional.linear(x, weight, bias))
