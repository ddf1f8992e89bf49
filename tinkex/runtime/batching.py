"""Splits a list of datums into requests within the server's limits, and joins the results.

Pure functions. Losses are sums, so the split does not change the result.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

from tinkex.types import (
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageAssetPointerChunk,
    ImageChunk,
    ModelInput,
)

logger = logging.getLogger("tinkex")

#: Limits of one request, unless the server gives others.
MAX_DATUMS = 1024
MAX_BYTES = 5_000_000


def count_tokens(model_input: ModelInput) -> int:
    """Text tokens of *model_input*; images are not counted."""
    chunks = model_input.chunks
    return sum(len(chunk.tokens_np) for chunk in chunks if isinstance(chunk, EncodedTextChunk))


def size_of_input(model_input: ModelInput) -> int:
    """Estimated bytes of a model input on the wire: 4 a token, plus the bytes of images."""
    total = 0
    for chunk in model_input.chunks:
        if isinstance(chunk, EncodedTextChunk):
            total += 4 * len(chunk.tokens_np)
        elif isinstance(chunk, ImageChunk):
            total += len(chunk.data)
        elif isinstance(chunk, ImageAssetPointerChunk):
            total += len(chunk.location)
    return total


def size_of(datum: Datum) -> int:
    """Estimated bytes of a datum on the wire: its model input and its loss inputs."""
    arrays = sum(tensor.nbytes for tensor in datum.loss_fn_inputs.values())
    return size_of_input(datum.model_input) + arrays


def split(
    data: Sequence[Datum], max_datums: int = MAX_DATUMS, max_bytes: int = MAX_BYTES
) -> list[list[Datum]]:
    """*data* in order, in batches within both limits; a too large datum gets its own batch."""
    batches: list[list[Datum]] = []
    room = -1
    for datum in data:
        size = size_of(datum)
        if not batches or len(batches[-1]) >= max_datums or size > room:
            batches.append([])
            room = max_bytes
        batches[-1].append(datum)
        room -= size
    return batches


def join(outputs: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
    """Join the outputs of the batches, in order. A single output is returned unchanged."""
    if len(outputs) == 1:
        return outputs[0]
    kinds = list(dict.fromkeys(output.loss_fn_output_type for output in outputs))
    if len(kinds) > 1:
        logger.warning(
            "the parts of a batch have different loss_fn_output_type: %s; using %s", kinds, kinds[0]
        )
    return ForwardBackwardOutput(
        loss_fn_outputs=[one for output in outputs for one in output.loss_fn_outputs],
        metrics=join_metrics(
            [output.metrics for output in outputs],
            [len(output.loss_fn_outputs) for output in outputs],
        ),
        loss_fn_output_type=kinds[0],
    )


def join_metrics(metrics: Sequence[dict[str, float]], weights: Sequence[int]) -> dict[str, float]:
    """Join the metrics of several batches by the reduction after the last ':' of each name.

    sum, min, max; mean (weighted by the number of outputs); slack = max - mean; unique keeps each
    under a separate name (`x:unique`, `x:unique_2`, ...); hash2 and hash_unordered add as 64-bit
    integers; any other is averaged like mean. Batches without the metric are ignored.
    """
    joined: dict[str, float] = {}
    for name in dict.fromkeys(name for one in metrics for name in one):
        having = [(one[name], weight) for one, weight in zip(metrics, weights) if name in one]
        _reduce(joined, name, [value for value, _ in having], [weight for _, weight in having])
    return joined


def _reduce(joined: dict[str, float], name: str, values: list[float], weights: list[int]) -> None:
    rule = name.rpartition(":")[2]
    if rule == "sum":
        joined[name] = _sum(values)
    elif rule == "min":
        joined[name] = min(values)
    elif rule == "max":
        joined[name] = max(values)
    elif rule == "slack":
        joined[name] = max(values) - _mean(values, weights)
    elif rule == "unique":
        joined[name] = values[0]
        joined.update({f"{name}_{i}": value for i, value in enumerate(values[1:], 2)})
    elif rule in ("hash2", "hash_unordered"):
        joined[name] = float(sum(int(v) for v in values if math.isfinite(v)) % 2**64)
    else:
        joined[name] = _mean(values, weights)


def _mean(values: Iterable[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    if not total:
        return 0.0
    return _sum([value * weight for value, weight in zip(values, weights)]) / total


def _sum(values: Sequence[float]) -> float:
    """The exact sum, rounded once; infinite or NaN if the values are."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # inf - inf, or beyond the largest float
        return sum(values)
