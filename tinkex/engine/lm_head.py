"""The LM head: log-probabilities of target tokens, and the gradient at the hidden states.

The logits of all positions are never held at once. A head that is one frozen matrix is read in
blocks of columns with a running maximum and total, as flash attention reads its keys (Dao et al.
2022): a block of logits stays in the processor's cache and is then discarded. A head with an
adapter in training is computed in chunks of rows, since its gradient needs every probability.

Does not know about losses; takes their derivative as a callable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Union

import torch
from torch import Tensor

from tinkex.engine import matmul
from tinkex.engine.attention import soft_cap_
from tinkex.engine.linears import Linears, given
from tinkex.engine.memory import kind_of

#: Rows and columns of the block of logits that is held at a time, by kind of device.
ROWS = {"cpu": 640, "cuda": 8192}
COLUMNS = {"cpu": 1024, "cuda": 8192}

#: Floats held at a time where whole rows of logits are computed, whatever the vocabulary.
LOGIT_BUDGET = 8 * 2**20

#: Fewest rows of whole logits at a time.
LEAST_ROWS = 16

LOG2_E = 1 / math.log(2)

Rows = Union[slice, Tensor]

#: (rows of the batch, their log-probabilities (n, K)) -> dloss/dlogprob (n, K)
Coefficients = Callable[[Rows, Tensor], Tensor]


def target_logprobs(
    linears: Linears,
    hidden: Tensor,
    targets: Tensor,
    vocab: int,
    coefficients: Coefficients | None = None,
    live: Tensor | None = None,
    *,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of target tokens.

    Args:
        hidden: (N, d), final norm applied.
        targets: (N, K) token ids.
        coefficients: the loss's derivative; called once for each row, many rows at a time.
        live: (N,) True where the derivative may be nonzero; None is everywhere.
        cap: logits are capped softly at +-cap; 0 is no cap.

    Returns:
        (N, K) float32 log-probabilities; (N, d) gradient at *hidden*, or None without coefficients.
    """
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    dhidden = None if coefficients is None else torch.zeros_like(hidden)
    weight = linears.matrix("head")
    most = row_count(vocab) if weight is None else ROWS[kind_of(hidden.device)]
    for rows, is_live in _chunks(len(hidden), most, None if coefficients is None else live):
        h, wanted = hidden[rows], targets[rows]
        if weight is None:
            probs = head_logits(linears, h, cap)
            steepness = _steepness(probs, cap)
            logprobs[rows] = softmax_(probs, wanted)
        else:
            wants_mean = is_live and dhidden is not None
            logprobs[rows], mean, steepness = _online(weight, h, wanted, wants_mean, cap)
        if coefficients is None or dhidden is None:
            continue
        slopes = coefficients(rows, logprobs[rows])
        if not is_live:
            continue
        if weight is None:
            dhidden[rows] = _backward(linears, h, wanted, probs, slopes, steepness)
        else:
            dhidden[rows] = _from_mean(weight, wanted, given(mean), slopes, steepness)
    return logprobs, dhidden


def head_logits(linears: Linears, hidden: Tensor, cap: float = 0.0) -> Tensor:
    """(n, V) float32 logits of hidden states (n, d), capped softly at +-cap unless it is 0."""
    logits = linears.forward("head", hidden).float()
    return soft_cap_(logits, cap) if cap else logits


def _steepness(capped: Tensor, cap: float) -> Tensor | None:
    """Derivative of the soft cap where it gave *capped*: 1 - (capped / cap)^2; None if no cap."""
    return 1 - (capped / cap).square_() if cap else None


def _chunks(count: int, most: int, live: Tensor | None) -> Iterator[tuple[Rows, bool]]:
    """Chunks of at most *most* rows, about equally large, and whether each is live."""
    if count == 0:
        return
    if live is None or bool(live.all()):
        parts = -(-count // most)
        bounds = [count * i // parts for i in range(parts + 1)]
        yield from ((slice(*pair), True) for pair in itertools.pairwise(bounds))
        return
    for is_live in (True, False):
        where = (live == is_live).nonzero().squeeze(1)
        for rows in where.chunk(-(-len(where) // most)) if len(where) else ():
            yield rows, is_live


# -- a frozen head: by columns -------------------------------------------------------------------


def _online(
    weight: Tensor, h: Tensor, wanted: Tensor, wants_mean: bool, cap: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logprobs of *wanted* (n, K), the mean of weight's rows (n, d) under the probabilities (each
    times the steepness of its logit's cap), and the steepness at *wanted* (n, K).

    Online softmax (Milakov & Gimelshein 2018): the sums so far are rescaled when a block has a
    larger logit.
    """
    columns, n = COLUMNS[kind_of(h.device)], len(h)
    chosen = torch.zeros(wanted.shape, device=h.device)
    largest = torch.full((n, 1), -torch.inf, device=h.device)
    total = torch.zeros(n, 1, device=h.device)
    mean = torch.zeros(h.shape, device=h.device) if wants_mean else None
    for start in range(0, len(weight), columns):
        block = weight[start : start + columns]
        logits = matmul.linear(h, block).float()
        if cap:
            soft_cap_(logits, cap)
        steepness = None if mean is None else _steepness(logits, cap)
        at = wanted - start
        found = logits.gather(1, at.clamp(0, len(block) - 1))
        chosen = torch.where((at >= 0) & (at < len(block)), found, chosen)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1, keepdim=True))
        parts = _exp_(logits.sub_(largest))
        shrink = before.sub_(largest).exp_()
        total.mul_(shrink).add_(parts.sum(dim=1, keepdim=True))
        if mean is None:
            continue
        mean.mul_(shrink)
        if steepness is not None:
            parts.mul_(steepness)
        matmul.add_product(mean, parts.to(weight.dtype), block)
    steepness = _steepness(chosen, cap)
    logprobs = chosen.sub_(largest).sub_(total.log())
    return logprobs, None if mean is None else mean.div_(total), steepness


def _exp_(x: Tensor) -> Tensor:
    """e^x, in place. On a CPU by exp2, which takes a third of the time of torch's exp: that calls
    MKL, which is slow on others' processors than Intel's."""
    return x.mul_(LOG2_E).exp2_() if x.device.type == "cpu" else x.exp_()


def _from_mean(
    weight: Tensor, wanted: Tensor, mean: Tensor, slopes: Tensor, steepness: Tensor | None
) -> Tensor:
    """Gradient at h (n, d) of sum(slopes * logprobs): slopes times (the target's row - *mean*)."""
    dh = mean.mul_(-slopes.sum(dim=1, keepdim=True))
    if steepness is not None:
        slopes = slopes * steepness
    for k in range(wanted.shape[1]):
        dh.addcmul_(weight[wanted[:, k]].float(), slopes[:, k : k + 1])
    return dh.to(weight.dtype)


# -- whole rows ----------------------------------------------------------------------------------


def row_count(vocab: int) -> int:
    """Rows of whole logits to hold at a time."""
    return max(LEAST_ROWS, LOGIT_BUDGET // vocab)


def softmax_(logits: Tensor, wanted: Tensor) -> Tensor:
    """Turn float32 logits (n, V) into probabilities in place; return logprobs of *wanted* (n, K).

    The log-normaliser is computed from the largest logit and its probability, so that the target's
    log-probability is exact even where its probability underflows.
    """
    largest = logits.amax(dim=1, keepdim=True)
    chosen = logits.gather(1, wanted)
    torch.softmax(logits, dim=1, out=logits)
    return chosen - largest + logits.amax(dim=1, keepdim=True).log_()


def _backward(
    linears: Linears,
    h: Tensor,
    wanted: Tensor,
    probs: Tensor,
    slopes: Tensor,
    steepness: Tensor | None,
) -> Tensor:
    """Gradient at h (n, d) of sum(slopes * logprobs); overwrites *probs*."""
    dlogits = probs.mul_(-slopes.sum(dim=1, keepdim=True)).scatter_add_(1, wanted, slopes)
    if steepness is not None:
        dlogits.mul_(steepness)
    return given(linears.backward("head", dlogits.to(h.dtype), h))
