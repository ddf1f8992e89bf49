"""`tinkex.regularizers`: penalties to add to a custom loss, each with its metrics.

Each function here makes a `Regularizer`: a function of (data, logprobs), like a loss for
`forward_backward_custom`. `combine` adds regularizers to a loss. They are in PyTorch and act on
log-probabilities of the targets, since a server returns nothing else. For a penalty on weights, use
the optimizer's `AdamParams.weight_decay`. Does not know about servers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union
from weakref import WeakKeyDictionary

import attrs
import numpy as np

from tinkex import types

if TYPE_CHECKING:
    from tinkex.sampling import SamplingClient

#: A torch.Tensor. PyTorch is slow to import, and part of the extra `local`.
Tensor = Any
Reduction = Literal["sum", "mean"]
#: (data, log-probabilities of each datum) -> (value, metrics)
Penalty = Callable[[Sequence[types.Datum], list[Tensor]], tuple[Tensor, dict[str, Any]]]

#: Log-probabilities to compare with: an array for each datum, the name of a loss input of the
#: datums, or a function of (data, logprobs) that returns such arrays.
Source = Union[Sequence[Any], str, Callable[..., Sequence[Any]]]

#: A gradient or vector with a norm below this counts as zero, to avoid division by it.
LEAST_NORM = 1e-12


@attrs.frozen
class Regularizer:
    """A penalty with its weight.

    Attributes:
        penalty: called as `regularizer(data, logprobs)`, without the weight.
        weight: in the sum of `combine`; at least 0.
        name: prefix of its metrics; unique within one sum.
    """

    penalty: Penalty
    weight: float
    name: str

    def __attrs_post_init__(self) -> None:
        if not callable(self.penalty):
            raise TypeError(f"penalty must be a function (data, logprobs), got {self.penalty!r}.")
        if not isinstance(self.weight, (int, float)) or not 0 <= self.weight < math.inf:
            raise ValueError(
                f"weight of {self.name!r} must be a number of at least 0, got {self.weight!r}."
            )
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a text that is not empty, got {self.name!r}.")

    def __call__(
        self, data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        return self.penalty(data, logprobs)


def combine(
    loss_fn: Callable[..., tuple[Any, ...]],
    *regularizers: Regularizer,
    track_grad_norms: bool = False,
) -> Callable[[Sequence[types.Datum], list[Any]], tuple[Any, dict[str, Any]]]:
    """
    *loss_fn* plus weight times each penalty, for `forward_backward_custom`.

    Args:
        loss_fn: (data, logprobs) -> (loss, metrics), in PyTorch.
        track_grad_norms: also measure the L2 norm of each part's gradient with respect to the
            log-probabilities, by one backward pass over the small graph for each part.

    Returns:
        A function whose metrics are those of *loss_fn* and, for each regularizer NAME,
        `NAME` (the penalty), `NAME/contribution` (times its weight), and `NAME/...` (its own
        metrics); `base_loss`, `regularizer_total`; and with *track_grad_norms*
        `base_loss/grad_norm`, `NAME/grad_norm` and `total_grad_norm`.

    Raises:
        ValueError: If two regularizers have the same name.
    """
    names = [regularizer.name for regularizer in regularizers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two regularizers are called {name!r}; give one another name.")

    def regularized(data: Sequence[types.Datum], logprobs: list[Any]) -> tuple[Any, dict[str, Any]]:
        found = loss_fn(data, logprobs)
        loss, metrics = found[0].sum(), dict(found[1])
        metrics["base_loss"] = loss.detach()
        if track_grad_norms:
            metrics["base_loss/grad_norm"] = _grad_norm(loss, logprobs)
        total = loss
        for regularizer in regularizers:
            value, own = regularizer(data, logprobs)
            name = regularizer.name
            total = total + regularizer.weight * value
            metrics[name] = value.detach()
            metrics[f"{name}/contribution"] = regularizer.weight * value.detach()
            metrics.update({f"{name}/{key}": each for key, each in own.items()})
            if track_grad_norms:
                metrics[f"{name}/grad_norm"] = _grad_norm(value, logprobs)
        metrics["regularizer_total"] = (total - loss).detach()
        if track_grad_norms:
            metrics["total_grad_norm"] = _grad_norm(total, logprobs)
        return total, metrics

    return regularized


def _grad_norm(value: Tensor, logprobs: list[Tensor]) -> float:
    import torch

    if not value.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(value, logprobs, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float((g.detach() ** 2).sum()) for g in gradients if g is not None))


# The regularizers


def l1(weight: float = 0.01, *, reduction: Reduction = "mean", name: str = "l1") -> Regularizer:
    """|lp|, over the weighted tokens.

    Args:
        reduction: "mean" over tokens, or "sum"; as in all functions of this module.
    """

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        lp, mask = _flat(data, logprobs)
        return _reduced(lp.abs(), mask, reduction), {"max": lp.abs().max().detach()}

    return Regularizer(penalty, weight, name)


def l2(weight: float = 0.01, *, reduction: Reduction = "mean", name: str = "l2") -> Regularizer:
    """lp^2, over the weighted tokens."""

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        lp, mask = _flat(data, logprobs)
        value = _reduced(lp**2, mask, reduction)
        return value, {"rms": _reduced(lp.detach() ** 2, mask, "mean").sqrt()}

    return Regularizer(penalty, weight, name)


def elastic_net(
    weight: float = 0.01,
    *,
    l1_ratio: float = 0.5,
    reduction: Reduction = "mean",
    name: str = "elastic_net",
) -> Regularizer:
    """l1_ratio |lp| + (1 - l1_ratio) lp^2, over the weighted tokens."""
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"l1_ratio must be from 0 to 1, got {l1_ratio!r}.")

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        lp, mask = _flat(data, logprobs)
        one, two = _reduced(lp.abs(), mask, reduction), _reduced(lp**2, mask, reduction)
        value = l1_ratio * one + (1 - l1_ratio) * two
        return value, {"l1": one.detach(), "l2": two.detach()}

    return Regularizer(penalty, weight, name)


def entropy(
    weight: float = 0.01,
    *,
    mode: Literal["maximize", "minimize"] = "maximize",
    reduction: Reduction = "mean",
    name: str = "entropy",
) -> Regularizer:
    """-p lp of the targets: their part of the entropy; negated to maximize it.

    The rest of the vocabulary is not known to a loss on target log-probabilities.
    """
    if mode not in ("maximize", "minimize"):
        raise ValueError(f'mode must be "maximize" or "minimize", got {mode!r}.')
    sign = -1.0 if mode == "maximize" else 1.0

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        lp, mask = _flat(data, logprobs)
        value = _reduced(-lp.exp() * lp, mask, reduction)
        return sign * value, {"entropy": value.detach()}

    return Regularizer(penalty, weight, name)


def kl(
    weight: float = 0.01,
    *,
    reference: Source = "reference_logprobs",
    direction: Literal["forward", "reverse"] = "forward",
    symmetric: bool = False,
    reduction: Reduction = "mean",
    name: str = "kl",
) -> Regularizer:
    """
    Divergence from reference log-probabilities q of the same targets: their part of the sum.

    Args:
        reference: an array for each datum in the shape of its targets; the name of a loss input
            of each datum (which stays on this machine); or a function that computes the arrays
            from (data, logprobs), such as `of_model` makes. No gradient goes through them.
        direction: "forward" is p (lp - lq), weighted by the model; "reverse" is q (lq - lp).
        symmetric: the mean of both.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f'direction must be "forward" or "reverse", got {direction!r}.')

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        lp, mask = _flat(data, logprobs)
        lq = _given(data, logprobs, reference)
        ways = {"forward": lp.exp() * (lp - lq), "reverse": lq.exp() * (lq - lp)}
        values = {way: _reduced(each, mask, reduction) for way, each in ways.items()}
        value = sum(values.values()) / 2 if symmetric else values[direction]
        gap = _reduced((lp - lq).detach(), mask, "mean")
        return value, {"gap": gap, **{way: each.detach() for way, each in values.items()}}

    return Regularizer(penalty, weight, name)


def consistency(
    weight: float = 0.01,
    *,
    pair: Source = "original_logprobs",
    metric: Literal["mse", "mae", "kl"] = "mse",
    reduction: Reduction = "mean",
    name: str = "consistency",
) -> Regularizer:
    """
    Distance from the log-probabilities of the same targets in another version of the input.

    Args:
        pair: those log-probabilities, as *reference* of `kl`.
        metric: squared or absolute difference, or p (lp - lq).
    """
    if metric not in ("mse", "mae", "kl"):
        raise ValueError(f'metric must be "mse", "mae" or "kl", got {metric!r}.')

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        lp, mask = _flat(data, logprobs)
        gap = lp - _given(data, logprobs, pair)
        each = {"mse": gap**2, "mae": gap.abs(), "kl": lp.exp() * gap}[metric]
        return _reduced(each, mask, reduction), {"max": (gap.abs() * mask).max().detach()}

    return Regularizer(penalty, weight, name)


def gradient_penalty(
    weight: float = 0.01,
    *,
    loss_fn: Callable[..., tuple[Any, ...]],
    target_norm: float = 1.0,
    mode: Literal["output", "interpolated"] = "output",
    reference: Source = "reference_logprobs",
    seed: int = 0,
    name: str = "gradient_penalty",
) -> Regularizer:
    """
    (norm of the gradient of *loss_fn* with respect to the log-probabilities - target_norm)^2.

    *loss_fn* is differentiated twice; if it is linear, the penalty has no gradient.

    Args:
        mode: "output" takes the gradient at the log-probabilities; "interpolated" at a random point
            between them and *reference*, drawn for each datum (Gulrajani et al. 2017).
        reference: as for `kl`; used by "interpolated" only.
        seed: of the random points, which are the same in every call.
    """
    if mode not in ("output", "interpolated"):
        raise ValueError(f'mode must be "output" or "interpolated", got {mode!r}.')

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        import torch

        points = logprobs
        if mode == "interpolated":
            points = _between(logprobs, _given(data, logprobs, reference), seed)
        loss = loss_fn(data, points)[0].sum()
        gradients = torch.autograd.grad(loss, points, create_graph=True, allow_unused=True)
        squares = torch.stack([(g**2).sum() for g in gradients if g is not None])
        norm = (squares.sum() + LEAST_NORM).sqrt()
        return (norm - target_norm) ** 2, {"norm": norm.detach()}

    return Regularizer(penalty, weight, name)


def orthogonality(
    weight: float = 0.01, *, reduction: Reduction = "mean", name: str = "orthogonality"
) -> Regularizer:
    """Squared cosine of the log-probabilities of every two datums, over their common positions.

    Each pair of datums counts once; 0 with fewer than two.
    """

    def penalty(
        data: Sequence[types.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        import torch

        squares = []
        vectors = [lp.reshape(-1) for lp in logprobs]
        for i, one in enumerate(vectors):
            for other in vectors[:i]:
                length = min(len(one), len(other))
                a, b = one[:length], other[:length]
                scale = (a**2).sum() * (b**2).sum() + LEAST_NORM
                squares.append((a * b).sum() ** 2 / scale)
        if not squares:
            return logprobs[0].sum() * 0.0, {"max": 0.0}
        values = torch.stack(squares)
        value = values.sum() if reduction == "sum" else values.mean()
        return value, {"max": values.max().detach()}

    return Regularizer(penalty, weight, name)


# References


def of_model(sampler: SamplingClient) -> Callable[..., list[Any]]:
    """
    A reference for `kl` and others: another model's log-probabilities.

    Args:
        sampler: of the reference, such as `service.create_sampling_client(base_model=...)`. Each
            datum is scored once, and the result is cached as long as the datum exists.

    Returns:
        A function of (data, logprobs) that returns log-probabilities of the targets of each datum.
        It raises ValueError if targets are not the tokens shifted by one.
    """
    known: WeakKeyDictionary[types.Datum, Any] = WeakKeyDictionary()

    def reference(data: Sequence[types.Datum], logprobs: Sequence[Any]) -> list[Any]:
        wanted = {i: _sequence(datum, i) for i, datum in enumerate(data) if datum not in known}
        futures = {
            i: sampler.compute_logprobs(types.ModelInput.from_ints(tokens))
            for i, tokens in wanted.items()
        }
        for i, future in futures.items():
            known[data[i]] = np.asarray(future.result()[1:], np.float32)
        return [known[datum] for datum in data]

    return reference


def _sequence(datum: types.Datum, number: int) -> list[int]:
    """The tokens of a datum with the last target."""
    tokens = datum.model_input.to_ints()
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    if targets.shape != (len(tokens),) or targets[:-1].tolist() != tokens[1:]:
        raise ValueError(
            f"the targets of data[{number}] are not its tokens shifted by one, so another model "
            "cannot score them; give reference log-probabilities as arrays."
        )
    return [*tokens, int(targets[-1])]


# Helpers


def _between(logprobs: list[Tensor], given: Tensor, seed: int) -> list[Tensor]:
    """Random points between *logprobs* and *given* values, in the shapes of *logprobs*."""
    import torch

    draws = np.random.default_rng(seed).random(len(logprobs))
    parts = torch.split(given, [lp.numel() for lp in logprobs])
    return [
        draw * lp + (1 - draw) * part.reshape(lp.shape)
        for draw, lp, part in zip(draws.tolist(), logprobs, parts)
    ]


def _flat(data: Sequence[types.Datum], logprobs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All log-probabilities, and a mask: 1 where weights, if any, are not 0."""
    import torch

    masks = []
    for datum, lp in zip(data, logprobs):
        weights = datum.loss_fn_inputs.get("weights")
        mask = torch.ones_like(lp)
        if weights is not None:
            mask = torch.as_tensor(weights.to_numpy() != 0).reshape(lp.shape).to(lp.dtype)
        masks.append(mask.detach().reshape(-1))
    return torch.cat([lp.reshape(-1) for lp in logprobs]), torch.cat(masks)


def _reduced(each: Tensor, mask: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}.')
    total = (each * mask).sum()
    return total if reduction == "sum" else total / mask.sum().clamp(min=1.0)


def _given(data: Sequence[types.Datum], logprobs: list[Tensor], source: Source) -> Tensor:
    """Given log-probabilities of all datums, in the order and the shapes of *logprobs*."""
    import torch

    arrays: Sequence[Any]
    if callable(source):
        arrays = source(data, logprobs)
    elif isinstance(source, str):
        missing = [i for i, datum in enumerate(data) if source not in datum.loss_fn_inputs]
        if missing:
            raise ValueError(
                f"data[{missing[0]}] has no loss input {source!r} with the log-probabilities to "
                "compare with; add it, or give them as a list of arrays."
            )
        arrays = [datum.loss_fn_inputs[source].to_numpy() for datum in data]
    else:
        arrays = source
    if len(arrays) != len(logprobs):
        raise ValueError(f"{len(arrays)} arrays were given for {len(logprobs)} datums.")
    parts = []
    for i, (array, lp) in enumerate(zip(arrays, logprobs)):
        tensor = torch.as_tensor(array, dtype=lp.dtype).detach()
        if tensor.numel() != lp.numel():
            raise ValueError(
                f"the given log-probabilities of data[{i}] have {tensor.numel()} values, its "
                f"targets {lp.numel()}."
            )
        parts.append(tensor.reshape(-1))
    return torch.cat(parts)


#: All regularizers by name; each takes its weight first.
REGULARIZERS: Mapping[str, Callable[..., Regularizer]] = {
    made.__name__: made
    for made in (l1, l2, elastic_net, entropy, kl, consistency, gradient_penalty, orthogonality)
}
