"""The loss functions of the API: their inputs and settings, and checks of both.

`tinkex.engine.losses` computes them. In the formulas lp is the log-probability of the target under
the current weights, q the `logprobs` input (the sampling policy), A the `advantages`, r = exp(lp -
q), sg = stop-gradient; every loss is a plain sum over tokens and datums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Union

import attrs
import numpy as np

from tinkex.types.data import Datum
from tinkex.types.tensors import TensorData

__all__ = [
    "LOSS_FUNCTIONS",
    "LossFnInputs",
    "LossFnOutput",
    "LossFnType",
    "LossFunction",
    "check_config",
    "check_data",
]

LossConfigValue = Union[float, str]
#: A name of `LOSS_FUNCTIONS`, the inputs of a datum, and the outputs for one.
LossFnType = str
LossFnInputs = dict[str, TensorData]
LossFnOutput = dict[str, TensorData]

_CLIP = MappingProxyType({"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})


@attrs.frozen
class LossFunction:
    """The inputs and settings of a loss function.

    Attributes:
        inputs: names that every datum must have, each of shape (N,) (cross_entropy: or (N, K)).
        optional: names that it may have.
        either: names of which it must have one.
        config: settings and their defaults; None if the setting is required, or the official
            default is not published.
        formula: the summed term.
    """

    name: str
    inputs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    either: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    config: Mapping[str, LossConfigValue | None] = attrs.field(factory=dict)
    formula: str = ""


_POLICY = ("target_tokens", "logprobs", "advantages")
_PER_TOKEN_CLIP = ("clip_low_threshold", "clip_high_threshold")

#: All loss functions by name. A server may support fewer.
LOSS_FUNCTIONS: Mapping[str, LossFunction] = MappingProxyType(
    {
        loss.name: loss
        for loss in (
            LossFunction("cross_entropy", ("target_tokens",), ("weights",), {}, "-w lp"),
            LossFunction("importance_sampling", _POLICY, (), {}, "-r A"),
            LossFunction("ppo", _POLICY, _PER_TOKEN_CLIP, _CLIP, "-min(r A, clip(r, low, high) A)"),
            LossFunction(
                "cispo",
                _POLICY,
                _PER_TOKEN_CLIP,
                {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
                "-sg(clip(r, low, high)) lp A",
            ),
            LossFunction("dro", _POLICY, (), {"beta": 0.05}, "-(lp A - beta (lp - q)^2 / 2)"),
            LossFunction(
                "gspo",
                (*_POLICY, "sequence_ratio_mask"),
                _PER_TOKEN_CLIP,
                _CLIP,
                "-min(rho A, clip(rho) A), log rho = sg(mean over mask of (lp - q)) + lp - sg(lp)",
            ),
            # From TuFT; the only loss here that is a mean over tokens and datums.
            LossFunction(
                "trinity_ppo",
                _POLICY,
                ("mask", "weights", "ref_logprobs"),
                {
                    "num_total_datums": None,
                    "clip_range": 0.2,
                    "clip_ratio_c": 3.0,
                    "kl_coef": 0.001,
                },
                "mean over mask of [-min(r A, clip(r) A), at least c A if A < 0] + kl_coef (lp - "
                "ref)^2 / 2, over num_total_datums",
                either=("mask", "weights"),
            ),
            LossFunction("stable_reinforce", _POLICY, (), {"alpha": None, "kl_coeff": None}),
        )
    }
)


def check_config(
    loss_fn: str, loss_fn_config: Mapping[str, LossConfigValue] | None
) -> dict[str, LossConfigValue] | None:
    """The settings for the wire: numbers, and numbers written as text, become floats.

    Raises:
        ValueError: For an unknown loss function, or a value that is not a number.
        TypeError: If it is not a mapping with text keys.
    """
    if not isinstance(loss_fn, str) or loss_fn not in LOSS_FUNCTIONS:
        raise ValueError(
            f"loss_fn {loss_fn!r} is not known; choose one of {', '.join(LOSS_FUNCTIONS)}."
        )
    if loss_fn_config is None:
        return None
    if not isinstance(loss_fn_config, Mapping):
        raise TypeError(
            f"loss_fn_config must be a mapping of names to numbers, got {loss_fn_config!r}."
        )
    config: dict[str, LossConfigValue] = {}
    for key, value in loss_fn_config.items():
        if not isinstance(key, str):
            raise TypeError(f"loss_fn_config key {key!r} must be a str.")
        config[key] = _as_number(key, value)
    return config


def _as_number(key: str, value: object) -> float:
    number = math.nan
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str):
        try:
            number = float(value.strip())
        except ValueError:
            pass
    if not math.isfinite(number):
        raise ValueError(f"loss_fn_config[{key!r}] = {value!r} is not a finite number.")
    return number


def check_data(data: Sequence[Datum], loss_fn: str, only: Sequence[str] | None = None) -> None:
    """Check that every datum has the inputs of *loss_fn*, with the right lengths, without NaN.

    Args:
        only: names of the loss inputs to check; None is all.

    Raises:
        ValueError: Naming the datum, the input, the value and the fix.
        TypeError: If *data* is not a sequence of Datum.
    """
    if isinstance(data, Datum):
        raise TypeError("data is one Datum; give a list of them: [datum].")
    if not isinstance(data, Sequence) or isinstance(data, (str, bytes)):
        raise TypeError(f"data must be a list of Datum, got {type(data).__name__}.")
    if not data:
        raise ValueError("data is empty; give at least one Datum.")
    needed = LOSS_FUNCTIONS[loss_fn].inputs
    for i, datum in enumerate(data):
        if not isinstance(datum, Datum):
            raise TypeError(f"data[{i}] is a {type(datum).__name__}, not a Datum.")
        _check_datum(datum, i, needed, loss_fn, only)


def _check_datum(
    datum: Datum, i: int, needed: tuple[str, ...], loss_fn: str, only: Sequence[str] | None
) -> None:
    inputs = datum.loss_fn_inputs
    if only is not None:
        inputs = {name: tensor for name, tensor in inputs.items() if name in only}
    for name in needed:
        if name not in inputs:
            raise ValueError(
                f"data[{i}] lacks the loss input {name!r}; {loss_fn} needs {', '.join(needed)}."
            )
    either = LOSS_FUNCTIONS[loss_fn].either
    if either and only is None and not any(name in inputs for name in either):
        raise ValueError(
            f"data[{i}] lacks a loss input {' or '.join(map(repr, either))}, which {loss_fn} needs."
        )
    length = datum.model_input.length
    if length == 0:
        raise ValueError(f"data[{i}].model_input is empty; it needs at least one token.")
    for name, tensor in inputs.items():
        shape = tensor.shape
        if len(shape) not in (1, 2) or shape[0] != length:
            raise ValueError(
                f"data[{i}].loss_fn_inputs[{name!r}] has shape {list(shape)}, but the model input "
                f"has {length} tokens; give one value per input token (the target of position t is "
                "the token that follows it)."
            )
        if len(shape) == 2 and name in needed and loss_fn != "cross_entropy":
            raise ValueError(
                f"data[{i}].loss_fn_inputs[{name!r}] has shape {list(shape)}, but {loss_fn} takes "
                f"one value per token: shape [{length}]."
            )
        values = tensor.values
        # A finite sum proves that all values are finite; only otherwise check each.
        if values.dtype.kind == "f" and not (
            math.isfinite(values.sum()) or np.isfinite(values).all()
        ):
            where = int(np.argmin(np.isfinite(values)))
            raise ValueError(
                f"data[{i}].loss_fn_inputs[{name!r}] is {values[where]} at position {where}; every "
                "value must be finite (mask a position out with weight or advantage 0)."
            )
    _check_targets(inputs, i)


def _check_targets(inputs: Mapping[str, object], i: int) -> None:
    targets = inputs.get("target_tokens")
    if targets is None:
        return
    values = targets.values  # type: ignore[attr-defined]
    if values.dtype.kind == "f":
        raise ValueError(f"data[{i}] target_tokens must be token ids (int64), got float32.")
    # As unsigned numbers the negative ones are the largest: one look at each is enough.
    if values.size and int(values.view(np.uint64).max()) >= 2**31:
        raise ValueError(
            f"data[{i}] target_tokens holds {int(values.min())}..{int(values.max())}; "
            "token ids are never negative. Mask a position out with weight 0, not with target -100."
        )
    weights = inputs.get("weights")
    if weights is not None and weights.shape != targets.shape:  # type: ignore[attr-defined]
        raise ValueError(
            f"data[{i}]: weights have shape {list(weights.shape)}, "  # type: ignore[attr-defined]
            f"target_tokens {list(targets.shape)}; they must be the same."  # type: ignore[attr-defined]
        )
