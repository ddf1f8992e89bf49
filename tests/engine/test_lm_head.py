"""Log-probabilities and their gradient, however the head is read, against torch's autograd."""

from __future__ import annotations

import pytest
import torch

from tests.support.frozen_linears import FrozenLinears
from tinkex.engine import lm_head, lora
from tinkex.engine.linears import Linear, Part

VOCAB, WIDTH, COUNT = 45, 16, 37


class _Base:
    def __init__(self, weight):
        self.linears = {"head": Linear(weight, None, (Part("lm_head", 0, len(weight)),), "unembed")}


def _random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _trained(base, workspace=None, gradient=True):
    """The head with an adapter in training, and the matrix it amounts to."""
    layout = lora.Layout(base.linears, lora.Shape(4))
    flat = _random(layout.size, seed=5, scale=0.1)
    dense = torch.empty(VOCAB, WIDTH)
    lora.merge_into(dense, base.linears["head"], layout.factors(flat)["head"], layout.shape.scale)
    total = torch.zeros_like(flat) if gradient else None
    return lora.TrainedLinears(base.linears, layout, flat, total, workspace, "me"), dense


@pytest.fixture(params=["frozen", "trained", "trained, merged", "merged, no gradients"])
def linears_and_weight(request):
    """Each way to read a head."""
    base = _Base(_random(VOCAB, WIDTH, scale=3.0))
    if request.param == "frozen":
        return FrozenLinears(base), base.linears["head"].weight
    room = lora.Workspace() if "merged" in request.param else None
    return _trained(base, room, gradient="no gradients" not in request.param)


@pytest.fixture(params=[(1, 1, 1), (5, 7, 45), (16, 45, 90), (640, 2048, 2**20)])
def _small_blocks(request, monkeypatch):
    rows, columns, budget = request.param
    monkeypatch.setattr(lm_head, "ROWS", {"cpu": rows})
    monkeypatch.setattr(lm_head, "COLUMNS", {"cpu": columns})
    monkeypatch.setattr(lm_head, "LOGIT_BUDGET", budget)
    monkeypatch.setattr(lm_head, "LEAST_ROWS", 1)


@torch.no_grad()
@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize(
    ("targets_per_row", "dead", "cap"),
    [
        *[(count, dead, 0.0) for count in (1, 3) for dead in ("none", "some", "all")],
        (3, "some", 9.0),
    ],
)
def test_logprobs_and_gradient_are_those_of_autograd(
    linears_and_weight, targets_per_row, dead, cap
):
    """Whatever the size of the blocks, and wherever the derivative is zero."""
    linears, weight = linears_and_weight
    hidden = _random(COUNT, WIDTH, seed=1)
    targets = torch.randint(
        VOCAB, (COUNT, targets_per_row), generator=torch.Generator().manual_seed(2)
    )
    slopes = _random(COUNT, targets_per_row, seed=3)
    live = {
        "none": torch.ones(COUNT, dtype=torch.bool),
        "some": torch.arange(COUNT) % 3 > 0,
        "all": torch.zeros(COUNT, dtype=torch.bool),
    }[dead]
    slopes[~live] = 0.0
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        logits = leaf @ weight.T
        logits = cap * torch.tanh(logits / cap) if cap else logits
        expected = logits.log_softmax(1).gather(1, targets)
        (expected * slopes).sum().backward()
    seen = []

    def coefficients(rows, logprobs):
        torch.testing.assert_close(logprobs, expected[rows].detach(), rtol=1e-5, atol=1e-5)
        seen.append(torch.arange(COUNT)[rows])
        return slopes[rows]

    alone, nothing = lm_head.target_logprobs(linears, hidden, targets, VOCAB, cap=cap)
    logprobs, gradient = lm_head.target_logprobs(
        linears, hidden, targets, VOCAB, coefficients, live, cap=cap
    )

    assert nothing is None
    torch.testing.assert_close(alone, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(COUNT))


@torch.no_grad()
def test_no_rows_have_no_logprobs():
    """A prompt of one token has no token that could be predicted."""
    linears = FrozenLinears(_Base(_random(VOCAB, WIDTH)))

    logprobs, _ = lm_head.target_logprobs(
        linears, torch.empty(0, WIDTH), torch.empty(0, 1, dtype=torch.int64), VOCAB
    )

    assert logprobs.shape == (0, 1)


@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_the_logprob_of_an_impossible_token_is_exact(columns, monkeypatch):
    """Its probability underflows to 0, whose logarithm would be -inf; in either way to read."""
    monkeypatch.setattr(lm_head, "COLUMNS", {"cpu": columns})
    logits = torch.tensor([[0.0, -500.0, 3.0]])
    expected = -500 - torch.log(1 + torch.exp(torch.tensor(3.0)))

    by_rows = lm_head.softmax_(logits.clone(), torch.tensor([[1]]))
    by_columns, _ = lm_head.target_logprobs(
        FrozenLinears(_Base(logits.T.contiguous())), torch.ones(1, 1), torch.tensor([[1]]), 3
    )

    assert float(by_rows) == pytest.approx(float(expected), rel=1e-6)
    assert float(by_columns) == pytest.approx(float(expected), rel=1e-6)
