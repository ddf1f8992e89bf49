"""What each loss function computes, and its derivative: pure functions of log-probabilities.

All losses are plain sums over tokens and datums. Each function here takes the log-probabilities of
one packed batch and returns, for each token, the loss and its derivative at the log-probability.
Does not know about models. `tinkex.types.LOSS_FUNCTIONS` has the inputs and settings of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from torch import Tensor

from tinkex import types

#: Losses of the API that this server does not support, and why.
NOT_OFFERED = {"stable_reinforce": "its formula is not published"}

#: Ranges of settings: from the first number (inclusive) to below the second.
BOUNDS = {"clip_range": (0.0, 1.0), "clip_ratio_c": (1.0, torch.inf), "kl_coef": (0.0, torch.inf)}

#: The input that is a factor of a loss, and so of its derivative.
FACTORS = {
    "cross_entropy": "weights",
    "importance_sampling": "advantages",
    "ppo": "advantages",
    "cispo": "advantages",
}

#: The output type of each loss on the wire.
OUTPUT_TYPES = {
    name: "".join(word.capitalize() for word in name.split("_")) + "LossReturn"
    for name in types.LOSS_FUNCTIONS
}


@attrs.frozen(eq=False)
class Inputs:
    """The loss inputs of a packed batch (or of some of its rows).

    Attributes:
        arrays: by name; each (N, K), float32 (K = 1 except for cross_entropy).
        config: settings, complete.
        sequence: (N,) which sequence each row belongs to.
        sequences: how many there are.
    """

    arrays: Mapping[str, Tensor]
    config: Mapping[str, float]
    sequence: Tensor
    sequences: int

    def rows(self, rows: slice | Tensor) -> Inputs:
        """The inputs of some rows only."""
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return attrs.evolve(self, arrays=arrays, sequence=self.sequence[rows])

    def live(self, loss_fn: str) -> Tensor | None:
        """(N,) True where the derivative of *loss_fn* may be nonzero; None is everywhere."""
        factor = FACTORS.get(loss_fn)
        return None if factor is None else self.arrays[factor].any(dim=1)

    def clip_range(self) -> tuple[Tensor, Tensor]:
        """Bounds of the ratio: per token if the datum has them, else from the settings."""
        a = self.arrays["advantages"]

        def bound(name: str) -> Tensor:
            given = self.arrays.get(name)
            return a.new_full((), self.config[name]) if given is None else given

        return bound("clip_low_threshold"), bound("clip_high_threshold")


#: (logprobs (N, K), inputs) -> loss (N, K), dloss/dlogprob (N, K)
Loss = Callable[[Tensor, Inputs], tuple[Tensor, Tensor]]


def cross_entropy(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-w lp; weights may be negative."""
    w = inputs.arrays["weights"]
    return -w * lp, -w


def importance_sampling(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-r A with r = exp(lp - q)."""
    loss = -(lp - inputs.arrays["logprobs"]).exp_() * inputs.arrays["advantages"]
    return loss, loss  # d exp(lp) = exp(lp)


def clipped(log_ratio: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A) and its derivative at log r (Schulman et al. 2017)."""
    a = inputs.arrays["advantages"]
    low, high = inputs.clip_range()
    ratio = log_ratio.exp()
    plain, bounded = ratio * a, ratio.clamp(low, high) * a
    # At equality (ratio within bounds) the gradient flows; outside, the clipped branch is constant.
    return -torch.minimum(plain, bounded), torch.where(plain <= bounded, -plain, 0.0)


def ppo(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, low, high) A)."""
    return clipped(lp - inputs.arrays["logprobs"], inputs)


def cispo(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-sg(clip(r, low, high)) lp A (Chen et al. 2025)."""
    low, high = inputs.clip_range()
    ratio = (lp - inputs.arrays["logprobs"]).exp_().clamp_(low, high)
    slope = -ratio * inputs.arrays["advantages"]
    return slope * lp, slope


def dro(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """-(lp A - beta (lp - q)^2 / 2) (Richemond et al. 2024)."""
    a, beta = inputs.arrays["advantages"], inputs.config["beta"]
    gap = lp - inputs.arrays["logprobs"]
    return -(lp * a - 0.5 * beta * gap**2), beta * gap - a


def gspo(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """PPO's clip on the sequence's ratio, exp(mean over its mask of (lp - q)) (Zheng et al. 2025).

    The gradient goes through each token's own lp: log rho = sg(mean) + lp - sg(lp). A sequence
    whose mask is all zero has ratio 1.
    """
    mask = inputs.arrays["sequence_ratio_mask"]
    zeros = lp.new_zeros(inputs.sequences, 1)
    gaps = zeros.index_add(0, inputs.sequence, (lp - inputs.arrays["logprobs"]) * mask)
    counts = zeros.index_add(0, inputs.sequence, mask)
    means = gaps / torch.where(counts == 0, 1.0, counts)
    return clipped(means[inputs.sequence], inputs)


#: trinity_ppo clamps log-ratios to this range (+-).
MOST_LOG_RATIO = 20.0


def trinity_ppo(lp: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """PPO with a dual clip (Ye et al. 2020) and a divergence from reference log-probabilities.

    The mean over each sequence's mask, summed and divided by num_total_datums, the datums of the
    whole step: the only loss here that is a mean. Source: the package tuft 0.2.2.
    """
    config, mask = inputs.config, _mask(inputs)
    a, gap = inputs.arrays["advantages"], lp - inputs.arrays["logprobs"]
    log_ratio = gap.clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    ratio = log_ratio.exp()
    plain = -ratio * a
    bounded = -ratio.clamp(1 - config["clip_range"], 1 + config["clip_range"]) * a
    loss = torch.maximum(plain, bounded)
    slope = torch.where((plain >= bounded) & (log_ratio == gap), plain, 0.0)
    most = torch.where(a < 0, -a * config["clip_ratio_c"], torch.inf)
    slope = torch.where(loss > most, 0.0, slope)
    loss = torch.minimum(loss, most)
    if "ref_logprobs" in inputs.arrays:
        distance = lp - inputs.arrays["ref_logprobs"]
        loss = loss + config["kl_coef"] * 0.5 * distance**2
        slope = slope + config["kl_coef"] * distance
    counts = lp.new_zeros(inputs.sequences, 1).index_add(0, inputs.sequence, mask.to(lp.dtype))
    scale = mask / counts.clamp(min=1.0)[inputs.sequence] / config["num_total_datums"]
    return loss * scale, slope * scale


def _mask(inputs: Inputs) -> Tensor:
    """(N, 1) True for tokens of the response: by the mask, or else by weights above 0."""
    return inputs.arrays["mask" if "mask" in inputs.arrays else "weights"] > 0


def trinity_metrics(lp: Tensor, inputs: Inputs) -> dict[str, float]:
    """Sums over the tokens of the responses; means follow from them however a batch is divided."""
    mask, reach = _mask(inputs), inputs.config["clip_range"]
    gap = (lp - inputs.arrays["logprobs"]).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
    ratio = gap.exp()[mask].double()
    found = {
        "response_tokens": float(mask.sum()),
        "ratio_sum": float(ratio.sum()),
        "ratio_squared_sum": float((ratio**2).sum()),
        "clipped_tokens": float(((ratio < 1 - reach) | (ratio > 1 + reach)).sum()),
    }
    if "ref_logprobs" in inputs.arrays:
        distance = (lp - inputs.arrays["ref_logprobs"])[mask].double()
        found["kl_sum"] = float((0.5 * distance**2).sum())
    return {f"trinity/{name}:sum": value for name, value in found.items()}


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo, trinity_ppo)
}

#: Losses whose value at a token depends on the other tokens of its sequence.
WHOLE_SEQUENCE = frozenset({"gspo", "trinity_ppo"})

#: What a loss reports besides its sum.
METRICS: dict[str, Callable[[Tensor, Inputs], dict[str, float]]] = {"trinity_ppo": trinity_metrics}


def complete_config(
    loss_fn: str, config: Mapping[str, types.losses.LossConfigValue] | None
) -> dict[str, float]:
    """The settings of a loss with its defaults.

    Raises:
        ValueError: For a loss that is not offered, or a setting that it does not have.
    """
    checked = types.check_config(loss_fn, config) or {}
    given = {key: float(value) for key, value in checked.items()}
    if loss_fn in NOT_OFFERED:
        raise ValueError(
            f"loss_fn {loss_fn!r} is not offered by this server: {NOT_OFFERED[loss_fn]}; "
            f"choose one of {', '.join(LOSSES)}."
        )
    accepted = types.LOSS_FUNCTIONS[loss_fn].config
    for key in given:
        if key not in accepted:
            takes = f"it takes {', '.join(accepted)}" if accepted else "it takes none"
            raise ValueError(f"{loss_fn} has no setting {key!r}; {takes}.")
        if abs(given[key]) > torch.finfo(torch.float32).max:
            raise ValueError(
                f"{loss_fn}: {key} = {given[key]:g} is too large for float32, in which losses are "
                "computed; choose a smaller number."
            )
        if accepted[key] is None and not (given[key] >= 1 and given[key].is_integer()):
            raise ValueError(
                f"{loss_fn}: {key} must be a whole number of at least 1, got {given[key]}."
            )
    missing = [key for key, value in accepted.items() if value is None and key not in given]
    if missing:
        raise ValueError(
            f"{loss_fn} needs the setting {missing[0]!r}: how many datums the optimizer step has "
            "in all, the same number in every request of the step."
        )
    complete = {key: float(value) for key, value in accepted.items() if value is not None}
    complete.update(given)
    for key, (low, high) in BOUNDS.items():
        if not low <= complete.get(key, low) < high:
            raise ValueError(f"{loss_fn}: {key} must be from {low:g} to below {high:g}.")
    if complete.get("clip_low_threshold", 0.0) > complete.get("clip_high_threshold", 1e38):
        raise ValueError(
            f"clip_low_threshold {complete['clip_low_threshold']} is above clip_high_threshold "
            f"{complete['clip_high_threshold']}; they bound the ratio itself, such as 0.8 and 1.2."
        )
    return complete
