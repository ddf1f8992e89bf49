"""Operations on rows, compiled and by torch, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinkex.engine import cpu_kernels, cpu_rows
from tinkex.engine.engine import Engine
from tinkex.engine.row_operations import TORCH_ROWS, TorchRows

CPU = torch.device("cpu")
COMPILED = cpu_kernels.load_rows("norm") is not None
needs_a_compiler = pytest.mark.skipif(not COMPILED, reason="this machine has no C compiler")

TYPES = [torch.float32, torch.bfloat16]

#: Largest relative error; torch rounds bfloat16 after every step.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(params=[pytest.param("compiled", marks=needs_a_compiler), "torch"])
def rows_of(request):
    return cpu_rows.rows_for if request.param == "compiled" else lambda device, dtype: TORCH_ROWS


def _random(seed, *shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _agree(actual, expected, dtype):
    assert actual.dtype == dtype
    assert float((actual - expected).norm()) < ERROR[dtype] * float(expected.norm())


@pytest.mark.parametrize("width", [48, 576, 20], ids=["three vectors", "many", "no whole vector"])
@pytest.mark.parametrize("of_weight", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norm(rows_of, dtype, of_weight, width):
    rows, of_weight = rows_of(CPU, dtype), dtype if dtype == torch.float32 else of_weight
    x, dy, plus = (_random(i, 9, width, dtype=dtype) for i in range(3))
    weight = _random(3, width, dtype=of_weight)

    y, rstd = rows.norm(x, weight, 1e-3)
    dx = rows.norm_backward(dy, x, weight, rstd, plus)

    leaf = x.double().requires_grad_()
    expected = F.rms_norm(leaf, (width,), weight.double(), 1e-3)
    [slope] = torch.autograd.grad((expected * dy).sum(), leaf)
    _agree(y, expected.detach(), dtype)
    _agree(dx, slope + plus, dtype)
    _agree(rstd, (x.double().square().mean(1, keepdim=True) + 1e-3).rsqrt(), torch.float32)


@pytest.mark.parametrize("columns", [32, 20], ids=["two vectors", "no whole vector"])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_gated_activation(rows_of, dtype, activation, columns):
    rows = rows_of(CPU, dtype)
    gate_up, dact = 3 * _random(0, 9, 2 * columns, dtype=dtype), _random(1, 9, columns, dtype=dtype)

    act = rows.gate(gate_up, activation)
    dgate_up = rows.gate_backward(dact.clone(), gate_up, activation)

    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    [slope] = torch.autograd.grad((active * up * dact).sum(), leaf)
    _agree(act, (active * up).detach(), dtype)
    _agree(dgate_up, slope, dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rotation_of_some_columns_of_some_heads(rows_of, dtype, interleaved):
    """There and back; values, and the last columns of each head, stay."""
    rows, half = rows_of(CPU, dtype), 6
    qkv = _random(0, 9, 5 * 16, dtype=dtype)
    angles = _random(1, 9, 1, half, dtype=torch.float64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    heads = qkv.clone().view(9, 5, 16)

    rows.rotate_(heads[:, :3], cos, sin, interleaved=interleaved, back=False)

    expected = qkv.double().view(9, 5, 16).clone()
    pairs = expected[:, :3, : 2 * half]
    pairs = pairs.unflatten(2, (half, 2)) if interleaved else pairs.unflatten(2, (2, half)).mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())
    turned = torch.view_as_real(turned)
    expected[:, :3, : 2 * half] = (turned if interleaved else turned.mT).flatten(2)
    _agree(heads, expected, dtype)
    assert torch.equal(heads[:, 3:], qkv.view(9, 5, 16)[:, 3:])
    rows.rotate_(heads[:, :3], cos, sin, interleaved=interleaved, back=True)
    _agree(heads, qkv.view(9, 5, 16), dtype)


@needs_a_compiler
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_extreme_numbers(dtype):
    """Activations of large numbers do not overflow, and what is not a number stays so."""
    rows = cpu_rows.rows_for(CPU, dtype)
    assert isinstance(rows, cpu_rows.CompiledRows)
    gate = torch.tensor([-1e4, -200.0, 200.0, torch.nan] * 4, dtype=dtype)[None]
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1)

    for activation in ("silu", "gelu_pytorch_tanh"):
        [act] = rows.gate(gate_up, activation)
        [dgate] = rows.gate_backward(torch.ones_like(gate), gate_up, activation)[:, :16]
        assert act[:3].tolist() == pytest.approx([0.0, 0.0, 200.0], abs=1e-3) and act[3].isnan()
        assert dgate[:3].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-3) and dgate[3].isnan()


@needs_a_compiler
def test_wrong_numbers_are_noticed():
    right = cpu_rows.rows_for(CPU, torch.float32)

    class Wrong(TorchRows):
        def gate_backward(self, dact, gate_up, activation):
            return super().gate_backward(dact, gate_up, "silu")

    assert cpu_rows.agrees_with_torch(right, torch.float32)
    assert not cpu_rows.agrees_with_torch(Wrong(), torch.float32)


@needs_a_compiler
def test_the_engine_uses_them_unless_it_is_told_not_to():
    for compiled in (True, False):
        engine = Engine(device="cpu", compiled=compiled)
        engine.load_base("tiny")
        loaded = engine._base("tiny")
        for rows in (loaded.base.rows, loaded.sampler._operations):
            assert compiled == isinstance(rows, cpu_rows.CompiledRows)


@pytest.mark.parametrize("vocab", [50, 1000], ids=["no whole vector", "many blocks"])
@pytest.mark.parametrize("block", [8, 32])
def test_sums_of_likelihoods_in_blocks(rows_of, vocab, block):
    logits = 30 * _random(1, 3, vocab + 9, dtype=torch.float32)[:, :vocab]
    logits[0, :block] = -torch.inf  # a block without likely tokens
    temperatures = torch.tensor([[1.0], [0.3], [50.0]])

    largest, sums = rows_of(CPU, torch.float32).block_sums(logits, temperatures, block)

    exact = ((logits.double() - logits.double().amax(1, keepdim=True)) / temperatures).exp()
    expected = [part.sum(dim=1) for part in exact.split(block, dim=1)]
    assert (largest == logits.amax(1, keepdim=True)).all()
    torch.testing.assert_close(sums.double(), torch.stack(expected, dim=1), rtol=2e-6, atol=1e-30)
    assert sums[0, 0] == 0


def test_a_logit_that_is_not_a_number_is_not_hidden(rows_of):
    logits = torch.zeros(2, 64)
    logits[0, 40] = torch.nan

    _, sums = rows_of(CPU, torch.float32).block_sums(logits, torch.ones(2, 1), 32)

    assert sums[0, 1].isnan() and (sums[1] == 32).all()
