"""Token sampling: temperature, top-k, top-p, and noise that depends on the seed alone.

The noise is Gumbel noise (the likeliest token after adding it is a sample), computed from the
sequence's key, the position and the token by a counter-based generator. So a sequence's tokens do
not depend on what else is in the batch. Nor do they depend on how the batch was multiplied, since
the last bits of a logit can decide only near ties. Does not know about models or requests.
"""

from __future__ import annotations

from functools import partial

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex.engine.row_operations import TORCH_ROWS, RowOperations

Keys = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

#: How many of the likeliest tokens top-p considers at first; eight times more if these are too few.
FIRST_CANDIDATES = 128


def mix(x: Keys) -> Keys:
    """SplitMix64's finaliser (Steele et al. 2014): each bit of x affects the whole result."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def sequence_keys(seed: int, count: int) -> Keys:
    """A key for each of *count* samples of a request."""
    start = mix(np.array([seed & (2**64 - 1)], np.uint64) + _GOLDEN)
    return mix(start + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


def gumbel(keys: Keys, positions: Ints, streams: Ints) -> Floats:
    """Gumbel noise (n, k) for keys (n,), positions (n,) and streams (k,) or (n, k)."""
    at = mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    bits = mix(at[:, None] + (streams.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    noise: Floats = -np.log(-np.log(uniform))
    return noise


@attrs.frozen(eq=False)
class Settings:
    """Sampling settings of n rows: arrays of length n.

    Attributes:
        keys, positions: what the noise depends on.
        temperature: 0 is the likeliest token.
        top_k: 0 is all.
        top_p: 1 is all.
    """

    keys: Keys
    positions: Ints
    temperature: npt.NDArray[np.float32]
    top_k: Ints
    top_p: npt.NDArray[np.float32]

    def rows(self, chosen: Ints) -> Settings:
        """The settings of some rows."""
        return Settings(
            self.keys[chosen],
            self.positions[chosen],
            self.temperature[chosen],
            self.top_k[chosen],
            self.top_p[chosen],
        )


def usable_temperature(temperature: float) -> float:
    """Clamp a temperature so that float32 logits can be divided by it without overflow.

    Below 1e-6 only the likeliest token remains, as at 0; above 1e30 all tokens are equally likely.
    """
    return 0.0 if temperature < 1e-6 else min(temperature, 1e30)


def choose(
    logits: Tensor, settings: Settings, operations: RowOperations = TORCH_ROWS
) -> tuple[Ints, npt.NDArray[np.float32]]:
    """A token for each row of float32 logits (n, V), and its log-probability at temperature 1."""
    tokens = np.empty(len(logits), np.int64)
    log_totals = torch.empty(len(logits), 1, device=logits.device)
    is_greedy = settings.temperature == 0
    is_filtered = ~is_greedy & ((settings.top_k > 0) | (settings.top_p < 1))
    for how, mask in (
        (_greedy, is_greedy),
        (_filtered, is_filtered),
        (partial(_free, operations), ~is_greedy & ~is_filtered),
    ):
        if mask.all():
            tokens[:], log_totals = how(logits, settings)
        elif mask.any():
            rows = np.flatnonzero(mask)
            where = torch.from_numpy(rows).to(logits.device)
            tokens[rows], log_totals[where] = how(logits[where], settings.rows(rows))
    wanted = torch.from_numpy(tokens).to(logits.device).unsqueeze(1)
    logprobs = logits.gather(1, wanted).sub_(log_totals).squeeze(1)
    return tokens, logprobs.cpu().numpy()


def _greedy(logits: Tensor, settings: Settings) -> tuple[Ints, Tensor]:
    return logits.argmax(dim=1).cpu().numpy(), logits.logsumexp(dim=1, keepdim=True)


def _scaled(logits: Tensor, settings: Settings) -> Tensor:
    """Logits divided by each row's temperature; the same tensor if all are 1."""
    if (settings.temperature == 1).all():
        return logits
    return logits / torch.from_numpy(settings.temperature).to(logits.device).unsqueeze(1)


def block_of(vocab: int) -> int:
    """Tokens of a block of the vocabulary: a power of 2, about as many as there are blocks."""
    return 1 << ((vocab - 1).bit_length() + 1) // 2


def _free(operations: RowOperations, logits: Tensor, settings: Settings) -> tuple[Ints, Tensor]:
    """Sample from all tokens: first a block of the vocabulary, then a token in the block.

    This needs about 2 sqrt(V) random numbers a row instead of V.
    """
    vocab = logits.shape[1]
    block = block_of(vocab)
    temperatures = torch.from_numpy(settings.temperature).to(logits.device).unsqueeze(1)
    largest, sums = operations.block_sums(logits, temperatures, block)
    totals = sums.cpu().numpy()
    blocks = np.arange(totals.shape[1])
    picked = _loudest(totals, gumbel(settings.keys, settings.positions, blocks))
    within = np.arange(block)
    columns = picked[:, None] * block + within
    inside = torch.from_numpy(np.minimum(columns, vocab - 1)).to(logits.device)
    likelihoods = (logits.gather(1, inside) - largest).div_(temperatures).exp_().cpu().numpy()
    likelihoods[columns >= vocab] = 0.0
    streams = len(blocks) + within
    tokens = picked * block + _loudest(
        likelihoods, gumbel(settings.keys, settings.positions, streams)
    )
    if (settings.temperature == 1).all():
        return tokens, sums.sum(dim=1, keepdim=True).log_().add_(largest)
    return tokens, logits.logsumexp(dim=1, keepdim=True)


def _loudest(probs: npt.NDArray[np.float32], noise: Floats) -> Ints:
    with np.errstate(divide="ignore"):
        chosen: Ints = (np.log(probs) + noise).argmax(axis=1)
    return chosen


def _filtered(logits: Tensor, settings: Settings) -> tuple[Ints, Tensor]:
    """Sample from the top_k likeliest tokens, restricted to top_p (Holtzman et al. 2020)."""
    scaled = _scaled(logits, settings)
    vocab = scaled.shape[1]
    limit = np.where(settings.top_k > 0, np.minimum(settings.top_k, vocab), vocab)
    log_total = scaled.logsumexp(dim=1, keepdim=True)
    look = int(min(vocab, max(FIRST_CANDIDATES, limit[limit < vocab].max(initial=0))))
    while True:
        values, ids = scaled.topk(look, dim=1)
        probs = (values - log_total).exp_().double().cpu().numpy()
        kept = np.arange(look) < limit[:, None]
        probs *= kept
        totals = np.where(limit < vocab, probs.sum(axis=1), 1.0)
        before = probs.cumsum(axis=1) - probs
        reaches = (before[:, -1] + probs[:, -1] >= settings.top_p * totals) | (limit <= look)
        if look == vocab or reaches.all():
            break
        look = min(vocab, look * 8)
    kept &= before < (settings.top_p * totals)[:, None]
    kept[:, 0] = True
    streams = ids.cpu().numpy()
    noise = gumbel(settings.keys, settings.positions, streams)
    picked = _loudest(np.where(kept, probs, 0.0), noise)
    chosen: Ints = streams[np.arange(len(streams)), picked]
    return chosen, logits.logsumexp(dim=1, keepdim=True)
