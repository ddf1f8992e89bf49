"""Checks of what training computes: losses, gradients, optimizer steps, and the two dialects."""

from __future__ import annotations

import numpy as np

from tinkex import types, wire
from tinkex.conformance.client import Broken, NotOffered, said, zstd_bomb
from tinkex.conformance.context import Context, logprobs_of
from tinkex.conformance.data import OTHERS, Slope, datum, distance
from tinkex.conformance.runner import Checks

CHECKS = Checks()

#: Largest difference of log-probabilities that should be equal, also in 16 bits.
_SAME = 0.02


@CHECKS.rule("loss:sum is there, and is the sum")
def loss_sum(ctx: Context) -> str:
    """loss:sum is -sum(weight * logprob) over tokens and datums; forward_backward_custom of the
    official SDK needs it. SkyRL returns no metrics."""
    with ctx.model() as model:
        data = [datum(weight=0.5), datum(OTHERS, weight=2.0)]
        output = model.forward(data)
        lp = logprobs_of(output, data).reshape(2, -1)
        expected = -(0.5 * lp[0].sum() + 2.0 * lp[1].sum())
        reported = output.metrics.get("loss:sum")
        if reported is None:
            raise Broken(f"the metrics are {sorted(output.metrics) or 'empty'}")
        if abs(reported - expected) > 0.01 * abs(expected):
            raise Broken(f"it is {reported:.4f}, but the sum is {expected:.4f}")
        return f"{reported:.4f}"


@CHECKS.rule("metrics are named name:reduction")
def metric_names(ctx: Context) -> str:
    """The official SDK raises an exception and loses the whole result if the name of a
    forward_backward metric does not have exactly one colon."""
    with ctx.model() as model:
        metrics = model.output(model.batch([datum()])).metrics
        model.run(model.step(), "optim_step")
        wrong = [name for name in metrics if name.count(":") != 1]
        if wrong:
            raise Broken(f"these names are not: {', '.join(wrong[:5])}")
        return ", ".join(sorted(metrics)[:5])


@CHECKS.rule("a loss of twice the weights is twice the loss")
def loss_scales(ctx: Context) -> None:
    """Losses are plain sums: twice the weights or twice the data give twice the loss. SkyRL divides
    by the sum of the weights."""
    with ctx.model() as model:
        batches = [[datum()], [datum(weight=2.0)], [datum(), datum()]]
        losses = [model.forward(batch).metrics.get("loss:sum") for batch in batches]
        if losses[0] is None:
            raise NotOffered("no loss:sum")
        for loss, what in ((losses[1], "of twice the weights"), (losses[2], "of twice the data")):
            if loss is None or abs(loss / losses[0] - 2) > 0.02:
                raise Broken(f"the loss {what} is {loss}, and without it {losses[0]}")


@CHECKS.rule("a gradient of twice the weights is twice the gradient")
def gradient_scales(ctx: Context) -> str:
    """Gradients are sums, too, so that learning rates are the same on all servers. SkyRL divides by
    sequences and weights."""
    with ctx.model() as model:
        slope = Slope(model)
        ratios = []
        for what, batch in (
            ("twice the weights", [datum(weight=2.0)]),
            ("twice the data", [datum(), datum()]),
        ):
            wrong = f"{what} is not twice the gradient"
            send = lambda b=batch: model.output(model.batch(b))  # noqa: E731
            ratios.append(slope.check(2, send, wrong))
        return ", ".join(f"{ratio:.2f}" for ratio in ratios)


@CHECKS.rule("gradients add up over requests until the step")
def accumulation(ctx: Context) -> str:
    """Each request adds its gradient. A server that keeps only the last one trains on a part of a
    large batch (as SkyRL did before it was fixed)."""
    with ctx.model() as model:
        slope = Slope(model)
        nothing = [datum(OTHERS, weight=0.0)]

        def add(*batches: list[types.Datum]) -> None:
            for batch in batches:
                model.output(model.batch(batch))

        lost = "with another request of weight 0, the {} request does not count fully"
        first = slope.check(1, lambda: add([datum()], nothing), lost.format("first"))
        last = slope.check(1, lambda: add(nothing, [datum()]), lost.format("second"))
        both = slope.check(2, lambda: add([datum()], [datum()]), "two requests do not count as two")
        return f"{first:.2f}, {last:.2f}, {both:.2f}"


@CHECKS.rule("a step clears the gradients")
def step_clears(ctx: Context) -> None:
    """A step clears the gradients, so that the next step does not apply them again."""
    with ctx.model() as model:
        slope = Slope(model)
        model.output(model.batch([datum()]))
        model.run(slope.step(), "optim_step")
        nothing = [datum(OTHERS, weight=0.0)]
        slope.check(0, lambda: model.output(model.batch(nothing)), "the step kept its gradients")


@CHECKS.rule("forward leaves gradients alone")
def forward_is_pure(ctx: Context) -> None:
    """forward (forward_only in protobuf) adds nothing to the gradients. A server that ignores the
    flag trains on evaluation data."""
    with ctx.model() as model:
        slope = Slope(model)

        def look() -> None:
            model.output(model.batch([datum()]))
            model.forward([datum()])
            model.forward([datum()])

        slope.check(1, look, "a forward pass adds gradients")


@CHECKS.rule("a fresh adapter is the base model")
def fresh_adapter(ctx: Context) -> None:
    """LoRA starts at zero: two new models give the same log-probabilities, whatever their seed."""
    with ctx.model() as first, ctx.model() as second:
        change = distance(first.logprobs([datum()]), second.logprobs([datum()]))
        if change > _SAME:
            raise Broken(f"the log-probabilities of two new models differ by {change:.4f}")


@CHECKS.rule("models do not touch each other")
def models_apart(ctx: Context) -> None:
    """Training one model does not change another of the same session."""
    with ctx.model() as first, ctx.model() as second:
        before = second.logprobs([datum()])
        for _ in range(3):
            first.train([datum()])
        change = distance(before, second.logprobs([datum()]))
        if change > _SAME:
            raise Broken(f"training one changed the other by {change:.4f}")


@CHECKS.rule("the same in both dialects")
def dialects(ctx: Context) -> str:
    """A batch gives the same result in JSON and in protobuf. TuFT accepts protobuf only, SkyRL
    0.3.0 JSON only."""
    with ctx.model() as model:
        found = {}
        for protobuf, name in ((False, "JSON"), (True, "protobuf")):
            answer = model.batch([datum()], model.number + 1, forward_only=True, protobuf=protobuf)
            if answer.status >= 300:
                refusal = f"{name}: {said(answer)}"
                continue
            model.next()
            found[name] = logprobs_of(model.output(answer, "forward"), [datum()])
        if len(found) < 2:
            raise NotOffered(refusal)
        change = distance(*found.values())
        if change > 1e-3:
            raise Broken(f"the log-probabilities differ by {change:.5f}")
        return "JSON, protobuf"


@CHECKS.rule("zstd bodies are read")
def zstd(ctx: Context) -> None:
    """If client/config has proto_compress_fwdbwd, a batch may be compressed."""
    if not ctx.client.connection.features.proto_compress_fwdbwd:
        raise NotOffered("client/config does not have proto_compress_fwdbwd")
    with ctx.model() as model:
        plain = model.logprobs([datum()])
        answer = model.batch([datum()], forward_only=True, protobuf=True, compress=True)
        packed = logprobs_of(model.output(answer, "a compressed forward"), [datum()])
        if distance(plain, packed) > 1e-3:
            raise Broken("the compressed batch gives different numbers")


@CHECKS.rule("a body that is far too large is refused")
def too_large(ctx: Context) -> str:
    """2 GiB in a few kilobytes of zstd (or 300 MiB of JSON, without zstd) are refused with 413, or
    400 or 422, and the server stays up."""
    if ctx.client.connection.features.proto_compress_fwdbwd:
        body = zstd_bomb(2048)
        headers = {"Content-Type": wire.PROTOBUF, "Content-Encoding": "zstd"}
    elif ctx.client.connection.config.is_official:
        raise NotOffered("no zstd, and 300 MiB are too much to send over the internet for a check")
    else:
        body, headers = b'{"model_id": "' + b"x" * (300 << 20) + b'"}', {}
    answer = ctx.client.send("POST", "forward_backward", body, headers, timeout=120.0)
    if answer.status not in (400, 413, 415, 422):
        raise Broken(f"it returned {said(answer)}")
    healthz = ctx.client.get("healthz")
    if healthz.status >= 500:
        raise Broken(f"afterwards healthz returned {said(healthz)}")
    return str(answer.status)


@CHECKS.rule("log-probabilities are returned for weight 0, too")
def masked(ctx: Context) -> None:
    """A custom loss computes its forward pass with weights of 0 and needs every log-probability."""
    with ctx.model() as model:
        full, none = model.logprobs([datum()]), model.logprobs([datum(weight=0.0)])
        if not np.isfinite(none).all() or distance(full, none) > _SAME:
            raise Broken(f"they differ by {distance(full, none):.4f} from those of weight 1")
