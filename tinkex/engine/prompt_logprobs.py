"""Prompt log-probabilities of a sample request: of its tokens, of other tokens in their place, and
of the likeliest tokens. Does not know about the running batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex import types
from tinkex.engine import lm_head
from tinkex.engine.model import Linears
from tinkex.engine.sample_requests import Job, PromptScores


def score_prompts(jobs: Sequence[tuple[Job, Tensor]], linears: Linears, vocab: int) -> None:
    """Fill in the scores of jobs of one adapter.

    Args:
        jobs: each with the hidden states (length, d) of its prompt.
    """
    by_width: dict[int, list[tuple[Job, Tensor, npt.NDArray[np.int64]]]] = {}
    for job, states in jobs:
        wanted = _wanted(job)
        k = job.request.topk_prompt_logprobs
        states = states[len(states) - 1 - len(wanted) : -1]  # position t - 1 predicts token t
        if k:
            _set_scores(job, *_score_rows(states, wanted, linears, k, vocab))
        else:
            by_width.setdefault(wanted.shape[1], []).append((job, states, wanted))
    for alike in by_width.values():
        targets = torch.from_numpy(np.concatenate([wanted for *_, wanted in alike]))
        hidden = torch.cat([states for _, states, _ in alike])
        found, _ = lm_head.target_logprobs(linears, hidden, targets.to(hidden.device), vocab)
        ends = np.cumsum([len(wanted) for *_, wanted in alike])[:-1]
        for (job, *_), scores in zip(alike, np.split(found.cpu().numpy(), ends)):
            _set_scores(job, scores)


def _wanted(job: Job) -> npt.NDArray[np.int64]:
    """(n, K) tokens whose log-probabilities are asked for, of the last n positions."""
    last, targets = job.request.prompt_logprobs_last_n, job.request.target_prompt_logprobs
    wanted = job.prompt[1:, None].astype(np.int64)
    if targets is not None:
        wanted = np.concatenate([wanted, np.maximum(targets.to_numpy(), 0)], axis=1)
    return wanted if last is None else wanted[max(0, len(wanted) - last) :]


def _score_rows(
    states: Tensor, wanted: npt.NDArray[np.int64], linears: Linears, k: int, vocab: int
) -> tuple[npt.NDArray[np.float32], types.TopkLogprobs]:
    """Log-probabilities of *wanted*, and the k likeliest tokens: they need whole rows of logits."""
    scores = np.empty(wanted.shape, np.float32)
    topk = types.TopkLogprobs(
        np.empty((len(wanted), k), np.int32), np.empty((len(wanted), k), np.float32)
    )
    step = lm_head.row_count(vocab)
    for start in range(0, len(wanted), step):
        rows = slice(start, start + step)
        logits = linears.forward("head", states[rows]).float()
        topk.token_ids[rows], topk.logprobs[rows] = topk_of(logits, k)
        chosen = torch.from_numpy(wanted[rows]).to(logits.device)
        scores[rows] = lm_head.softmax_(logits, chosen).cpu().numpy()
    return scores, topk


def _set_scores(
    job: Job, scores: npt.NDArray[np.float32], topk: types.TopkLogprobs | None = None
) -> None:
    """Give a job its scores (n, K) of the last n positions; earlier positions have none."""
    request, before = job.request, len(job.prompt) - len(scores)
    targets = request.target_prompt_logprobs
    padded = np.pad(scores, ((before, 0), (0, 0)), constant_values=np.nan)
    if topk is not None:
        edge = ((before, 0), (0, 0))
        topk = types.TopkLogprobs(
            np.pad(topk.token_ids, edge),
            np.pad(topk.logprobs, edge, constant_values=types.ABSENT_LOGPROB),
        )
    job.scores = PromptScores(
        logprobs=padded[:, 0] if request.prompt_logprobs else None,
        topk=topk,
        targets=None if targets is None else _target_scores(targets, padded[1:, 1:]),
        cached=0 if job.scores is None else job.scores.cached,
    )


def _target_scores(targets: types.TensorData, scores: npt.NDArray[np.float32]) -> types.TensorData:
    """NaN where a target is -1."""
    return types.TensorData(np.where(targets.to_numpy() < 0, np.nan, scores).astype(np.float32))


def topk_of(logits: Tensor, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k likeliest tokens of each row of logits (n, V), best first, and their logprobs."""
    values, ids = logits.topk(k, dim=1)
    logprobs = values - logits.logsumexp(dim=1, keepdim=True)
    return ids.int().cpu().numpy(), logprobs.cpu().numpy()
