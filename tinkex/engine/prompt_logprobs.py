"""Prompt log-probabilities of a sample request: of the prompt's tokens, of other target tokens, of
the likeliest tokens and of random ones. Does not know about the running batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tinkex import types
from tinkex.engine import lm_head
from tinkex.engine.base_model import BaseModel, OnHidden, PromptState
from tinkex.engine.finished_lora import Finished
from tinkex.engine.linears import Linears
from tinkex.engine.sample_requests import Job, PromptScores
from tinkex.engine.token_sampling import usable_temperature


def scorer_of(
    groups: Sequence[Sequence[Job]], state: PromptState, base: BaseModel
) -> OnHidden | None:
    """A callback that fills in the scores of each prompt's jobs; None if no job requests any.

    Args:
        groups: the jobs of each prompt. All but the first have the prompt from the cache.
        state: computes the prompts.
    """
    asking: list[list[Job]] = [[] for _ in groups]
    for group, wanting in zip(groups, asking):
        for i, job in enumerate(group):
            if job.scores is None:
                job.scores = PromptScores(cached=len(job.prompt) if i else 0)
                if job.wants_scores:
                    wanting.append(job)
    if not any(asking):
        return None

    def score(numbers: Sequence[int], states: Sequence[Tensor]) -> None:
        by_adapter: dict[Finished | None, list[tuple[Job, Tensor]]] = {}
        for number, own in zip(numbers, states):
            for job in asking[number]:
                by_adapter.setdefault(job.adapter, []).append((job, own))
        for adapter, pairs in by_adapter.items():
            head = state.head(adapter, sum(len(own) for _, own in pairs))
            score_prompts(pairs, head, base)

    return score


def score_prompts(jobs: Sequence[tuple[Job, Tensor]], linears: Linears, base: BaseModel) -> None:
    """Fill in the scores of jobs of one adapter.

    Args:
        jobs: each with the hidden states (length, d) of its prompt.
    """
    by_width: dict[int, list[tuple[Job, Tensor, npt.NDArray[np.int64]]]] = {}
    for job, states in jobs:
        wanted = _wanted(job)
        states = states[len(states) - 1 - len(wanted) : -1]  # position t - 1 predicts token t
        if job.request.topk_prompt_logprobs or job.request.prompt_alt_tokens_k:
            rows = _RowScores(job, wanted, base)
            rows.add(states, linears)
            _set_scores(job, *rows.result())
        else:
            by_width.setdefault(wanted.shape[1], []).append((job, states, wanted))
    for alike in by_width.values():
        targets = torch.from_numpy(np.concatenate([wanted for *_, wanted in alike]))
        hidden = torch.cat([states for _, states, _ in alike])
        found, _ = lm_head.target_logprobs(
            linears, hidden, targets.to(hidden.device), base.vocab, cap=base.logit_cap
        )
        ends = np.cumsum([len(wanted) for *_, wanted in alike])[:-1]
        for (job, *_), scores in zip(alike, np.split(found.cpu().numpy(), ends)):
            _set_scores(job, scores)


def _wanted(job: Job) -> npt.NDArray[np.int64]:
    """(n, K) tokens whose log-probabilities are requested, for the last n positions; for all
    positions if random tokens are requested, which cover every position."""
    last, targets = job.request.prompt_logprobs_last_n, job.request.target_prompt_logprobs
    wanted = job.prompt[1:, None].astype(np.int64)
    if targets is not None:
        wanted = np.concatenate([wanted, np.maximum(targets.to_numpy(), 0)], axis=1)
    if last is None or job.request.prompt_alt_tokens_k:
        return wanted
    return wanted[max(0, len(wanted) - last) :]


class PieceScores:
    """The scores of one job, from the hidden states of its prompt a piece at a time."""

    def __init__(self, job: Job, base: BaseModel) -> None:
        self.job = job
        self._base = base
        self._wanted = _wanted(job)
        self._unscored = len(job.prompt) - 1 - len(self._wanted)  # positions to skip
        self._scores = np.empty(self._wanted.shape, np.float32)
        self._done = 0
        self._rows: _RowScores | None = None
        if job.request.topk_prompt_logprobs or job.request.prompt_alt_tokens_k:
            self._rows = _RowScores(job, self._wanted, base)

    def add(self, states: Tensor, linears: Linears) -> None:
        """Score what the states (n, d) of the next n tokens predict."""
        passed = min(self._unscored, len(states))
        self._unscored -= passed
        states = states[passed : passed + len(self._wanted) - self._done]
        if not len(states):
            return
        rows = slice(self._done, self._done + len(states))
        self._done = rows.stop
        if self._rows is not None:
            self._rows.add(states, linears)
            return
        targets = torch.from_numpy(self._wanted[rows]).to(states.device)
        found, _ = lm_head.target_logprobs(
            linears, states, targets, self._base.vocab, cap=self._base.logit_cap
        )
        self._scores[rows] = found.cpu().numpy()

    def finish(self) -> None:
        """Give the job its scores, after the last piece."""
        if self._rows is not None:
            _set_scores(self.job, *self._rows.result())
        else:
            _set_scores(self.job, self._scores)


class _RowScores:
    """Log-probabilities of *wanted* (n, K), of the k likeliest tokens, and of random tokens, which
    need whole rows of logits."""

    def __init__(self, job: Job, wanted: npt.NDArray[np.int64], base: BaseModel) -> None:
        self._base = base
        self._wanted = wanted
        k, draws = job.request.topk_prompt_logprobs, job.request.prompt_alt_tokens_k
        self._scores = np.empty(wanted.shape, np.float32)
        self._topk = types.TopkLogprobs(
            np.empty((len(wanted), k), np.int32), np.empty((len(wanted), k), np.float32)
        )
        self._alternatives = np.empty((len(wanted), draws), np.int64)
        self._of_alternatives = np.empty((len(wanted), draws), np.float32)
        self._draw = _Draw(job, base.device)
        self._done = 0

    def add(self, states: Tensor, linears: Linears) -> None:
        """Score the next m positions, from the hidden states (m, d) before them."""
        k, draws = self._topk.token_ids.shape[1], self._alternatives.shape[1]
        step = lm_head.row_count(self._base.vocab)
        for start in range(0, len(states), step):
            logits = lm_head.head_logits(
                linears, states[start : start + step], self._base.logit_cap
            )
            rows = slice(self._done, self._done + len(logits))
            if k:
                self._topk.token_ids[rows], self._topk.logprobs[rows] = topk_of(logits, k)
            if draws:
                drawn = self._draw(logits, draws)
                self._alternatives[rows], self._of_alternatives[rows] = drawn
            chosen = torch.from_numpy(self._wanted[rows]).to(logits.device)
            self._scores[rows] = lm_head.softmax_(logits, chosen).cpu().numpy()
            self._done = rows.stop

    def result(
        self,
    ) -> tuple[npt.NDArray[np.float32], types.TopkLogprobs | None, types.PromptAltTokens | None]:
        """The scores, and the likeliest and random tokens if requested."""
        tokens, scores = map(types.TensorData, (self._alternatives, self._of_alternatives))
        has_topk, has_draws = self._topk.token_ids.shape[1], self._alternatives.shape[1]
        return (
            self._scores,
            self._topk if has_topk else None,
            types.PromptAltTokens(tokens, scores) if has_draws else None,
        )


class _Draw:
    """Draws tokens with replacement at the request's temperature; same seed, same tokens."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self._temperature = usable_temperature(job.request.sampling_params.temperature)
        self._generator = torch.Generator(device)
        self._generator.manual_seed(int(job.keys[0]) & (2**63 - 1))

    def __call__(
        self, logits: Tensor, k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """(n, k) tokens for logits (n, V), and their log-probabilities at temperature 1."""
        if self._temperature == 0:
            tokens = logits.argmax(dim=1, keepdim=True).expand(-1, k)
        else:
            chances = (logits / self._temperature).softmax(dim=1)
            tokens = torch.multinomial(chances, k, replacement=True, generator=self._generator)
        logprobs = logits.gather(1, tokens) - logits.logsumexp(dim=1, keepdim=True)
        return tokens.cpu().numpy(), logprobs.cpu().numpy()


def _set_scores(
    job: Job,
    scores: npt.NDArray[np.float32],
    topk: types.TopkLogprobs | None = None,
    alternatives: types.PromptAltTokens | None = None,
) -> None:
    """Give a job its scores (n, K) of the last n positions; earlier positions have none."""
    request, before = job.request, len(job.prompt) - len(scores)
    last = request.prompt_logprobs_last_n
    if last is not None and last < len(scores):
        unwanted = len(scores) - last
        scores[:unwanted] = np.nan
        if topk is not None:
            topk.logprobs[:unwanted] = types.ABSENT_LOGPROB
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
        alternatives=alternatives,
    )


def _target_scores(targets: types.TensorData, scores: npt.NDArray[np.float32]) -> types.TensorData:
    """NaN where a target is -1."""
    return types.TensorData(np.where(targets.to_numpy() < 0, np.nan, scores).astype(np.float32))


def topk_of(logits: Tensor, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The k likeliest tokens of each row of logits (n, V), best first, and their logprobs."""
    values, ids = logits.topk(k, dim=1)
    logprobs = values - logits.logsumexp(dim=1, keepdim=True)
    return ids.int().cpu().numpy(), logprobs.cpu().numpy()
