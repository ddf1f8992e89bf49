"""Fast products are products: whichever library makes them, however the operands lie in memory."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import psutil
import pytest
import torch

from tinkex.engine import matmul


@pytest.fixture(params=["as it comes", "oneDNN", "MKL"])
def library(request, monkeypatch):
    """Each library, for all sizes. (Where this torch has no oneDNN, all three are one.)"""
    if request.param == "oneDNN":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(matmul, "_onednn", matmul._find_onednn())
        monkeypatch.setattr(matmul, "WORTH_ASKING", 0)
    elif request.param == "MKL":
        monkeypatch.setattr(matmul, "_onednn", None)
        monkeypatch.setattr(matmul, "LARGE", 0)
    return request.param


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_columns(matrix):
    return matrix.T.contiguous().T


def between_rows(matrix):
    return torch.cat([matrix + 1, matrix, matrix - 1])


def between_columns(matrix):
    return torch.cat([matrix + 1, matrix, matrix - 1], 1)


#: How a matrix may lie in memory.
LAYOUTS = {
    "by rows": lambda m: m.contiguous(),
    "by columns": by_columns,
    "rows of a taller": lambda m: between_rows(m)[len(m) : -len(m)],
    "columns of a wider": lambda m: between_columns(m)[:, m.shape[1] : -m.shape[1]],
    "by columns, of a taller": lambda m: by_columns(between_rows(m))[len(m) : -len(m)],
    "every other column": lambda m: m.repeat_interleave(2, 1)[:, ::2],
    "by columns, every other": lambda m: m.T.repeat_interleave(2, 1)[:, ::2].T,
}
SHAPES = [(7, 5, 3), (3, 5, 7), (1, 5, 3), (3, 5, 1), (3, 1, 5), (200, 300, 150)]


@pytest.mark.parametrize("columns", [20, 100, matmul.WIDE, matmul.WIDE + matmul.BLOCK + 7])
@pytest.mark.parametrize("rows", [0, 1, 2, matmul.FEW + 1, matmul.FEW_OF_TALL + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_layer_is_that_of_torch(columns, rows, biased, library):
    """Narrow, tall, wide, wide with a last block that is not full; one row, few, and many."""
    x, weight = random(rows, 16), random(columns, 16, seed=1)
    bias = random(columns, seed=2) if biased else None

    actual = matmul.linear(x, weight, bias)

    assert actual.is_contiguous()
    torch.testing.assert_close(actual, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("layouts", [*itertools.product(LAYOUTS, LAYOUTS)], ids=" times ".join)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_torch_in_double_precision(shape, layouts, library):
    """The three of them, with operands that lie in memory in every way."""
    m, k, n = shape
    x, y = LAYOUTS[layouts[0]](random(m, k)), LAYOUTS[layouts[1]](random(k, n, seed=1))
    weight = LAYOUTS[layouts[1]](random(n, k, seed=2))
    total = random(m, n, seed=3)
    exact = x.double() @ y.double()

    added = total.clone()
    matmul.add_product(added, x, y, 0.5)

    close = {"atol": 1e-4, "rtol": 1e-5}
    torch.testing.assert_close(matmul.product(x, y).double(), exact, **close)
    torch.testing.assert_close(added.double(), total.double() + 0.5 * exact, **close)
    torch.testing.assert_close(
        matmul.linear(x, weight).double(), x.double() @ weight.T.double(), **close
    )


def test_a_product_that_is_added_to_columns_of_a_wider_matrix_leaves_the_others(library):
    total = torch.zeros(4, 9)
    matmul.add_product(total[:, 3:6], torch.ones(4, 2), torch.ones(2, 3))

    assert [0, 0, 0, 2, 2, 2, 0, 0, 0] == total[0].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_left_to_torch(dtype, library):
    x, y = random(4, 6).to(dtype), random(6, 5).to(dtype)
    total = torch.zeros(4, 5)
    matmul.add_product(total, x, y)

    assert torch.equal(x @ y, matmul.product(x, y))
    assert torch.equal((x @ y).float(), total)


def test_whoever_wants_derivatives_gets_them(library):
    """oneDNN's product has none; so it is not asked."""
    x, weight = random(4, 6).requires_grad_(), random(5, 6, seed=1).requires_grad_()
    matmul.linear(x, weight).sum().backward()

    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(4, 6))
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(5, 6))


def test_a_product_is_the_same_bit_for_bit_each_time(library):
    """A run that is resumed ends in the very weights of one that was not interrupted."""
    x, y = random(130, 70), random(70, 90, seed=1)

    assert all(torch.equal(matmul.product(x, y), matmul.product(x, y)) for _ in range(20))


def test_products_of_ever_new_shapes_do_not_fill_the_memory(library):
    """What oneDNN prepares for a shape is kept, but not for all shapes there ever were."""
    weight, x = random(256, 256), random(2000, 256)
    for rows in range(200, 400):
        matmul.linear(x[:rows], weight)
    before = psutil.Process().memory_info().rss
    for rows in range(400, 1600):
        matmul.linear(x[:rows], weight)

    assert psutil.Process().memory_info().rss - before < 300 * 2**20


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_onednn_is_used_where_it_is_quicker_and_right(capability, monkeypatch):
    """Its product is no public part of torch: it is tried first, and left alone if it is wrong."""
    wrong = SimpleNamespace(_linear_pointwise=SimpleNamespace(default=lambda x, *_: x[:, :2] + 9))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops, "mkldnn", wrong)

    assert matmul._find_onednn() is None
