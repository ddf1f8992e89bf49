"""`/v1/completions`: continues text or tokens, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import attrs
import numpy as np
from starlette.responses import Response

from tinkex import types
from tinkex.server.http_errors import Refusal, shown
from tinkex.server.openai.events import event_stream
from tinkex.server.openai.fields import Fields
from tinkex.server.openai.generation import Collected, Generation, Piece, collect, token_text
from tinkex.server.openai.names import Model, find_model
from tinkex.server.request_context import Call, reply

#: OpenAI's default of max_tokens.
DEFAULT_TOKENS = 16
MOST_LOGPROBS = 20
MOST_PROMPTS = 1024
MOST_STOPS = 64


@attrs.frozen(eq=False)
class CompletionRequest:
    """
    A checked request.

    Attributes:
        prompts: token ids of each.
        count: completions of each prompt.
        logprobs: how many of the likeliest tokens to report at each position; None reports no
            log-probabilities.
        max_tokens: 0 is allowed with *echo*: only the prompt is scored.
    """

    model: Model
    prompts: tuple[tuple[int, ...], ...]
    count: int
    echo: bool
    logprobs: int | None
    max_tokens: int
    stops: tuple[str, ...]
    params: types.SamplingParams

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None

    def sample(self, prompt: Sequence[int]) -> types.SampleRequest:
        return types.SampleRequest(
            prompt=types.ModelInput.from_ints(prompt),
            sampling_params=self.params,
            num_samples=self.count,
            prompt_logprobs=self.scores_prompt,
            topk_prompt_logprobs=(self.logprobs or 0) if self.scores_prompt else 0,
            topk_sample_logprobs=self.logprobs or 0,
        )

    def generation(self, call: Call, prompt: Sequence[int]) -> Generation:
        return Generation(
            call,
            self.model,
            self.sample(prompt),
            self.stops,
            needs_response=self.logprobs is not None,
        )


async def completions(call: Call) -> Response:
    fields = Fields(await call.read_json())
    request = await _checked(call, fields)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model.name,
    }
    if fields.flag("stream"):
        options = Fields(fields.get("stream_options", {}))
        return await event_stream(_stream(call, request, head, options.flag("include_usage")))
    choices: list[dict[str, Any]] = []
    sampled = 0
    for prompt in request.prompts:
        generation = request.generation(call, prompt)
        for sequence in await collect(generation, request.count):
            choices.append(_choice(request, prompt, sequence, generation, len(choices)))
        sampled += generation.completion_tokens if request.max_tokens else 0
    return reply({**head, "choices": choices, "usage": _usage(request, sampled)})


async def _checked(call: Call, fields: Fields) -> CompletionRequest:
    fields.refuse_unless("logit_bias", ({},), "omit it.")
    fields.refuse_unless("suffix", ("",), "omit it.")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.refuse_unless(name, (0,), "omit it.")
    limits = call.site.limits
    count = fields.integer("n", 1, 1, limits.num_samples) or 1
    fields.refuse_unless("best_of", (count,), "omit it; use n.")
    echo = fields.flag("echo")
    max_tokens = fields.integer("max_tokens", DEFAULT_TOKENS, 0 if echo else 1, limits.max_tokens)
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    if fields.flag("stream") and (echo or logprobs):
        raise Refusal(400, "stream does not go with echo or logprobs > 0; omit one of them.")
    stops = tuple(fields.strings("stop", MOST_STOPS))
    model = await find_model(call, fields.text("model"))
    prompts = await call.site.in_pool(_prompts, fields.needed("prompt"), model.tokenizer)
    params = fields.sampling(max_tokens or 1, None)
    return CompletionRequest(model, prompts, count, echo, logprobs, max_tokens or 0, stops, params)


def _prompts(value: Any, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Text, token ids, or a list of either, as token ids. Raises Refusal (400)."""
    is_one = isinstance(value, str) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], int)
    )
    items = [value] if is_one else value
    if not isinstance(items, list) or not items or len(items) > MOST_PROMPTS:
        raise Refusal(
            400,
            "prompt must be a string, a list of token ids, or a list of up to "
            f"{MOST_PROMPTS} of either, got {shown(value)}.",
        )
    return tuple(_tokens(item, tokenizer) for item in items)


def _tokens(item: Any, tokenizer: Any) -> tuple[int, ...]:
    if isinstance(item, str):
        tokens = tuple(tokenizer.encode(item))
        if not tokens and tokenizer.bos_token_id is not None:
            tokens = (tokenizer.bos_token_id,)
    else:
        ids = item if isinstance(item, list) else [item]
        if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
            raise Refusal(400, f"prompt must hold token ids, got {shown(item)}.")
        tokens = tuple(ids)
    if not tokens:
        raise Refusal(400, "prompt is empty; give at least one token.")
    return tokens


def _usage(request: CompletionRequest, sampled: int) -> dict[str, int]:
    prompt = sum(map(len, request.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _choice(
    request: CompletionRequest,
    prompt: Sequence[int],
    sequence: Collected,
    generation: Generation,
    number: int,
) -> dict[str, Any]:
    is_scored_only = request.max_tokens == 0
    text = "" if is_scored_only else sequence.text
    if request.echo:
        text = request.model.tokenizer.decode(list(prompt)) + text
    return {
        "index": number,
        "text": text,
        "finish_reason": "length" if is_scored_only else sequence.finish,
        "logprobs": None
        if request.logprobs is None
        else _logprobs(request, prompt, sequence, generation, number % request.count),
    }


def _logprobs(
    request: CompletionRequest,
    prompt: Sequence[int],
    sequence: Collected,
    generation: Generation,
    index: int,
) -> dict[str, Any]:
    """Four lists with an entry per token: of the prompt (with echo), then of the completion."""
    response = generation.response
    if response is None:
        raise RuntimeError("a generation with log-probabilities did not run to its end.")
    tokens: list[int] = []
    logprobs: list[float | None] = []
    top: list[list[tuple[int, float]] | None] = []
    if request.echo:
        tokens += prompt
        logprobs += response.prompt_logprobs or [None] * len(prompt)
        top += response.topk_prompt_logprobs or [None] * len(prompt)
    if request.max_tokens:
        count = len(sequence.tokens)
        tokens += sequence.tokens
        logprobs += sequence.logprobs
        rows = response.sequences[index].topk_logprobs or [None] * count
        top += rows[:count]
    texts = [token_text(request.model.tokenizer, token) for token in tokens]
    positions = zip(top, tokens, logprobs)
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": [_top_of(request, *position) for position in positions],
        "text_offset": np.cumsum([0, *map(len, texts[:-1])]).tolist() if texts else [],
    }


def _top_of(
    request: CompletionRequest,
    row: Sequence[tuple[int, float]] | None,
    token: int,
    logprob: float | None,
) -> dict[str, float] | None:
    """The likeliest tokens of one position and its actual token, in OpenAI's form."""
    if logprob is None:
        return None
    tokenizer = request.model.tokenizer
    found = {token_text(tokenizer, i): value for i, value in reversed(row or ())}
    found[token_text(tokenizer, token)] = logprob
    return found


async def _stream(
    call: Call, request: CompletionRequest, head: dict[str, Any], include_usage: bool
) -> AsyncIterator[dict[str, Any]]:
    sampled = 0
    for number, prompt in enumerate(request.prompts):
        generation = request.generation(call, prompt)
        async for piece in generation.pieces():
            if piece.text or piece.finish:
                choice = _streamed_choice(piece, number * request.count + piece.index)
                yield {**head, "choices": [choice]}
        sampled += generation.completion_tokens
    if include_usage:
        yield {**head, "choices": [], "usage": _usage(request, sampled)}


def _streamed_choice(piece: Piece, number: int) -> dict[str, Any]:
    return {"index": number, "text": piece.text, "finish_reason": piece.finish, "logprobs": None}
