"""Sampling from a model: requests and results. Arrays are numpy; lists are created on access."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Union

import attrs
import numpy as np
import numpy.typing as npt

from tinkex.types import checks, display
from tinkex.types.data import MAX_TOKEN_ID, ModelInput, as_tokens
from tinkex.types.dataclass_form import like_a_dataclass
from tinkex.types.ready import Ready
from tinkex.types.tensors import TensorData, to_array

__all__ = [
    "ABSENT_LOGPROB",
    "CreateSamplingSessionRequest",
    "CreateSamplingSessionResponse",
    "GetSamplerResponse",
    "JoinSamplingSessionRequest",
    "JoinSamplingSessionResponse",
    "PromptAltTokens",
    "SampleRequest",
    "SampleResponse",
    "SampleStreamChunk",
    "SampledSequence",
    "SamplingClientKind",
    "SamplingParams",
    "Stop",
    "StopReason",
    "TopkLogprobs",
    "show_with",
]

StopReason = Literal["stop", "length"]
SamplingClientKind = Literal["snapshot", "inflight"]
Stop = Union[str, Sequence[str], Sequence[int], None]

#: Log-probability in the empty cells of a top-k table.
ABSENT_LOGPROB = -99999.0


def _as_stop(value: Any) -> Any:
    """None, a str, or a list of str or of int."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return [int(value)]
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return list(value)
    raise TypeError(f"stop must be a str, a list of str or a list of token ids, got {value!r}.")


def _check_stop(instance: object, attribute: Any, value: Any) -> None:
    if value is None:
        return
    items = [value] if isinstance(value, str) else value
    if not all(isinstance(item, str) for item in items) and not all(
        isinstance(item, int) and not isinstance(item, bool) for item in items
    ):
        raise TypeError(f"stop must hold strings only or token ids only, got {value!r}.")
    for item in items:
        if item == "":
            raise ValueError(f"stop holds an empty string: {value!r}.")
        if isinstance(item, int) and not 0 <= item <= MAX_TOKEN_ID:
            raise ValueError(
                f"stop holds {item}, which is not a token id; give ids from 0 to {MAX_TOKEN_ID}."
            )


@attrs.frozen
class SamplingParams:
    """Sampling parameters.

    Args:
        max_tokens: most tokens to generate; None is limited only by the model's context.
        seed: the same seed and request give the same tokens; None is random.
        stop: one string, several strings or several token ids that end a sequence. None: the
            model's end-of-text token; []: none.
        temperature: 1 is the model's distribution, 0 is greedy.
        top_k: sample from the k likeliest tokens; -1 is all.
        top_p: sample from the likeliest tokens with this total probability; 1 is all.
    """

    max_tokens: int | None = attrs.field(
        default=None,
        validator=checks.integer("a positive integer or None", lambda n: n > 0, optional=True),
    )
    seed: int | None = attrs.field(
        default=None,
        validator=checks.integer(
            "an integer from 0 to 2**63 - 1, or None", lambda n: 0 <= n < 2**63, optional=True
        ),
    )
    stop: Stop = attrs.field(default=None, converter=_as_stop, validator=_check_stop)
    temperature: float = attrs.field(
        default=1.0, validator=checks.number("a number >= 0", lambda x: x >= 0)
    )
    top_k: int = attrs.field(
        default=-1,
        validator=checks.integer(
            "-1 (all) or an integer from 1 to 2**31 - 1", lambda n: n == -1 or 0 < n < 2**31
        ),
    )
    top_p: float = attrs.field(
        default=1.0, validator=checks.number("a number in (0, 1]", lambda x: 0 < x <= 1)
    )


def _check_targets(instance: object, attribute: Any, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, TensorData):
        raise TypeError(
            f"{attribute.name} must be a TensorData of shape (N - 1, K), got "
            f"{type(value).__name__}; make one: TensorData(array)."
        )
    if value.dtype != "int64" or len(value.shape) != 2:
        raise ValueError(
            f"{attribute.name} must hold token ids (int64), -1 to skip, of shape (N - 1, K); got "
            f"{value.dtype} of shape {list(value.shape)}."
        )


@attrs.frozen
class SampleRequest:
    """One prompt, sampled `num_samples` times.

    `prompt_logprobs` requests the log-probabilities of the prompt's tokens; `topk_prompt_logprobs`
    / `topk_sample_logprobs` = k the k likeliest tokens at each position; `target_prompt_logprobs`
    (N - 1, K), int64, -1 to skip, those of the given tokens; `prompt_alt_tokens_k` = k requests k
    random draws from the distribution at each position of the prompt, at the request's temperature
    (`PromptAltTokens`); with `prompt_logprobs_last_n` = n, all positions but the last n are NaN.
    """

    prompt: ModelInput
    sampling_params: SamplingParams = attrs.field(factory=SamplingParams)
    num_samples: int = attrs.field(
        default=1, validator=checks.integer("a positive integer", lambda n: n > 0)
    )
    sampling_session_id: str | None = None
    seq_id: int | None = None
    prompt_logprobs: bool = attrs.field(
        default=False, converter=checks.bool_or_false, validator=checks.boolean
    )
    topk_prompt_logprobs: int = attrs.field(
        default=0, validator=checks.integer("an integer >= 0", lambda n: n >= 0)
    )
    topk_sample_logprobs: int = attrs.field(
        default=0, validator=checks.integer("an integer >= 0", lambda n: n >= 0)
    )
    target_prompt_logprobs: TensorData | None = attrs.field(default=None, validator=_check_targets)
    prompt_alt_tokens_k: int = attrs.field(
        default=0, validator=checks.integer("an integer >= 0", lambda n: n >= 0)
    )
    prompt_logprobs_last_n: int | None = attrs.field(
        default=None,
        validator=checks.integer("an integer >= 0 or None", lambda n: n >= 0, optional=True),
    )
    record_stability_info: bool = False
    base_model: str | None = None
    model_path: str | None = None


def _as_floats(value: Any) -> npt.NDArray[np.float32] | None:
    if value is None:
        return None
    if isinstance(value, list):
        value = [np.nan if x is None else x for x in value]
    return np.ascontiguousarray(to_array(value), dtype=np.float32)


@attrs.frozen(eq=False)
class TopkLogprobs:
    """The k likeliest tokens at each of L positions, best first.

    Attributes:
        token_ids: (L, k) int32.
        logprobs: (L, k) float32, in nats; `ABSENT_LOGPROB` in empty cells.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    def __repr__(self) -> str:
        positions, k = self.token_ids.shape
        return f"TopkLogprobs({display.count(positions, 'position')}, k={k})"

    def tolist(self) -> list[list[tuple[int, float]] | None]:
        """The (token id, log-probability) pairs of each position, or None if there are none."""
        rows: list[list[tuple[int, float]] | None] = []
        for tokens, logprobs in zip(self.token_ids.tolist(), self.logprobs.tolist()):
            row = [(t, p) for t, p in zip(tokens, logprobs) if p > ABSENT_LOGPROB]
            rows.append(row or None)
        return rows

    @classmethod
    def from_list(cls, rows: Sequence[Sequence[Sequence[float]] | None]) -> TopkLogprobs:
        """The inverse of `tolist`."""
        width = max((len(row) for row in rows if row), default=0)
        token_ids = np.zeros((len(rows), width), np.int32)
        logprobs = np.full((len(rows), width), ABSENT_LOGPROB, np.float32)
        for i, row in enumerate(rows):
            for j, (token, logprob) in enumerate(row or ()):
                token_ids[i, j], logprobs[i, j] = int(token), logprob
        return cls(token_ids, logprobs)


@like_a_dataclass
@attrs.frozen(eq=False)
class SampledSequence:
    """One sampled continuation.

    Attributes:
        tokens_np: (T,) int32; includes the stop token, if one ended it.
        logprobs_np: (T,) float32; log-probability of each token under the model at temperature 1.
        stop_reason: "stop" (a stop token or string, or end of text) or "length".
        sequence_id: the server's name for it, or None.
        topk_logprobs_np: the likeliest tokens at each step, if requested.
    """

    tokens_np: npt.NDArray[np.int32] = attrs.field(alias="tokens", converter=as_tokens)
    logprobs_np: npt.NDArray[np.float32] | None = attrs.field(
        default=None, alias="logprobs", converter=_as_floats
    )
    stop_reason: StopReason = "length"
    sequence_id: str | None = None
    topk_logprobs_np: TopkLogprobs | None = attrs.field(default=None, alias="topk_logprobs")

    @cached_property
    def tokens(self) -> list[int]:
        tokens: list[int] = self.tokens_np.tolist()
        return tokens

    @cached_property
    def logprobs(self) -> list[float] | None:
        return None if self.logprobs_np is None else self.logprobs_np.tolist()

    @cached_property
    def topk_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        return None if self.topk_logprobs_np is None else self.topk_logprobs_np.tolist()

    def text(self, tokenizer: Any, skip_special_tokens: bool = False) -> str:
        """The continuation as text.

        Args:
            tokenizer: anything with `decode(list of ids)`.
            skip_special_tokens: omit special tokens, such as the end-of-text token; the tokenizer's
                `decode` must accept this argument.
        """
        options = {"skip_special_tokens": True} if skip_special_tokens else {}
        decoded: str = tokenizer.decode(self.tokens, **options)
        return decoded

    def __len__(self) -> int:
        return len(self.tokens_np)

    def __repr__(self) -> str:
        return f"SampledSequence({self.summary(_tokenizers.get(self))})"

    def summary(self, tokenizer: Any = None) -> str:
        """The sequence in one line: its stop reason, its text or else its first tokens."""
        shown = display.tokens(self.tokens_np)
        if tokenizer is not None:
            # Decodes only the shown tokens. A repr must not fail, whatever the tokenizer is.
            with contextlib.suppress(Exception):
                beginning = tokenizer.decode(self.tokens_np[: display.MOST_TEXT].tolist())
                shown = f"{display.count(len(self), 'token')}: {display.text(beginning)}"
        return f"{self.stop_reason}, {shown}"


@like_a_dataclass
@attrs.frozen
class PromptAltTokens:
    """Draws from the model's distribution at each position of the prompt after the first.

    Attributes:
        tokens: (N - 1, k) int64; row i holds alternatives to token i + 1 of the prompt.
        logprobs: (N - 1, k) float32, their log-probabilities.
    """

    tokens: TensorData
    logprobs: TensorData


@like_a_dataclass
@attrs.frozen(eq=False)
class SampleResponse:
    """The result of `sample`.

    Attributes:
        sequences: one for each of num_samples.
        prompt_logprobs_np: (N,) float32, NaN where not computed (the first always), or None.
        topk_prompt_logprobs_np: (N, k), or None.
        target_prompt_logprobs: (N - 1, K) float32, or None.
        prompt_cache_hit_tokens: number of prompt tokens from the server's cache.
        prompt_alt_tokens: if requested by `prompt_alt_tokens_k`.
    """

    sequences: list[SampledSequence]
    prompt_logprobs_np: npt.NDArray[np.float32] | None = attrs.field(
        default=None, alias="prompt_logprobs", converter=_as_floats
    )
    topk_prompt_logprobs_np: TopkLogprobs | None = attrs.field(
        default=None, alias="topk_prompt_logprobs"
    )
    target_prompt_logprobs: TensorData | None = None
    prompt_cache_hit_tokens: int = 0
    prompt_alt_tokens: PromptAltTokens | None = None

    @cached_property
    def prompt_logprobs(self) -> list[float | None] | None:
        if self.prompt_logprobs_np is None:
            return None
        return [None if x != x else x for x in self.prompt_logprobs_np.tolist()]

    @cached_property
    def topk_prompt_logprobs(self) -> list[list[tuple[int, float]] | None] | None:
        if self.topk_prompt_logprobs_np is None:
            return None
        return self.topk_prompt_logprobs_np.tolist()

    def __repr__(self) -> str:
        title = f"SampleResponse of {display.count(len(self.sequences), 'sequence')}"
        if self.prompt_logprobs_np is not None:
            title += f", prompt_logprobs of {display.count(len(self.prompt_logprobs_np), 'token')}"
        tokenizer = _tokenizers.get(self)
        return f"<{display.lines(title, self.sequences, lambda s: s.summary(tokenizer))}>"

    def _repr_html_(self) -> str:
        """A table of the first sequences, for notebooks."""
        tokenizer = _tokenizers.get(self)
        rows = [
            (i, *sequence.summary(tokenizer).split(", ", 1))
            for i, sequence in enumerate(self.sequences[: display.MOST_ITEMS])
        ]
        title = f"SampleResponse of {display.count(len(self.sequences), 'sequence')}"
        return display.html_rows(title, ["", "stop reason", "tokens"], rows)

    def text(self, tokenizer: Any, skip_special_tokens: bool = False) -> str:
        """The first sequence as text; arguments as for `SampledSequence.text`."""
        return self.sequences[0].text(tokenizer, skip_special_tokens)


#: Tokenizers for showing responses and sequences, if known. Stored separately from the values,
#: which are compared, pickled and sent.
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def show_with(response: SampleResponse, tokenizer: Any) -> None:
    """Show *response* and its sequences as text in a REPL, using *tokenizer*."""
    for shown in (response, *response.sequences):
        _tokenizers[shown] = tokenizer


@attrs.frozen
class SampleStreamChunk:
    """One token of a streamed sample, or the end of a sequence.

    Attributes:
        index: which of the num_samples sequences.
        token, logprob: the token id and its log-probability; None in a sequence's last chunk.
        stop_reason: "stop" or "length" in a sequence's last chunk, else None.
    """

    index: int = 0
    token: int | None = None
    logprob: float | None = None
    stop_reason: StopReason | None = None


@attrs.frozen
class CreateSamplingSessionRequest:
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


@attrs.frozen
class CreateSamplingSessionResponse:
    sampling_session_id: str


@attrs.frozen
class JoinSamplingSessionRequest:
    sampling_session_id: str


@attrs.frozen
class JoinSamplingSessionResponse:
    client_counter: int


@attrs.frozen
class GetSamplerResponse(Ready):
    """The weights or base model of a sampler."""

    sampler_id: str
    base_model: str
    model_path: str | None = None
