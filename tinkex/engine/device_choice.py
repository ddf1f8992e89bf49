"""Token sampling on the device: the choices of token_sampling.py, computed without the host.

Every shape follows from a `Choice`, which is known before the step; the host reads no number. So a
step with its sampling can be captured in a CUDA graph. The noise is the same function of key,
position and token as on the host, so the tokens are the same, except for near ties in the last bits
of a logit.

Notation: n rows, V vocabulary.
"""

from __future__ import annotations

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex.engine.token_sampling import FIRST_CANDIDATES, block_of

#: Rows of the whole vocabulary that are sorted at a time, which bounds the memory for it.
SORTED_ROWS = 16


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


@attrs.frozen
class Choice:
    """What the rows of a step need, which determines the operations that run.

    Attributes:
        samples: True if a row has a temperature other than 0.
        look: how many of the likeliest tokens are candidates for top-k and top-p; 0 if no row sets
            either.
        topk: how many of the likeliest tokens are reported.
    """

    samples: bool
    look: int
    topk: int


def choice_for(
    temperature: npt.NDArray[np.float32],
    top_k: npt.NDArray[np.int64],
    top_p: npt.NDArray[np.float32],
    topk: int,
    vocab: int,
) -> Choice:
    """The `Choice` that serves rows with these settings, (n,) each.

    Counts are rounded up to powers of two, so that there are few shapes. A top-p without a top-k
    may need any number of candidates, so the whole vocabulary is sorted.
    """
    is_filtered = (temperature > 0) & ((top_k > 0) | (top_p < 1))
    look = 0
    if is_filtered.any():
        limits = np.where(top_k > 0, top_k, vocab)[is_filtered]
        look = min(vocab, _power_of_two(max(FIRST_CANDIDATES, int(limits.max()))))
    reported = min(vocab, _power_of_two(topk)) if topk else 0
    return Choice(bool((temperature > 0).any()), look, reported)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


@attrs.frozen(eq=False)
class RowSettings:
    """Sampling settings of n rows: tensors (n,) on the device, as in token_sampling.Settings.

    Attributes:
        keys: int64 with the bits of the unsigned key.
    """

    keys: Tensor
    positions: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


def choose(logits: Tensor, settings: RowSettings, choice: Choice) -> tuple[Tensor, Tensor]:
    """A token (n,) for each row of float32 logits (n, V); its log-probability at temperature 1."""
    tokens = logits.argmax(dim=1)
    if choice.samples:
        is_greedy = settings.temperature == 0
        scaled = logits / torch.where(is_greedy, 1.0, settings.temperature).unsqueeze(1)
        sampled = _free(scaled, settings)
        if choice.look:
            is_filtered = (settings.top_k > 0) | (settings.top_p < 1)
            filtered = _filtered(scaled, settings, choice.look)
            sampled = torch.where(is_filtered, filtered, sampled)
        tokens = torch.where(is_greedy, tokens, sampled)
    logprobs = logits.gather(1, tokens.unsqueeze(1)) - logits.logsumexp(dim=1, keepdim=True)
    return tokens, logprobs.squeeze(1)


def topk_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens (n, count) of each row of logits, best first, and their logprobs."""
    values, ids = logits.topk(count, dim=1)
    return ids, values - logits.logsumexp(dim=1, keepdim=True)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, for unsigned 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """token_sampling.mix; products of int64 wrap around like those of uint64."""
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def gumbel(keys: Tensor, positions: Tensor, streams: Tensor) -> Tensor:
    """token_sampling.gumbel: float64 noise (n, k) for keys (n,), positions (n,) and streams (k,)
    or (n, k)."""
    at = _mix(keys + (positions + 1) * _GOLDEN)
    bits = _mix(at.unsqueeze(1) + (streams + 1) * _GOLDEN)
    uniform = (_shifted(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _loudest(probs: Tensor, noise: Tensor) -> Tensor:
    return (probs.log() + noise).argmax(dim=1)


def _free(scaled: Tensor, settings: RowSettings) -> Tensor:
    """Sample from all tokens: first a block of the vocabulary, then a token in the block."""
    probs = _in_blocks((scaled - scaled.amax(dim=1, keepdim=True)).exp_())
    _, blocks, block = probs.shape
    streams = torch.arange(blocks + block, device=probs.device)
    noise = gumbel(settings.keys, settings.positions, streams)
    picked = _loudest(probs.sum(dim=2), noise[:, :blocks])
    within = probs.gather(1, picked.view(-1, 1, 1).expand(-1, 1, block)).squeeze(1)
    return picked * block + _loudest(within, noise[:, blocks:])


def _filtered(scaled: Tensor, settings: RowSettings, look: int) -> Tensor:
    """Sample from the top_k likeliest tokens, restricted to top_p."""
    vocab = scaled.shape[1]
    if look < vocab:
        return _among(scaled, settings, *scaled.topk(look, dim=1))
    chosen = []
    for start in range(0, len(scaled), SORTED_ROWS):
        rows = slice(start, start + SORTED_ROWS)
        own = RowSettings(
            settings.keys[rows],
            settings.positions[rows],
            settings.temperature[rows],
            settings.top_k[rows],
            settings.top_p[rows],
        )
        candidates = scaled[rows].sort(dim=1, descending=True)
        chosen.append(_among(scaled[rows], own, candidates.values, candidates.indices))
    return torch.cat(chosen)


def _among(scaled: Tensor, settings: RowSettings, values: Tensor, ids: Tensor) -> Tensor:
    """Sample from candidates *ids* (n, look) with logits *values*, the likeliest first."""
    vocab, look = scaled.shape[1], ids.shape[1]
    limit = torch.where(settings.top_k > 0, settings.top_k.clamp(max=vocab), vocab).unsqueeze(1)
    probs = (values - scaled.logsumexp(dim=1, keepdim=True)).exp_().double()
    places = torch.arange(look, device=ids.device)
    kept = places < limit
    probs = probs * kept
    totals = torch.where(limit < vocab, probs.sum(dim=1, keepdim=True), 1.0)
    before = probs.cumsum(dim=1) - probs
    kept = kept & (before < settings.top_p.double().unsqueeze(1) * totals)
    kept = kept | (places == 0)
    noise = gumbel(settings.keys, settings.positions, ids)
    picked = _loudest(torch.where(kept, probs, 0.0), noise)
    return ids.gather(1, picked.unsqueeze(1)).squeeze(1)


def _in_blocks(probs: Tensor) -> Tensor:
    """(n, V) as (n, blocks, tokens of a block), about equally many of both; padded with 0."""
    vocab = probs.shape[1]
    block = block_of(vocab)
    blocks = -(-vocab // block)
    if blocks * block != vocab:
        probs = torch.nn.functional.pad(probs, (0, blocks * block - vocab))
    return probs.view(len(probs), blocks, block)
