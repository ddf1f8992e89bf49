"""Streams a sample as text, for the commands that print one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any


def pieces(
    sampler: Any, prompt: Any, params: Any, tokenizer: Any, tokens: list[int] | None = None
) -> Iterator[str]:
    """
    Yield the text of one sample in pieces; in one piece if the server does not stream.

    Special tokens, and the token that ends the sample, are not shown.

    Args:
        sampler: a `SamplingClient`.
        prompt: a `ModelInput`.
        params: `SamplingParams`.
        tokens: filled with the tokens as they arrive.
    """
    from tinkex import errors
    from tinkex.text.streaming import TokenText

    tokens = [] if tokens is None else tokens
    stop = params.stop if isinstance(params.stop, list) else []
    text = TokenText(partial(tokenizer.decode, skip_special_tokens=True))
    try:
        for chunk in sampler.sample_stream(prompt, sampling_params=params):
            if chunk.token is not None:
                tokens.append(chunk.token)
                if chunk.token not in stop:
                    yield text.push(chunk.token)
    except errors.NotOfferedError:
        tokens += sampler.sample(prompt, sampling_params=params).result().sequences[0].tokens
        for token in tokens:
            if token not in stop:
                yield text.push(token)
    yield text.finish()


def shown(text: str) -> str:
    """*text* for standard output, without control characters that a terminal would execute."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
