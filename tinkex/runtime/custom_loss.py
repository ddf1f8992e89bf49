"""A user's loss on log-probabilities, turned into weights to send.

The server computes log-probabilities (a forward pass); the user's function turns them into a loss;
its gradient with respect to them, negated, is sent as the weights of cross_entropy, because d/dlp
of sum(-w lp) is -w. Pure functions: nothing here sends anything.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import numpy as np

from tinkex import errors
from tinkex.types import Datum, ForwardBackwardOutput, TensorData, check_data

Framework = Literal["torch", "autograd", "jax", "numpy"]
FRAMEWORKS: tuple[Framework, ...] = ("torch", "autograd", "jax", "numpy")

#: The loss inputs sent to the server in the forward pass.
_SENT = ("target_tokens", "weights")

#: (data, log-probabilities of each datum) -> (loss, metrics) or (loss, metrics, gradients)
LossFunction = Callable[[Sequence[Datum], list[Any]], tuple[Any, ...]]


@attrs.frozen
class Evaluated:
    """The result of a user's loss.

    Attributes:
        loss: its value.
        metrics: the user's metrics, as floats.
        data: for cross_entropy: each datum's input and targets, with weights.
    """

    loss: float
    metrics: dict[str, float]
    data: list[Datum]


@attrs.frozen(eq=False)
class LossHandle:
    """A loss of one datum, from `ServiceClient.create_custom_loss`, applied to a batch.

    Attributes:
        name: of the function.
        inputs: names of the loss inputs that the function takes after the log-probabilities.
        session_id: of the session that created it.
    """

    name: str
    inputs: tuple[str, ...]
    session_id: str
    _function: Callable[..., tuple[Any, dict[str, Any]]] = attrs.field(repr=False)
    _ranks: dict[str, int] = attrs.field(repr=False)

    def __call__(self, data: Sequence[Datum], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        """The sum over the datums; metrics that end with ":mean" are averaged, others summed."""
        loss: Any = 0
        metrics: dict[str, float] = {}
        for index, (datum, one) in enumerate(zip(data, logprobs)):
            tensors = [self._tensor(index, datum, name) for name in self.inputs]
            value, named = self._function(one, *tensors)
            loss = loss + value
            for key, number in named.items():
                share = len(data) if key.endswith(":mean") else 1
                metrics[key] = metrics.get(key, 0.0) + _as_float(key, number) / share
        return loss, metrics

    def _tensor(self, index: int, datum: Datum, name: str) -> Any:
        tensor = datum.loss_fn_inputs.get(name)
        if tensor is None:
            raise ValueError(
                f"data[{index}] has no loss input {name!r}, which the loss {self.name!r} takes."
            )
        if len(tensor.shape) != self._ranks[name]:
            raise ValueError(
                f"data[{index}].{name} has {len(tensor.shape)} dimensions; the loss "
                f"{self.name!r} was made for {self._ranks[name]}."
            )
        return tensor.to_torch()


def make_handle(function: Any, input_ranks: Mapping[str, int], session_id: str) -> LossHandle:
    """A handle for *function*, which takes log-probabilities and then loss inputs by name.

    Raises:
        TypeError, ValueError: If it is not such a function, or a rank is missing or not 0, 1 or 2.
    """
    if not callable(function):
        raise TypeError(f"fn must be a function (logprobs, *loss inputs), got {function!r}.")
    name = getattr(function, "__name__", "loss")
    parameters = list(inspect.signature(function).parameters)
    if not parameters:
        raise ValueError(f"the loss {name!r} takes nothing; its first argument is logprobs.")
    ranks = dict(input_ranks)
    for wanted in parameters[1:]:
        if ranks.get(wanted) not in (0, 1, 2):
            raise ValueError(
                f"input_ranks must give 0, 1 or 2 for {wanted!r}, which the loss {name!r} takes; "
                f"got {ranks.get(wanted)!r}."
            )
    return LossHandle(name, tuple(parameters[1:]), session_id, function, ranks)


def check(data: Sequence[Datum], framework: str | None) -> Framework | None:
    """Check everything possible before anything is sent, and choose the framework.

    Returns:
        The framework that computes gradients; None if none is installed, so that the function must
        return them itself.

    Raises:
        ValueError, TypeError: For an unknown framework, or data that cross_entropy does not accept;
            additional loss inputs are for the function, and not checked.
        MissingExtraError: For a framework that is not installed.
    """
    check_data(data, "cross_entropy", only=_SENT)
    if framework is None:
        found = (name for name in ("torch", "autograd") if importlib.util.find_spec(name))
        return next(found, None)  # type: ignore[return-value,arg-type,unused-ignore]
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework {framework!r} is not one of {', '.join(FRAMEWORKS)}.")
    if importlib.util.find_spec(framework) is None:
        raise errors.MissingExtraError(
            f"framework={framework!r} needs {framework}, which is not installed: pip install "
            f"{framework}. Without any, let the loss function return (loss, metrics, gradients)."
        )
    return framework  # type: ignore[return-value,unused-ignore]


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """The data of the forward pass: input and targets, and weights if there are any."""
    return [
        Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k in _SENT})
        for d in data
    ]


def logprobs_of(output: ForwardBackwardOutput, data: Sequence[Datum]) -> list[np.ndarray]:
    """Each datum's log-probabilities, float32 in the shape of its target_tokens."""
    outputs = output.loss_fn_outputs
    if len(outputs) != len(data):
        raise errors.APIResponseValidationError(
            f"the server gave {len(outputs)} outputs for {len(data)} datums."
        )
    arrays = []
    for i, (one, datum) in enumerate(zip(outputs, data)):
        if "logprobs" not in one:
            raise errors.APIResponseValidationError(
                f"the server gave no logprobs for datum {i}, only {sorted(one)}."
            )
        array = one["logprobs"].to_numpy()
        wanted = datum.loss_fn_inputs["target_tokens"].shape
        if array.size != int(np.prod(wanted)):
            raise errors.APIResponseValidationError(
                f"the server gave {array.size} logprobs for the targets of datum {i}, of shape "
                f"{list(wanted)}."
            )
        arrays.append(array.reshape(wanted).astype(np.float32, copy=False))
    return arrays


def evaluate(
    data: Sequence[Datum],
    logprobs: list[np.ndarray],
    loss_fn: LossFunction,
    framework: Framework | None,
) -> Evaluated:
    """Call *loss_fn* once, and turn its gradients into weights.

    Raises:
        TypeError, ValueError: If its result is not usable; its own exceptions are not caught.
    """
    compute = {"torch": _torch, "autograd": _autograd, "jax": _jax}.get(framework or "", _given)
    loss, metrics, gradients = compute(data, logprobs, loss_fn)
    if len(gradients) != len(data):
        raise ValueError(
            f"the loss function gave {len(gradients)} gradients for {len(data)} datums."
        )
    weighted = [_weighted(i, *one) for i, one in enumerate(zip(data, logprobs, gradients))]
    return Evaluated(loss, {str(k): _as_float(k, v) for k, v in metrics.items()}, weighted)


def with_metrics(output: ForwardBackwardOutput, evaluated: Evaluated) -> ForwardBackwardOutput:
    """The backward pass's output, with the user's loss as `loss:sum` and the user's metrics.

    The server's own sum, of the linear surrogate, is kept as `surrogate_loss:sum`.
    """
    metrics = dict(output.metrics)
    if "loss:sum" in metrics:
        metrics["surrogate_loss:sum"] = metrics["loss:sum"]
    metrics["loss:sum"] = evaluated.loss
    metrics.update(evaluated.metrics)
    return attrs.evolve(output, metrics=metrics)


def _weighted(i: int, datum: Datum, logprobs: np.ndarray, gradient: Any) -> Datum:
    gradient = np.asarray(gradient, dtype=np.float32)
    if gradient.shape != logprobs.shape:
        raise ValueError(
            f"the gradient of datum {i} has shape {list(gradient.shape)}, its logprobs "
            f"{list(logprobs.shape)}."
        )
    if not np.isfinite(gradient).all():
        where = int(np.argmin(np.isfinite(gradient.reshape(-1))))
        raise ValueError(
            f"the gradient of the loss is {gradient.reshape(-1)[where]} at position {where} of "
            f"datum {i}; nothing was sent."
        )
    targets = datum.loss_fn_inputs["target_tokens"]
    return Datum(datum.model_input, {"target_tokens": targets, "weights": TensorData(-gradient)})


def _returned(result: Any, gradients: bool) -> tuple[Any, ...]:
    """Check a loss function's result: (loss, metrics) or (loss, metrics, gradients)."""
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise TypeError(
            "the loss function must return (loss, metrics), or (loss, metrics, gradients), got "
            f"{type(result).__name__}."
        )
    if not isinstance(result[1], dict):
        raise TypeError(f"the loss function's metrics must be a dict, got {result[1]!r}.")
    if gradients and len(result) != 3:
        raise TypeError(
            'without torch, autograd or jax (and with framework="numpy") the loss function must '
            "return (loss, metrics, gradients), one gradient array for each datum."
        )
    return result


def _as_float(name: object, value: Any) -> float:
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError) as exc:
        raise TypeError(f"the loss function's metric {name!r} is not a number: {value!r}.") from exc


def _given(
    data: Sequence[Datum], logprobs: list[np.ndarray], loss_fn: LossFunction
) -> tuple[float, dict[str, Any], Sequence[Any]]:
    loss, metrics, gradients = _returned(loss_fn(data, logprobs), gradients=True)
    return _as_float("loss", np.sum(loss)), metrics, gradients


def _torch(
    data: Sequence[Datum], logprobs: list[np.ndarray], loss_fn: LossFunction
) -> tuple[float, dict[str, Any], Sequence[Any]]:
    import torch  # only if a loss needs it

    leaves = [torch.from_numpy(array.copy()).requires_grad_(True) for array in logprobs]
    result = _returned(loss_fn(data, list(leaves)), gradients=False)
    loss, metrics = result[0], result[1]
    if len(result) == 3:
        gradients = [g.detach().numpy() if hasattr(g, "detach") else g for g in result[2]]
        return _as_float("loss", loss), metrics, gradients
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        raise ValueError(_INDEPENDENT)
    total = loss.sum()
    total.backward()
    gradients = [
        (leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)).numpy() for leaf in leaves
    ]
    return float(total.detach()), metrics, gradients


_INDEPENDENT = (
    "the loss does not depend on the logprobs (no gradient reaches them); compute it from the "
    "arrays that the function is given."
)


def _autograd(
    data: Sequence[Datum], logprobs: list[np.ndarray], loss_fn: LossFunction
) -> tuple[float, dict[str, Any], Sequence[Any]]:
    import autograd.numpy as anp  # type: ignore[import-untyped]
    from autograd.core import make_vjp  # type: ignore[import-untyped]
    from autograd.tracer import isbox  # type: ignore[import-untyped]

    kept: dict[str, Any] = {}

    def traced(arrays: list[Any]) -> Any:
        result = _returned(loss_fn(data, list(arrays)), gradients=False)
        kept["metrics"] = {k: getattr(v, "_value", v) for k, v in result[1].items()}
        kept["gradients"] = result[2] if len(result) == 3 else None
        total = anp.sum(result[0])
        kept["depends"] = isbox(total)
        # Adds zero, because autograd warns about a loss that is a plain number.
        return total + anp.sum(arrays[0].reshape(-1)[:0])

    vjp, loss = make_vjp(traced, [array.astype(np.float64) for array in logprobs])
    if kept["gradients"] is None and not kept["depends"]:
        raise ValueError(_INDEPENDENT)
    gradients = kept["gradients"] if kept["gradients"] is not None else vjp(np.float64(1.0))
    return float(loss), kept["metrics"], gradients


def _jax(
    data: Sequence[Datum], logprobs: list[np.ndarray], loss_fn: LossFunction
) -> tuple[float, dict[str, Any], Sequence[Any]]:
    import jax  # type: ignore[import-not-found,unused-ignore]
    import jax.numpy as jnp  # type: ignore[import-not-found,unused-ignore]

    def traced(arrays: list[Any]) -> tuple[Any, Any]:
        result = _returned(loss_fn(data, list(arrays)), gradients=False)
        given = result[2] if len(result) == 3 else None
        return jnp.sum(result[0]), (result[1], given)

    value_and_grad = jax.value_and_grad(traced, has_aux=True)
    (loss, (metrics, given)), gradients = value_and_grad([jnp.asarray(a) for a in logprobs])
    return float(loss), metrics, given if given is not None else gradients
