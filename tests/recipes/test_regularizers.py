"""Regularizers: values from their formulas in numpy, gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tinkex
from tinkex import types
from tinkex.recipes import regularizers

LENGTHS = (4, 6, 5)


def datums(**inputs):
    """Three datums; the first target of each does not count. Given inputs are flat arrays."""
    parts = {key: np.split(value, np.cumsum(LENGTHS)[:-1]) for key, value in inputs.items()}
    return [
        types.Datum(
            types.ModelInput.from_ints(np.arange(1, n + 1)),
            {
                "target_tokens": np.arange(n),
                "weights": np.array([0.0, *[0.5] * (n - 1)], np.float32),
                **{key: value[i].astype(np.float32) for key, value in parts.items()},
            },
        )
        for i, n in enumerate(LENGTHS)
    ]


RNG = np.random.default_rng(0)
LP, LQ = -RNG.uniform(0.1, 3, (2, sum(LENGTHS)))
COUNTS = np.concatenate([[0.0, *[1.0] * (n - 1)] for n in LENGTHS])


def nonlinear(data, logprobs):
    return sum((lp**3).sum() for lp in logprobs), {}


MADE = {
    "l1": (regularizers.l1(), np.abs(LP)),
    "l2": (regularizers.l2(), LP**2),
    "elastic_net": (
        regularizers.elastic_net(l1_ratio=0.3),
        0.3 * np.abs(LP) + 0.7 * LP**2,
    ),
    "entropy": (regularizers.entropy(), np.exp(LP) * LP),
    "entropy-minimize": (regularizers.entropy(mode="minimize"), -np.exp(LP) * LP),
    "kl": (regularizers.kl(), np.exp(LP) * (LP - LQ)),
    "kl-reverse": (regularizers.kl(direction="reverse"), np.exp(LQ) * (LQ - LP)),
    "kl-symmetric": (
        regularizers.kl(symmetric=True),
        (np.exp(LP) - np.exp(LQ)) * (LP - LQ) / 2,
    ),
    "consistency": (regularizers.consistency(pair="reference_logprobs"), (LP - LQ) ** 2),
    "consistency-mae": (
        regularizers.consistency(pair="reference_logprobs", metric="mae"),
        np.abs(LP - LQ),
    ),
    "consistency-kl": (
        regularizers.consistency(pair="reference_logprobs", metric="kl"),
        np.exp(LP) * (LP - LQ),
    ),
}
OTHERS = {
    "gradient_penalty": regularizers.gradient_penalty(loss_fn=nonlinear, target_norm=2.0),
    "gradient_penalty-interpolated": regularizers.gradient_penalty(
        loss_fn=nonlinear, target_norm=2.0, mode="interpolated", seed=3
    ),
    "kl-computed": regularizers.kl(
        reference=lambda data, logprobs: [
            d.loss_fn_inputs["reference_logprobs"].values for d in data
        ]
    ),
    "orthogonality": regularizers.orthogonality(),
    "sum": regularizers.l2(reduction="sum"),
}


def value_of(regularizer, lp, requires_grad=False):
    leaves = [
        torch.tensor(part, dtype=torch.float64, requires_grad=True)
        for part in np.split(lp, np.cumsum(LENGTHS)[:-1])
    ]
    value, metrics = regularizer(datums(reference_logprobs=LQ), leaves)
    return value, leaves, metrics


@pytest.mark.parametrize("name", MADE)
def test_the_value_is_the_mean_of_the_formula_over_the_tokens_that_count(name):
    regularizer, each = MADE[name]

    value, _, metrics = value_of(regularizer, LP)

    assert float(value.detach()) == pytest.approx((each * COUNTS).sum() / COUNTS.sum(), rel=1e-6)
    assert metrics and all(np.isfinite(float(number)) for number in metrics.values())


@pytest.mark.parametrize("name", [*MADE, *OTHERS])
def test_the_gradient_is_that_of_finite_differences(name):
    """In particular, no penalty is a constant."""
    regularizer = OTHERS.get(name) or MADE[name][0]
    value, leaves, _ = value_of(regularizer, LP)
    value.backward()
    found = np.concatenate([leaf.grad.numpy() for leaf in leaves])

    expected = []
    for i in range(len(LP)):
        step = np.zeros_like(LP)
        step[i] = 1e-5
        ends = [float(value_of(regularizer, LP + s)[0].detach()) for s in (step, -step)]
        expected.append((ends[0] - ends[1]) / 2e-5)

    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert found.any()


def test_the_gradient_penalty_is_the_distance_of_the_norm_from_its_target():
    norm = np.sqrt(((3 * LP**2) ** 2).sum())

    value, _, metrics = value_of(OTHERS["gradient_penalty"], LP)

    assert float(value.detach()) == pytest.approx((norm - 2.0) ** 2)
    assert float(metrics["norm"]) == pytest.approx(norm)


def test_the_interpolated_gradient_is_between_the_log_probabilities_and_the_reference():
    draws = np.repeat(np.random.default_rng(3).random(len(LENGTHS)), LENGTHS)
    norm = np.sqrt(((3 * (draws * LP + (1 - draws) * LQ) ** 2) ** 2).sum())

    _, _, metrics = value_of(OTHERS["gradient_penalty-interpolated"], LP)

    assert float(metrics["norm"]) == pytest.approx(norm, rel=1e-6)


def test_no_gradient_goes_through_a_computed_reference():
    """KL to the model itself is 0 wherever it is; its gradient is that of a fixed reference."""
    itself = regularizers.kl(reference=lambda data, logprobs: [lp.detach() for lp in logprobs])

    value, leaves, _ = value_of(regularizers.kl(reference=lambda data, logprobs: logprobs), LP)
    value.backward()
    expected, others, _ = value_of(itself, LP)
    expected.backward()

    assert 0 == float(value.detach()) == float(expected.detach())
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(leaves, others))
    assert leaves[0].grad.any()


def test_orthogonal_log_probabilities_cost_nothing():
    logprobs = [torch.tensor([-1.0, 0.0]), torch.tensor([0.0, -2.0, 7.0])]
    assert 0 == float(regularizers.orthogonality()([], logprobs)[0])
    same = [logprobs[0], 3 * logprobs[0]]
    assert float(regularizers.orthogonality()([], same)[0]) == pytest.approx(1)


@pytest.mark.parametrize("name", ["kl", "consistency"])
def test_each_datum_is_compared_with_its_own_reference(name):
    """Not with the first one's: at the reference itself the value is 0."""
    made = getattr(regularizers, name)
    arrays = np.split(LP, np.cumsum(LENGTHS)[:-1])
    by_list = {"kl": {"reference": arrays}, "consistency": {"pair": arrays}}[name]

    assert float(value_of(made(**by_list), LP)[0].detach()) == 0
    assert float(value_of(made(**by_list), LQ)[0].detach()) != 0


def test_a_sum_has_metrics_of_each_part():
    def loss(data, logprobs):
        return -sum(lp.sum() for lp in logprobs), {"mine": 1.0}

    combined = regularizers.combine(
        loss, regularizers.l2(0.5), regularizers.l1(2.0), track_grad_norms=True
    )
    value, leaves, metrics = value_of(combined, LP)
    value.backward()

    l1, l2 = (float(value_of(getattr(regularizers, n)(), LP)[0].detach()) for n in ("l1", "l2"))
    assert float(value.detach()) == pytest.approx(-LP.sum() + 2 * l1 + 0.5 * l2)
    assert float(metrics["l2/contribution"]) == pytest.approx(0.5 * l2)
    assert float(metrics["regularizer_total"]) == pytest.approx(2 * l1 + 0.5 * l2)
    assert 1.0 == metrics["mine"]
    gradient = np.concatenate([leaf.grad.numpy() for leaf in leaves])
    assert metrics["total_grad_norm"] == pytest.approx(np.linalg.norm(gradient))
    assert metrics["base_loss/grad_norm"] == pytest.approx(np.sqrt(len(LP)))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: regularizers.l1(-1.0), "weight of 'l1' must be a number of at least 0, got -1.0"),
        (lambda: regularizers.l1(name=""), "name must be a text that is not empty"),
        (lambda: regularizers.kl(direction="up"), 'direction must be "forward" or "reverse"'),
        (lambda: regularizers.entropy(mode="x"), 'mode must be "maximize" or "minimize"'),
        (lambda: regularizers.consistency(metric="x"), 'metric must be "mse", "mae" or "kl"'),
        (
            lambda: regularizers.gradient_penalty(loss_fn=nonlinear, mode="x"),
            'mode must be "output" or "interpolated"',
        ),
        (
            lambda: regularizers.of_model(None)(datums(), []),
            r"targets of data\[0\] are not its tokens shifted by one",
        ),
        (lambda: regularizers.elastic_net(l1_ratio=2), "l1_ratio must be from 0 to 1"),
        (
            lambda: regularizers.combine(nonlinear, regularizers.l1(), regularizers.l1()),
            "two regularizers are called 'l1'",
        ),
        (lambda: value_of(regularizers.kl(reference="gone"), LP), r"data\[0\] has no loss input"),
        (lambda: value_of(regularizers.kl(reference=[LP]), LP), "1 arrays were given for 3 datums"),
        (
            lambda: value_of(regularizers.kl(reference=[LP, LP, LP]), LP),
            r"data\[0\] have 15 values, its targets 4",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, problem):
    with pytest.raises(ValueError, match=problem):
        make()


def test_a_model_is_trained_on_a_sum(tmp_path, monkeypatch):
    """Through the engine: the metrics of the parts arrive with those of the loss."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))
    with tinkex.ServiceClient() as service:
        training = service.create_lora_training_client("tiny", rank=4)
        loss = regularizers.combine(nonlinear, regularizers.kl(0.1), regularizers.entropy(0.1))

        output = training.forward_backward_custom(datums(reference_logprobs=LQ), loss).result()

    assert {"kl", "kl/contribution", "entropy", "base_loss"} <= set(output.metrics)
    assert output.metrics["loss:sum"] == pytest.approx(
        output.metrics["base_loss"] + output.metrics["regularizer_total"], rel=1e-5
    )


def test_another_model_is_a_reference(tmp_path, monkeypatch):
    """The base model: an adapter that was never trained is at a divergence of 0 from it. It is
    asked about a datum once."""
    monkeypatch.setenv("TINKEX_HOME", str(tmp_path))
    tokens = np.arange(40, 60)
    data = [
        types.Datum(
            types.ModelInput.from_ints(tokens[:n]), {"target_tokens": tokens[1 : n + 1].copy()}
        )
        for n in (6, 19)
    ]
    asked = []
    with tinkex.ServiceClient() as service:
        training = service.create_lora_training_client("tiny", rank=4)
        sampler = service.create_sampling_client(base_model="tiny")
        ask = sampler.compute_logprobs
        monkeypatch.setattr(sampler, "compute_logprobs", lambda x: asked.append(x) or ask(x))
        pulled = regularizers.combine(
            nonlinear, regularizers.kl(reference=regularizers.of_model(sampler))
        )
        found = []
        for _ in range(3):
            output = training.forward_backward_custom(data, pulled)
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            found.append(output.result().metrics["kl/gap"])

    assert found[0] == pytest.approx(0, abs=1e-5)
    assert abs(found[2]) > 1e-2
    assert 2 == len(asked)
