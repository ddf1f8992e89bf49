"""Matrices of 8 bits: how near they are, against the rounded matrix multiplied exactly, and what
such an engine refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import int8
from tinkex.engine.engine import Engine

RNG = torch.Generator().manual_seed(0)


def matrix(rows, columns):
    return torch.randn(rows, columns, generator=RNG).bfloat16()


def test_every_number_is_within_half_a_step_of_its_rows_scale():
    """Rows are scaled one by one: a row of large numbers does not make the others coarse."""
    weight = matrix(6, 50) * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 0.0]).bfloat16().unsqueeze(1)

    rounded, scales = int8.round_rows(weight)

    back = rounded.double() * scales.double().unsqueeze(1)
    step = scales.double().unsqueeze(1)
    assert ((back - weight.double()).abs() <= 0.51 * step + 0.005 * weight.double().abs()).all()
    assert (rounded[5] == 0).all() and torch.isfinite(scales).all()
    assert (rounded[:5].abs().amax(dim=1) >= 126).all()


@pytest.mark.parametrize("rows", [1, 2, int8.FEW, int8.FEW + 1, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_few_rows_and_many_are_the_product_with_the_rounded_matrix(rows, bias, monkeypatch):
    monkeypatch.setattr(int8, "BLOCK", 96 * 10)  # of ten rows, so that the last block is smaller
    weight, x = matrix(64, 96), matrix(rows, 96)
    added = matrix(1, 64)[0] if bias else None
    rounded, scales = int8.round_rows(weight)

    out = int8.linear(x, rounded, scales, added)

    exact = (x.double() @ rounded.double().T) * scales.double()
    if added is not None:
        exact += added.double()
    assert out.dtype is torch.bfloat16
    assert float((out.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("columns", [20, 40, 47])
def test_rows_that_torchs_product_would_read_beyond_are_left_to_another(columns):
    weight, x = matrix(64, columns), matrix(3, columns)
    rounded, scales = int8.round_rows(weight)

    out = int8.linear(x, rounded, scales)

    exact = (x.double() @ rounded.double().T) * scales.double()
    assert float((out.double() - exact).norm() / exact.norm()) < 0.01


def test_without_torchs_product_for_few_rows_the_numbers_are_the_same(monkeypatch):
    weight, x = matrix(64, 96), matrix(3, 96)
    rounded, scales = int8.round_rows(weight)
    usual = int8.linear(x, rounded, scales).float()

    monkeypatch.setattr(int8, "_few_rows", None)

    torch.testing.assert_close(
        int8.linear(x, rounded, scales).float(), usual, rtol=0.02, atol=0.02 * float(usual.std())
    )


# -- the engine ----------------------------------------------------------------------------------


def sampled(engine, **more):
    params = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    prompt = types.ModelInput.from_ints(list(b"The owl and the pussycat"))
    engine.submit_sample("t", "s", types.SampleRequest(prompt, params, **more))
    while True:
        for _, response in engine.sample_step():
            if isinstance(response, Exception):
                raise response
            return response


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The same adapter over exact and over rounded weights."""
    exact, rounded = Engine(device="cpu"), Engine(device="cpu", dtype="int8")
    directory = tmp_path_factory.mktemp("adapter")
    exact.load_base("tiny")
    exact.create_model("m", "tiny", types.LoraConfig(rank=4), seed=0)
    exact._models["m"].weights.normal_(0, 0.05, generator=RNG)
    exact.save("m", directory, optimizer=False)
    rounded.load_base("tiny")
    for engine in (exact, rounded):
        engine.open_sampler("s", "tiny", directory=directory)
    return exact, rounded


def test_logprobs_of_sampled_tokens_are_near_the_models_own(engines):
    exact, rounded = (sampled(engine).sequences[0] for engine in engines)

    assert exact.tokens_np[0] == rounded.tokens_np[0]
    np.testing.assert_allclose(rounded.logprobs_np[0], exact.logprobs_np[0], atol=0.15)


def test_an_adapter_matters_as_over_exact_weights(engines):
    """It is not rounded: it is multiplied beside the matrices."""
    _, rounded = engines
    rounded.open_sampler("bare", "tiny")
    with_adapter = sampled(rounded).sequences[0]
    rounded.submit_sample(
        "t",
        "bare",
        types.SampleRequest(
            types.ModelInput.from_ints(list(b"The owl and the pussycat")),
            types.SamplingParams(max_tokens=6, temperature=0.0, stop=[]),
        ),
    )
    [(_, without)] = [done for _ in range(10) for done in rounded.sample_step()]

    assert not np.allclose(with_adapter.logprobs_np, without.sequences[0].logprobs_np, atol=1e-3)


def test_matrices_take_half_of_what_bfloat16_takes(engines):
    _, rounded = engines
    half = Engine(device="cpu", dtype="bfloat16")
    half.load_base("tiny")

    assert 2 * rounded._base("tiny").base.nbytes == half._base("tiny").base.nbytes


def test_nothing_is_trained_on_rounded_weights(engines):
    _, rounded = engines

    with pytest.raises(ValueError, match=r"trains no model: its weights are int8.*another --dtype"):
        rounded.create_model("m", "tiny", types.LoraConfig(rank=4), seed=0)


@pytest.mark.parametrize("asked", [{"prompt_logprobs": True}, {"topk_prompt_logprobs": 2}])
def test_prompts_are_not_scored_with_rounded_weights(engines, asked):
    """Their log-probabilities are what losses are computed from."""
    _, rounded = engines

    with pytest.raises(ValueError, match=r"no log-probabilities of prompts.*int8"):
        sampled(rounded, **asked)


def test_other_devices_are_refused_with_what_to_choose():
    with pytest.raises(ValueError, match="'int8' is for a CPU; on meta choose auto or bfloat16"):
        Engine(device="meta", dtype="int8")


def test_a_model_of_the_generic_path_is_not_rounded(tmp_path):
    """transformers' modules multiply by matrices of their own."""
    directory = hf.make_base(tmp_path / "base", "gpt2")

    with pytest.raises(ValueError, match="cannot be rounded to int8: its family is computed by"):
        Engine(device="cpu", dtype="int8").load_base(str(directory))


def test_a_product_of_torch_that_is_wrong_is_not_used(monkeypatch):
    """It is no public part of torch: another version may mean something else by it."""
    right = int8._find_few_rows()
    wrong = types_of_product(lambda x, weight, scales: torch.zeros(len(x), len(weight)))
    absent = SimpleNamespace()

    assert right is None or callable(right)
    for operations in (wrong, absent):
        monkeypatch.setattr(torch.ops, "aten", operations)
        assert int8._find_few_rows() is None


def types_of_product(function):
    """What torch.ops.aten offers, with this as its product of few rows."""
    return SimpleNamespace(_weight_int8pack_mm=SimpleNamespace(default=function))
