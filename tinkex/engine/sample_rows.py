"""The running sequences of a sampler: the settings and tokens of each, as rows of arrays.

Does not know how tokens are computed, or where keys and values are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tinkex.engine import token_sampling
from tinkex.engine.sample_requests import Job

#: Sequences that run at the same time.
MOST_ROWS = 256


class Rows:
    """The running sequences: one row each, in arrays of their settings and tokens."""

    def __init__(self) -> None:
        self.job: list[Job | None] = [None] * MOST_ROWS
        self.index = np.zeros(MOST_ROWS, np.int64)
        self.length = np.zeros(MOST_ROWS, np.int64)
        self.last = np.zeros(MOST_ROWS, np.int64)
        self.keys = np.zeros(MOST_ROWS, np.uint64)
        self.temperature = np.ones(MOST_ROWS, np.float32)
        self.top_k = np.zeros(MOST_ROWS, np.int64)
        self.top_p = np.ones(MOST_ROWS, np.float32)
        self.limit = np.zeros(MOST_ROWS, np.int64)
        self.prompt_length = np.zeros(MOST_ROWS, np.int64)
        self.stops = np.full((MOST_ROWS, 1), -1, np.int64)
        self.tokens = np.zeros((MOST_ROWS, 64), np.int32)
        self.logprobs = np.zeros((MOST_ROWS, 64), np.float32)
        self.topk: list[list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]]
        self.topk = [[] for _ in range(MOST_ROWS)]
        self.free = list(range(MOST_ROWS - 1, -1, -1))

    def take(self, job: Job, index: int) -> int:
        """A row for sample *index* of *job*."""
        row = self.free.pop()
        params = job.request.sampling_params
        self.job[row], self.index[row], self.length[row] = job, index, 0
        self.keys[row] = job.keys[index]
        self.temperature[row] = token_sampling.usable_temperature(params.temperature)
        self.top_k[row], self.top_p[row] = max(params.top_k, 0), params.top_p
        self.limit[row], self.prompt_length[row] = job.limit, len(job.prompt)
        if len(job.stop_tokens) > self.stops.shape[1]:
            missing = len(job.stop_tokens) - self.stops.shape[1]
            self.stops = np.pad(self.stops, ((0, 0), (0, missing)), constant_values=-1)
        self.stops[row] = -1
        self.stops[row, : len(job.stop_tokens)] = job.stop_tokens
        self.topk[row] = []
        return row

    def release(self, row: int) -> None:
        self.job[row] = None
        self.topk[row] = []
        self.free.append(row)

    def settings(self, rows: npt.NDArray[np.int64]) -> token_sampling.Settings:
        return token_sampling.Settings(
            self.keys[rows],
            self.length[rows],
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
        )

    def append(
        self, rows: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], logprobs: npt.NDArray
    ) -> npt.NDArray[np.bool_]:
        """Append a token to each row; return which rows it ends, as a stop token."""
        longest = int(self.length[rows].max()) + 1
        if longest > self.tokens.shape[1]:
            more = ((0, 0), (0, self.tokens.shape[1]))
            self.tokens, self.logprobs = np.pad(self.tokens, more), np.pad(self.logprobs, more)
        at = self.length[rows]
        self.tokens[rows, at], self.logprobs[rows, at] = tokens, logprobs
        self.last[rows] = tokens
        self.length[rows] += 1
        ended: npt.NDArray[np.bool_] = (self.stops[rows] == tokens[:, None]).any(axis=1)
        return ended
