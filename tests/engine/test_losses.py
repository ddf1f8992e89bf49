"""Every loss function, against autograd of its formula, finite differences and PEFT's model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support import hf_reference as hf
from tinkex import types
from tinkex.engine import losses
from tinkex.engine.engine import Engine

CONFIGS = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1},
    "dro": {"beta": 0.3},
    "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "trinity_ppo": {
        "num_total_datums": 5.0,
        "clip_range": 0.1,
        "clip_ratio_c": 1.2,
        "kl_coef": 0.3,
    },
}


def formula(name, lp, d, c):
    """The table of the API, in torch's own words; one sequence."""
    if name == "cross_entropy":
        return -(d["weights"] * lp)
    q, a = d["logprobs"], d["advantages"]
    ratio = (lp - q).exp()
    if name == "importance_sampling":
        return -(ratio * a)
    if name == "dro":
        return -(lp * a - 0.5 * c["beta"] * (lp - q) ** 2)
    if name == "trinity_ppo":
        bounded = ratio.clamp(1 - c["clip_range"], 1 + c["clip_range"])
        each = torch.where(
            a < 0,
            torch.maximum(torch.minimum(ratio * a, bounded * a), c["clip_ratio_c"] * a),
            torch.minimum(ratio * a, bounded * a),
        )
        each = -each + c["kl_coef"] * (lp - d["ref_logprobs"]) ** 2 / 2
        return each * d["mask"] / d["mask"].sum() / c["num_total_datums"]
    low, high = c["clip_low_threshold"], c["clip_high_threshold"]
    if name == "cispo":
        return -(ratio.clamp(low, high).detach() * lp * a)
    if name == "gspo":
        mask = d["sequence_ratio_mask"]
        mean = ((lp - q) * mask).sum() / mask.sum()
        ratio = (mean.detach() + lp - lp.detach()).exp()
    return -torch.minimum(ratio * a, ratio.clamp(low, high) * a)


def random_inputs(name, lp, rng):
    """As a sampling policy a little away from lp would give them."""
    n = len(lp)
    if name == "cross_entropy":
        return {"weights": rng.normal(size=n).astype(np.float32)}
    inputs = {
        "logprobs": (lp + rng.normal(0, 0.2, n)).astype(np.float32),
        "advantages": rng.normal(size=n).astype(np.float32),
    }
    if name == "gspo":
        inputs["sequence_ratio_mask"] = np.ones(n, np.float32)
        inputs["sequence_ratio_mask"][: n // 3] = 0
    if name == "trinity_ppo":
        inputs["ref_logprobs"] = (lp + rng.normal(0, 0.2, n)).astype(np.float32)
        inputs["mask"] = (np.arange(n) >= n // 3).astype(np.float32)
    return inputs


def packed(arrays, config, lengths):
    columns = {k: torch.from_numpy(v).double().unsqueeze(1) for k, v in arrays.items()}
    sequence = torch.repeat_interleave(torch.tensor(lengths))
    return losses.Inputs(columns, config, sequence, len(lengths))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "gspo"])  # its mean is constant
def test_the_derivative_is_the_finite_difference(name):
    """Away from the corners of the clip, where there is no derivative."""
    rng = np.random.default_rng(3)
    lp = -rng.random(50) * 3
    inputs = packed(random_inputs(name, lp, rng), CONFIGS[name], [20, 30])
    at = torch.from_numpy(lp).unsqueeze(1)

    def loss(x):
        if name == "cispo":  # its ratio is a constant to the gradient
            return losses.cispo(at, inputs)[1] * x
        return losses.LOSSES[name](x, inputs)[0]

    _, slopes = losses.LOSSES[name](at, inputs)

    step = 1e-6
    numeric = (loss(at + step) - loss(at - step)) / (2 * step)
    torch.testing.assert_close(slopes, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_derivative_are_those_of_the_formula(name):
    """Two sequences at once, each as if alone."""
    rng = np.random.default_rng(4)
    lengths = [20, 31]
    lp = -rng.random(sum(lengths)) * 3
    arrays = random_inputs(name, lp, rng)
    x = torch.from_numpy(lp).requires_grad_()
    tensors = {key: torch.from_numpy(value).double() for key, value in arrays.items()}
    expected = torch.cat(
        [
            formula(name, x[rows], {k: v[rows] for k, v in tensors.items()}, CONFIGS[name])
            for rows in (slice(0, 20), slice(20, 51))
        ]
    )
    (slope,) = torch.autograd.grad(expected.sum(), x)

    value, actual = losses.LOSSES[name](
        x.detach().unsqueeze(1), packed(arrays, CONFIGS[name], lengths)
    )

    torch.testing.assert_close(value.squeeze(1), expected.detach())
    torch.testing.assert_close(actual.squeeze(1), slope)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model and an adapter, in the engine and in PEFT."""
    directory = tmp_path_factory.mktemp("losses")
    base = hf.make_base(directory / "base")
    adapter = hf.make_adapter(base, directory / "adapter")
    engine = Engine(device="cpu", threads=1)
    engine.load_base(str(base))
    engine.create_model("m", str(base), types.LoraConfig(rank=8), seed=0, adapter=adapter)
    return engine, hf.load_adapter(base, adapter)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_peft(name, trained, tmp_path):
    """From token ids to the gradient of every LoRA matrix."""
    engine, reference = trained
    rng = np.random.default_rng(5)
    data, total = [], torch.zeros(())
    reference.zero_grad()
    for length in (5, 40, 17):
        tokens = rng.integers(0, hf.VOCAB, length + 1)
        lp = hf.logprobs(reference, tokens[:-1], tokens[1:])
        arrays = random_inputs(name, lp.detach().numpy(), rng)
        data.append(hf.datum(tokens, **arrays))
        tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
        total = total + formula(name, lp, tensors, CONFIGS[name]).sum()
    total.backward()
    expected = hf.peft_gradients(reference)

    output = hf.drive(engine.forward_backward("m", data, name, CONFIGS[name] or None))
    actual = hf.gradients(engine, "m", tmp_path / "snapshot")
    engine.clear_gradients("m")

    assert output.loss == pytest.approx(total.item(), rel=1e-4, abs=1e-4)
    for key in expected:
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=2e-5 * scale)


def test_several_targets_per_token(trained, tmp_path):
    """Distillation: (N, K) targets and weights, dense or sparse, and logprobs in that shape."""
    engine, reference = trained
    rng = np.random.default_rng(6)
    tokens = rng.integers(0, hf.VOCAB, 12)
    targets = rng.integers(0, hf.VOCAB, (12, 3))
    weights = rng.normal(size=(12, 3)).astype(np.float32)
    weights[4:] = 0
    reference.zero_grad()
    lp = hf.logprobs(reference, tokens, targets)
    loss = -(torch.from_numpy(weights) * lp).sum()
    loss.backward()
    expected = hf.peft_gradients(reference)
    given = {"target_tokens": targets, "weights": types.TensorData.from_dense(weights)}
    single = hf.datum(rng.integers(0, hf.VOCAB, 9), weights=np.zeros(8, np.float32))
    data = [single, types.Datum(types.ModelInput.from_ints(tokens), given)]

    output = hf.drive(engine.forward_backward("m", data, "cross_entropy", None))
    actual = hf.gradients(engine, "m", tmp_path / "snapshot")
    engine.clear_gradients("m")

    found = output.loss_fn_outputs[1]["logprobs"].to_numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, lp.detach().numpy(), atol=1e-5)
    assert output.loss_fn_outputs[0]["logprobs"].shape == (8,)
    assert output.loss == pytest.approx(loss.item(), rel=1e-4)
    for key in expected:
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-5 * scale)


def test_missing_weights_are_ones(trained):
    """As in the open servers of the API."""
    engine, _ = trained
    tokens = np.arange(20)

    without = hf.drive(
        engine.forward_backward("m", [hf.datum(tokens)], "cross_entropy", None, forward_only=True)
    )
    ones = hf.datum(tokens, weights=np.ones(19, np.float32))
    given = hf.drive(engine.forward_backward("m", [ones], "cross_entropy", None, forward_only=True))

    assert without.loss == given.loss
    values = without.loss_fn_outputs[0]
    assert values["elementwise_loss"] == types.TensorData(-values["logprobs"].to_numpy())
    assert "CrossEntropyLossReturn" == without.loss_fn_output_type


def test_clip_bounds_may_come_token_by_token(trained):
    """Where a datum brings its own bounds they take the place of the settings."""
    engine, _ = trained
    tokens = np.arange(20)
    inputs = {
        "logprobs": np.full(19, -5.0, np.float32),
        "advantages": np.ones(19, np.float32),
    }
    own = {"clip_high_threshold": np.full(19, 1.05, np.float32)}

    def loss(config, **more):
        data = [hf.datum(tokens, **inputs, **more)]
        return hf.drive(engine.forward_backward("m", data, "ppo", config, forward_only=True)).loss

    assert loss({"clip_high_threshold": 1.05}) == loss(None, **own)
    assert loss(None) != loss(None, **own)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ppo", {"clip_low": 0.8}, "ppo has no setting 'clip_low'; it takes clip_low_threshold"),
        ("cross_entropy", {"beta": 1.0}, "it takes none"),
        ("trinity_ppo", None, "trinity_ppo needs the setting 'num_total_datums': how many datums"),
        ("trinity_ppo", {"num_total_datums": 1.5}, "must be a whole number of at least 1, got 1.5"),
        ("trinity_ppo", {"num_total_datums": 2, "clip_range": 1}, "clip_range must be from 0 to"),
        ("stable_reinforce", None, "its formula is not published; choose one of cross_entropy"),
        ("rl", None, "loss_fn 'rl' is not known"),
        ("ppo", {"clip_low_threshold": 2.0}, "is above clip_high_threshold 1.2"),
        ("cispo", {"clip_high_threshold": 1e39}, "= 1e\\+39 is too large for float32"),
    ],
)
def test_wrong_settings_are_named(name, config, message):
    """With what would be right."""
    with pytest.raises(ValueError, match=message):
        losses.complete_config(name, config)


def test_defaults_are_those_of_the_table():
    """The API's own."""
    assert {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2} == losses.complete_config(
        "ppo", None
    )
    assert {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0} == losses.complete_config(
        "cispo", None
    )


# trinity_ppo, which the official service does not have


def test_a_step_is_the_same_however_its_datums_are_divided(trained, tmp_path):
    """num_total_datums makes it a mean over all of them; metrics are sums."""
    engine, _ = trained
    rng = np.random.default_rng(8)
    config = CONFIGS["trinity_ppo"]
    data = []
    for length in (5, 40, 17):
        tokens = rng.integers(0, hf.VOCAB, length + 1)
        data.append(hf.datum(tokens, **random_inputs("trinity_ppo", np.full(length, -3.0), rng)))

    whole = hf.drive(engine.forward_backward("m", data, "trinity_ppo", config))
    expected = hf.gradients(engine, "m", tmp_path / "whole")
    engine.clear_gradients("m")
    parts = [
        hf.drive(engine.forward_backward("m", part, "trinity_ppo", config))
        for part in (data[:1], data[1:])
    ]
    actual = hf.gradients(engine, "m", tmp_path / "parts")
    engine.clear_gradients("m")

    for key, value in whole.metrics.items():
        assert sum(part.metrics[key] for part in parts) == pytest.approx(value, rel=1e-4)
    tokens = sum(datum.loss_fn_inputs["mask"].to_numpy().sum() for datum in data)
    assert tokens == whole.metrics["trinity/response_tokens:sum"]
    for key in expected:
        scale = float(expected[key].abs().max())
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-5 * scale)


def test_weights_above_zero_are_a_mask(trained):
    engine, _ = trained
    inputs = {"logprobs": np.full(9, -3.0), "advantages": np.ones(9)}
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    mask = (np.arange(9) > 3).astype(np.float32)
    config = {"num_total_datums": 1, "kl_coef": 0}

    by_mask, by_weights = (
        hf.drive(
            engine.forward_backward(
                "m",
                [hf.datum(np.arange(10), **inputs, **given)],
                "trinity_ppo",
                config,
                forward_only=True,
            )
        )
        for given in ({"mask": mask}, {"weights": 0.5 * mask})
    )

    assert by_mask.loss == by_weights.loss != 0
    assert "trinity/kl_sum:sum" not in by_mask.metrics


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"mask": None}, {}, r"data\[0\] lacks a loss input 'mask' or 'weights'"),
        ({"mask": 0.5}, {}, r"data\[0\].*'mask'.* must have only 0 and 1"),
        ({"ref_logprobs": None}, {}, r"data\[0\] lacks the loss input 'ref_logprobs'"),
        ({}, {"num_total_datums": 1}, "num_total_datums is 1, but this request alone has 2"),
    ],
)
def test_wrong_inputs_of_it_are_named(trained, change, config, message):
    engine, _ = trained
    inputs = random_inputs("trinity_ppo", np.full(9, -3.0), np.random.default_rng(9))
    data = [hf.datum(np.arange(10), **inputs)]
    for name, value in change.items():
        inputs[name] = np.full(9, value, np.float32)
        if value is None:
            del inputs[name]
    data.insert(0, hf.datum(np.arange(10), **inputs))

    with pytest.raises(ValueError, match=message):
        hf.drive(
            engine.forward_backward("m", data, "trinity_ppo", {**CONFIGS["trinity_ppo"], **config})
        )
