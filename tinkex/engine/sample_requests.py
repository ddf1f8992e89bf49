"""A sample request, checked against the model, and its results so far.

Does not know how tokens are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import attrs
import numpy as np
import numpy.typing as npt

from tinkex import types
from tinkex.engine import token_sampling
from tinkex.engine.base_model import BaseModel
from tinkex.engine.finished_lora import Finished

#: (number of the sequence, token, its log-probability)
OnToken = Callable[[int, int, float], None]


@attrs.frozen(eq=False)
class PromptScores:
    """Prompt log-probabilities that a request has asked for."""

    logprobs: npt.NDArray[np.float32] | None = None
    topk: types.TopkLogprobs | None = None
    targets: types.TensorData | None = None
    cached: int = 0
    alternatives: types.PromptAltTokens | None = None


@attrs.define(eq=False)
class Job:
    """A checked request, and its results so far.

    Attributes:
        limit: most tokens of a sequence.
        stop_tokens: token ids that end a sequence.
        stop_strings: strings that end a sequence.
        sequences: the finished ones; None while one is running.
        share: the share of the running batch that it counts towards; different shares take turns.
        told: how many tokens of each sequence `on_token` has been called with.
    """

    ticket: Hashable
    request: types.SampleRequest
    adapter: Finished | None
    prompt: npt.NDArray[np.int32]
    limit: int
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    keys: token_sampling.Keys
    on_token: OnToken | None
    sequences: list[types.SampledSequence | None]
    scores: PromptScores | None = None
    share: Hashable = None
    told: dict[int, int] = attrs.field(factory=dict)

    def start_again(self) -> None:
        """Drop what was computed. Running again gives the same tokens; none is reported twice."""
        self.sequences = [None] * len(self.sequences)
        self.scores = None

    def tell_token(self, sequence: int, length: int, token: int, logprob: float) -> None:
        """Call `on_token` with the token that makes *sequence* *length* tokens long."""
        if self.on_token is not None and length > self.told.get(sequence, 0):
            self.told[sequence] = length
            self.on_token(sequence, token, logprob)

    @property
    def wants_scores(self) -> bool:
        """True if anything about the prompt is requested."""
        asked = self.request
        targets = asked.target_prompt_logprobs
        return bool(
            asked.prompt_logprobs
            or asked.topk_prompt_logprobs
            or asked.prompt_alt_tokens_k
            or targets is not None
        )

    @property
    def is_done(self) -> bool:
        return all(sequence is not None for sequence in self.sequences)

    def response(self) -> types.SampleResponse:
        scores = self.scores or PromptScores()
        return types.SampleResponse(
            sequences=[sequence for sequence in self.sequences if sequence is not None],
            prompt_logprobs=scores.logprobs,
            topk_prompt_logprobs=scores.topk,
            target_prompt_logprobs=scores.targets,
            prompt_cache_hit_tokens=scores.cached,
            prompt_alt_tokens=scores.alternatives,
        )


def make_job(
    ticket: Hashable,
    request: types.SampleRequest,
    adapter: Finished | None,
    base: BaseModel,
    on_token: OnToken | None = None,
    share: Hashable = None,
) -> Job:
    """Check a request against the model.

    Raises:
        ValueError: If the prompt is empty, too long or outside the model's vocabulary, or the
            request uses something that this server does not support.
    """
    params = request.sampling_params
    prompt = _check_prompt(request.prompt, base.vocab, base.context)
    _check_prompt_scores(request, len(prompt), base.vocab)
    room = max(1, base.context - len(prompt))  # the last token is not fed back
    stop_tokens, stop_strings = _stops(params.stop, base.eos_tokens)
    _check_stops(stop_tokens, stop_strings)
    seed = params.seed
    if seed is None:
        seed = int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    return Job(
        ticket=ticket,
        request=request,
        adapter=adapter,
        prompt=prompt,
        limit=room if params.max_tokens is None else min(room, params.max_tokens),
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        keys=token_sampling.sequence_keys(seed, request.num_samples),
        on_token=on_token,
        sequences=[None] * request.num_samples,
        share=share,
    )


def _check_prompt(prompt: types.ModelInput, vocab: int, context: int) -> npt.NDArray[np.int32]:
    tokens = prompt.tokens
    if len(tokens) == 0:
        raise ValueError("the prompt is empty; it needs at least one token.")
    if int(tokens.max()) >= vocab:
        raise ValueError(
            f"the prompt holds token id {int(tokens.max())} at position {int(tokens.argmax())}, "
            f"but the model's vocabulary has {vocab} tokens; encode it with the model's tokenizer."
        )
    if len(tokens) > context:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, but the model's context is {context}; "
            "shorten the prompt."
        )
    return tokens


def _check_prompt_scores(request: types.SampleRequest, length: int, vocab: int) -> None:
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        if getattr(request, name) > vocab:
            raise ValueError(
                f"{name} = {getattr(request, name)} is more than the vocabulary's {vocab} tokens."
            )
    targets = request.target_prompt_logprobs
    if targets is None:
        return
    if len(targets.shape) != 2 or targets.shape[0] != length - 1:
        raise ValueError(
            f"target_prompt_logprobs has shape {list(targets.shape)}; for a prompt of {length} "
            f"tokens it must be [{length - 1}, K]."
        )
    values = targets.values
    if values.size and not -1 <= values.min() <= values.max() < vocab:
        raise ValueError(
            f"target_prompt_logprobs must hold token ids below {vocab}, or -1 to skip."
        )


#: Limits of stop tokens and strings: each costs time at every token.
MOST_STOP_TOKENS = 1024
MOST_STOP_STRINGS = 64
MOST_STOP_LENGTH = 512


def _check_stops(tokens: tuple[int, ...], strings: tuple[str, ...]) -> None:
    if len(tokens) > MOST_STOP_TOKENS or len(strings) > MOST_STOP_STRINGS:
        raise ValueError(
            f"stop holds {len(tokens)} token ids and {len(strings)} strings; at most "
            f"{MOST_STOP_TOKENS} and {MOST_STOP_STRINGS} are looked for."
        )
    longest = max(map(len, strings), default=0)
    if longest > MOST_STOP_LENGTH:
        raise ValueError(
            f"stop holds a string of {longest} characters; at most {MOST_STOP_LENGTH} are compared."
        )


def _stops(
    stop: types.sampling.Stop, eos: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Token ids and strings that end a sequence."""
    if stop is None:
        return eos, ()
    if isinstance(stop, str):
        return (), (stop,)
    tokens = tuple(dict.fromkeys(item for item in stop if isinstance(item, int)))
    return tokens, tuple(dict.fromkeys(item for item in stop if isinstance(item, str)))
