"""A user's loss on log-probabilities -> weights to send: its gradient, negated."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_server import datum, logprobs_of
from tinkex import errors, types
from tinkex.runtime import custom_loss

torch = pytest.importorskip("torch")

LOGPROBS = [np.array([-0.5, -1.5, -0.25], np.float32), np.array([-2.0], np.float32)]
DATA = [datum(1, 2, 3), datum(4)]


def weights(evaluated):
    return [d.loss_fn_inputs["weights"].to_numpy() for d in evaluated.data]


def evaluate(loss_fn, framework, data=DATA, logprobs=LOGPROBS):
    return custom_loss.evaluate(data, logprobs, loss_fn, framework)


def finite_differences(loss, logprobs, step=1e-4):
    """d loss / d logprobs by (f(x + h) - f(x - h)) / 2h, in float64."""
    arrays = [a.astype(np.float64) for a in logprobs]
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for i in range(array.size):
            for sign in (1, -1):
                array.reshape(-1)[i] += sign * step
                gradient.reshape(-1)[i] += sign * loss(arrays) / (2 * step)
                array.reshape(-1)[i] -= sign * step
        gradients.append(gradient)
    return gradients


#: Losses of the field, each written once for numpy, torch and autograd's numpy.
LOSSES = {
    "sum": lambda xp, lps: sum(lp.sum() for lp in lps),
    "squares": lambda xp, lps: sum((lp**2).sum() for lp in lps),
    "dpo": lambda xp, lps: xp.log(1 + xp.exp(-0.1 * (lps[0].sum() - lps[1].sum()))),
    "ratio": lambda xp, lps: -sum((xp.exp(lp + 1.0) * 0.7).sum() for lp in lps),
    "product": lambda xp, lps: lps[0].sum() * lps[1].sum(),
    "only the first": lambda xp, lps: lps[0][1] * 3.0,
    "of each token": lambda xp, lps: lps[0] * lps[0],
}


@pytest.mark.parametrize("framework", ["torch", "autograd"])
@pytest.mark.parametrize("formula", LOSSES.values(), ids=LOSSES)
def test_the_weights_are_the_gradient_negated(framework, formula):
    """Against finite differences; a loss that is no scalar is summed."""
    if framework == "torch":
        xp = torch
    else:
        xp = pytest.importorskip("autograd.numpy")

    evaluated = evaluate(lambda data, lps: (formula(xp, lps), {}), framework)
    expected = finite_differences(lambda lps: np.sum(formula(np, lps)), LOGPROBS)

    for weight, gradient in zip(weights(evaluated), expected):
        np.testing.assert_allclose(weight, -gradient, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(evaluated.loss, np.sum(formula(np, LOGPROBS)), rtol=1e-5)


ARRAYS = st.lists(
    st.lists(st.floats(-8, 0, width=32), min_size=1, max_size=6), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(ARRAYS, st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_torch_and_autograd_agree_on_any_data(values, coefficients):
    """Two independent derivations of the same loss."""
    anp = pytest.importorskip("autograd.numpy")
    a, b, c = coefficients
    logprobs = [np.array(v, np.float32) for v in values]
    data = [datum(*range(1, len(v) + 1)) for v in values]

    def loss(xp):
        return lambda data, lps: (
            sum(a * lp.sum() + b * (lp**2).sum() + c * xp.exp(lp).sum() for lp in lps),
            {},
        )

    of_torch = evaluate(loss(torch), "torch", data, logprobs)
    of_autograd = evaluate(loss(anp), "autograd", data, logprobs)

    for one, other in zip(weights(of_torch), weights(of_autograd)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert of_torch.loss == pytest.approx(of_autograd.loss, rel=1e-4, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(ARRAYS)
def test_the_stand_in_has_the_gradient_of_the_loss(values):
    """What the whole rests on: d/dlp of sum(-w lp), with w = -dL/dlp, is dL/dlp."""
    logprobs = [np.array(v, np.float32) for v in values]
    data = [datum(*range(1, len(v) + 1)) for v in values]
    evaluated = evaluate(
        lambda data, lps: (sum((lp**3).sum() for lp in lps), {}), "torch", data, logprobs
    )
    leaves = [torch.from_numpy(lp.copy()).requires_grad_() for lp in logprobs]
    surrogate = sum((-torch.from_numpy(w) * lp).sum() for w, lp in zip(weights(evaluated), leaves))
    surrogate.backward()

    for leaf, lp in zip(leaves, logprobs):
        np.testing.assert_allclose(leaf.grad.numpy(), 3 * lp**2, rtol=1e-4)


@pytest.mark.parametrize("framework", [None, "torch", "autograd"])
def test_gradients_may_be_given(framework):
    """Then nothing is differentiated, whatever is installed."""
    given_gradients = [np.array([1.0, 2.0, 3.0]), [4.0]]
    evaluated = evaluate(lambda data, lps: (5.0, {"a": 1}, given_gradients), framework)

    np.testing.assert_array_equal([-1, -2, -3], weights(evaluated)[0])
    np.testing.assert_array_equal([-4], weights(evaluated)[1])
    assert (5.0, {"a": 1.0}) == (evaluated.loss, evaluated.metrics)


def test_gradients_may_be_given_as_tensors():
    evaluated = evaluate(
        lambda data, lps: (lps[0].sum(), {}, [torch.ones(3), torch.ones(1)]), "torch"
    )

    np.testing.assert_array_equal([-1], weights(evaluated)[1])


@pytest.mark.parametrize("framework", ["torch", "autograd"])
def test_the_loss_is_called_once(framework):
    """Theirs is called twice, so that side effects happen twice."""
    calls = []

    def loss(data, lps):
        calls.append(data)
        return sum((lp * lp).sum() for lp in lps), {}

    evaluate(loss, framework)

    assert [DATA] == calls


@pytest.mark.parametrize("framework", ["torch", "autograd"])
def test_metrics_may_be_of_the_framework(framework):
    """They become plain numbers, traced or not."""
    evaluated = evaluate(
        lambda data, lps: (lps[0].sum(), {"mean": lps[0].mean(), 7: np.float32(2), "n": 3}),
        framework,
    )

    assert {"mean": pytest.approx(-0.75), "7": 2.0, "n": 3.0} == evaluated.metrics
    assert {float} == {type(v) for v in evaluated.metrics.values()}


def test_a_datum_that_the_loss_does_not_look_at_gets_weights_of_zero():
    evaluated = evaluate(lambda data, lps: (lps[0].sum(), {}), "torch")

    np.testing.assert_array_equal([0.0], weights(evaluated)[1])


def test_a_torch_loss_that_does_not_depend_on_the_logprobs_is_a_mistake():
    """`.detach()`, or numbers taken out of the tensors: nothing would be learned, silently."""
    for loss in (
        lambda data, lps: (torch.tensor(1.0), {}),
        lambda data, lps: (lps[0].detach().sum(), {}),
        lambda data, lps: (float(lps[0].detach().sum()), {}),
    ):
        with pytest.raises(ValueError, match="the loss does not depend on the logprobs"):
            evaluate(loss, "torch")


def test_an_autograd_loss_that_does_not_depend_on_the_logprobs_is_a_mistake_too():
    pytest.importorskip("autograd")
    with pytest.raises(ValueError, match="the loss does not depend on the logprobs"):
        evaluate(lambda data, lps: (1.0, {}), "autograd")


def test_the_arrays_are_of_the_shape_of_the_targets():
    """(N, K) targets, as in distillation on k tokens at each position."""
    tokens = types.ModelInput.from_ints([1, 2])
    data = [types.Datum(tokens, {"target_tokens": np.array([[1, 2, 3], [4, 5, 6]])})]
    shapes = []

    def loss(data, lps):
        shapes.append(tuple(lps[0].shape))
        return (lps[0] ** 2).sum(), {}

    output = types.ForwardBackwardOutput([{"logprobs": types.TensorData(-np.ones(6))}], {})
    logprobs = custom_loss.logprobs_of(output, data)
    evaluated = evaluate(loss, "torch", data, logprobs)

    assert [(2, 3)] == shapes
    np.testing.assert_array_equal(2 * np.ones((2, 3)), weights(evaluated)[0])


# What is sent.


def test_the_forward_pass_is_of_what_the_server_knows():
    """Other loss inputs are the function's; the server would refuse them."""
    one = types.Datum(
        types.ModelInput.from_ints([1]),
        {"target_tokens": [2], "weights": [1.0], "reward": types.TensorData([1.0, 2.0])},
    )

    [sent] = custom_loss.forward_data([one])

    assert {"target_tokens", "weights"} == set(sent.loss_fn_inputs)


def test_the_backward_pass_is_of_targets_and_weights():
    [first, _] = evaluate(lambda data, lps: (lps[0].sum(), {}), "torch").data

    assert DATA[0].model_input is first.model_input
    assert {"target_tokens", "weights"} == set(first.loss_fn_inputs)
    assert "float32" == first.loss_fn_inputs["weights"].dtype


def test_inputs_of_one_s_own_may_have_any_shape():
    """A reward for the whole answer, the index of its pair."""
    one = types.Datum(
        types.ModelInput.from_ints([1, 2]),
        {"target_tokens": [2, 3], "reward": types.TensorData([1.0]), "pair": np.array(7)},
    )

    assert custom_loss.check([one], "torch")


# What comes back.


def test_the_user_s_metrics_are_merged_over_the_server_s():
    output = types.ForwardBackwardOutput([], {"loss:sum": 3.0, "other": 1.0, "mine": 0.0})
    evaluated = custom_loss.Evaluated(7.0, {"mine": 5.0}, [])

    assert {
        "loss:sum": 7.0,
        "surrogate_loss:sum": 3.0,
        "other": 1.0,
        "mine": 5.0,
    } == custom_loss.with_metrics(output, evaluated).metrics


@pytest.mark.parametrize(
    "outputs, words",
    [
        ([], "0 outputs for 2 datums"),
        ([{"x": types.TensorData([1.0])}] * 2, r"no logprobs for datum 0, only \['x'\]"),
        ([{"logprobs": types.TensorData([1.0])}] * 2, r"1 logprobs for the targets of datum 0, of"),
    ],
)
def test_an_answer_that_does_not_fit_the_data_is_the_server_s_mistake(outputs, words):
    with pytest.raises(errors.APIResponseValidationError, match=words):
        custom_loss.logprobs_of(types.ForwardBackwardOutput(outputs, {}), DATA)


def test_the_log_probabilities_come_in_the_order_of_the_data():
    outputs = [{"logprobs": types.TensorData(logprobs_of(d))} for d in DATA]
    got = custom_loss.logprobs_of(types.ForwardBackwardOutput(outputs, {}), DATA)

    for array, one in zip(got, DATA):
        np.testing.assert_array_equal(logprobs_of(one), array)
        assert np.float32 == array.dtype


# Frameworks.


def without(monkeypatch, *names):
    """As if these were not installed."""
    find = custom_loss.importlib.util.find_spec
    monkeypatch.setattr(
        custom_loss.importlib.util,
        "find_spec",
        lambda name, *a: None if name in names else find(name, *a),
    )


@pytest.mark.parametrize(
    "missing, chosen",
    [((), "torch"), (("torch",), "autograd"), (("torch", "autograd"), None)],
)
def test_the_framework_is_what_is_installed(monkeypatch, missing, chosen):
    pytest.importorskip("autograd")
    without(monkeypatch, *missing)

    assert chosen == custom_loss.check(DATA, None)


def test_without_any_the_gradients_must_be_given():
    with pytest.raises(TypeError, match=r"must return \(loss, metrics, gradients\)"):
        evaluate(lambda data, lps: (1.0, {}), None)


@pytest.mark.parametrize("name", custom_loss.FRAMEWORKS)
def test_a_framework_that_is_not_installed_is_told_before_anything_is_sent(monkeypatch, name):
    without(monkeypatch, name)

    with pytest.raises(errors.MissingExtraError, match=f"pip install {name}"):
        custom_loss.check(DATA, name)


def test_an_unknown_framework_is_told_with_the_known_ones():
    with pytest.raises(ValueError, match="'tensorflow' is not one of torch, autograd, jax"):
        custom_loss.check(DATA, "tensorflow")


class FakeJax:
    """jax in as far as it is called, on finite differences: the real one is large."""

    class numpy:
        sum, asarray = staticmethod(np.sum), staticmethod(np.asarray)

    @staticmethod
    def value_and_grad(function, has_aux):
        def both(arrays):
            gradients = finite_differences(lambda lps: function(lps)[0], arrays)
            return function(arrays), gradients

        return both


def test_jax_is_used_as_jax_wants(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", FakeJax)
    monkeypatch.setitem(sys.modules, "jax.numpy", FakeJax.numpy)
    evaluated = evaluate(lambda data, lps: (sum((lp**2).sum() for lp in lps), {"a": 1}), "jax")

    np.testing.assert_allclose(weights(evaluated)[0], -2 * LOGPROBS[0], rtol=1e-2)
    assert {"a": 1.0} == evaluated.metrics


def test_importing_it_imports_no_framework():
    code = "import sys, tinkex.runtime.custom_loss; print({'torch', 'autograd'} & set(sys.modules))"

    assert "set()\n" == subprocess.check_output([sys.executable, "-c", code], text=True)


def test_the_data_are_the_user_s_own_objects():
    """So that a loss may look up what it knows of them."""
    seen = []
    evaluate(lambda data, lps: (seen.extend(data) or lps[0].sum(), {}), "torch")

    assert all(a is b for a, b in zip(DATA, seen))


def test_a_loss_of_one_datum_is_summed_over_the_batch():
    """The gradients are those of the sum; ":mean" metrics are averaged, others summed."""

    def weighted(logprobs, weights):
        loss = -(logprobs * weights).sum()
        return loss, {"custom/n:sum": torch.tensor(1.0), "custom/loss:mean": loss}

    handle = custom_loss.make_handle(weighted, {"weights": 1}, "s")
    weights = [np.float32([1, 2]), np.float32([3, 4, 5])]
    data = [
        types.Datum(
            types.ModelInput.from_ints(range(1, len(w) + 1)),
            {"target_tokens": list(range(len(w))), "weights": w},
        )
        for w in weights
    ]
    logprobs = [np.float32([-1, -2]), np.float32([-1, -1, -1])]
    found = custom_loss.evaluate(data, logprobs, handle, "torch")

    assert (17.0, 2.0, 8.5) == (
        found.loss,
        found.metrics["custom/n:sum"],
        found.metrics["custom/loss:mean"],
    )
    for expected, sent in zip(weights, found.data):
        np.testing.assert_allclose(sent.loss_fn_inputs["weights"].to_numpy(), expected)


@pytest.mark.parametrize(
    "function, ranks, error, match",
    [
        (5, {}, TypeError, "got 5"),
        (lambda: None, {}, ValueError, "takes nothing"),
        (lambda logprobs, weights: None, {}, ValueError, "'weights'.*got None"),
        (lambda logprobs, weights: None, {"weights": 3}, ValueError, "got 3"),
    ],
)
def test_what_is_no_loss_of_a_datum_is_refused(function, ranks, error, match):
    with pytest.raises(error, match=match):
        custom_loss.make_handle(function, ranks, "s")


def test_a_datum_without_an_input_of_the_loss_is_named():
    handle = custom_loss.make_handle(lambda logprobs, q: (0, {}), {"q": 1}, "s")
    datum = types.Datum(types.ModelInput.from_ints([1]), {"target_tokens": [2], "w": np.ones(1)})

    with pytest.raises(ValueError, match=r"data\[0\] has no loss input 'q'"):
        handle([datum], [np.zeros(1)])
    wide = types.Datum(datum.model_input, {"target_tokens": [2], "q": np.ones((1, 2))})
    with pytest.raises(ValueError, match=r"data\[0\].q has 2 dimensions; .* for 1"):
        handle([wide], [np.zeros(1)])
